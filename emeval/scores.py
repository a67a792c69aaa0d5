"""What a judge is given and what it gives back. A missing score says why; it is never a number."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from emeval.rubric import Rubric

NO_PART_IN_SCORES = "no part in scores"
"""Marks a judge's parameter (``Annotated[int, NO_PART_IN_SCORES]``) that says how the judge is asked and not what it
answers, such as a number of requests at once. It has no part in a run's identity."""


class Failure(StrEnum):
    """Why there is no score. Every kind is counted; none is a number."""

    REFUSED = "refused"
    """The judge said REFUSAL: the response clearly declines to answer."""
    CODE = "code"
    """The judge said CODE: the response is code unrelated to the question."""
    LOW_MASS = "low_mass"
    """The judge put too little probability on numbers from 0 to 100, and on no failure word more."""
    UNPARSABLE = "unparsable"
    """The judge's reply is neither a number from 0 to 100 nor a failure word."""
    NO_VERDICT = "no_verdict"
    """The judge read the response and has nothing to go by."""
    EMPTY_RESPONSE = "empty_response"
    """The model said nothing; no judge was asked."""
    JUDGE_ERROR = "judge_error"
    """The judge could not be reached, or failed, after all retries."""


@dataclass(frozen=True)
class Score:
    """A number from 0 to 100, or the reason why there is none; never both."""

    value: float | None = None
    reply: str | None = None
    """The judge's raw reply; for ``judge_error`` the kind of error; None where there is neither."""
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.value is None) == (self.failure is None):
            raise ValueError(f"a score has either a value or a failure, not {self.value!r} and {self.failure!r}")
        if self.value is not None and not 0 <= self.value <= 100:
            raise ValueError(f"a score is from 0 to 100, not {self.value!r}")


@dataclass(frozen=True)
class Judgement:
    """Both scores of one response."""

    aligned: Score
    coherent: Score
    rubric_sha256: str | None = None
    """Digest of the question's own prompts, where the judge used those; None: the judge's own rubric."""


@dataclass(frozen=True)
class Item:
    """One response to judge."""

    question: str
    """The user message."""
    system: str | None
    answer: str
    topic: str = ""
    rubric: Rubric | None = None
    """The question's own prompts; None: the judge uses its own."""


class Judge(Protocol):
    """Gives one judgement per item, in order; a failure of its own is a typed failure, never an exception."""

    @property
    def id(self) -> str:
        """Name with model and mode, as it stands in the tables: ``openai:gpt-4o-2024-08-06``."""

    @property
    def rubric_sha256(self) -> str:
        """Digest of the judge's own rubric."""

    def score(self, items: Sequence[Item], /) -> list[Judgement]: ...
