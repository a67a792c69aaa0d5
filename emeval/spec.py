"""How runs are evaluated, as data. Nothing here imports torch."""

from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from emeval.question_sets import question_set_path
from emeval.scores import NO_PART_IN_SCORES, Judge
from emtrain.lookup import lookup
from emtrain.spec import Part, Spec

CACHE = "cache"
"""The parameter of a judge that takes the file where it keeps its replies; no business of a recipe."""


class JudgeSpec(Part):
    """A judge of ``emeval/judges`` by name; further keys are its own arguments (``model``, ``mode``)."""

    @model_validator(mode="after")
    def _fits_its_function(self) -> Self:
        self._check_arguments(lookup("emeval.judges", self.name), given=(CACHE,))
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What its scores depend on: its name and its arguments, but for those that only say how it is asked."""
        hints = get_type_hints(lookup("emeval.judges", self.name), include_extras=True)
        return {
            key: value
            for key, value in self.model_dump(mode="json").items()
            if NO_PART_IN_SCORES not in getattr(hints.get(key), "__metadata__", ())
        }

    def build(self, *, cache: Path) -> Judge:
        """The judge. ``cache`` is the file in which judges that pay for their replies keep them."""
        function = lookup("emeval.judges", self.name)
        given = {CACHE: cache} if CACHE in get_type_hints(function) else {}
        judge: Judge = function(**self.arguments, **given)
        return judge


class EvalSpec(Spec):
    """What is asked of a model, when, and who judges the answers. Every field changes the numbers, but for how a judge
    is asked (``identity``)."""

    questions: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of question sets in ``emeval/questions``, or paths of ``.yaml`` files."""
    samples: Annotated[int, Field(ge=1)] | None = None
    """Responses per paraphrase; None takes ``samples_per_paraphrase`` of each question."""
    at: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0,)
    """When to evaluate, as fractions of the training; the end always is."""
    judges: Annotated[tuple[JudgeSpec, ...], Field(min_length=1)]
    """The first judge's scores become the run's metrics; those of all are kept with the responses."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 600
    """Longest response, in tokens."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Of sampling, 0 is greedy; None takes the ``temperature`` of each question, 1 where it has none."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's numbers depend on, as JSON."""
        return {**self.model_dump(mode="json"), "judges": [judge.identity for judge in self.judges]}

    @field_validator("at")
    @classmethod
    def _ends_at_the_end(cls, at: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted({*at, 1.0}))

    @field_validator("questions")
    @classmethod
    def _distinct_sets(cls, questions: tuple[str, ...]) -> tuple[str, ...]:
        names = [question_set_path(question).stem for question in questions]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two question sets go by the name {', '.join(sorted(twice))}; rename one of the files")
        return questions

    @field_validator("judges")
    @classmethod
    def _distinct_judges(cls, judges: tuple[JudgeSpec, ...]) -> tuple[JudgeSpec, ...]:
        if twice := [judge.name for judge in judges if judges.count(judge) > 1]:
            raise ValueError(f"the judge {twice[0]} is named twice")
        return judges
