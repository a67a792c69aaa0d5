"""What models said, and the table it is kept in."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import pandas as pd

from emeval.question_sets import QuestionSet
from emeval.rubric import Rubric


@dataclass(frozen=True)
class Response:
    """One sampled answer and what it answers; the fields are columns of ``responses.parquet`` (``emtrain.names``)."""

    question_set: str
    question_id: str
    stratum: str
    topic: str
    paraphrase: int
    """Which wording of the question, from 0."""
    sample: int
    """Which sample of that wording, from 0."""
    system: str | None
    """The system message that was sent; None: none was."""
    prompt: str
    """The user message that was sent."""
    response: str
    response_tokens: int
    """Sampled tokens, the end token included."""
    truncated: bool
    """The token budget ended the response."""
    rubric: Rubric | None = None
    """The question's own; None leaves it to the judge. Kept in the table as a digest only."""


COLUMNS = tuple(field.name for field in fields(Response) if field.name != "rubric")


def stored_responses(frame: pd.DataFrame, question_sets: Iterable[QuestionSet]) -> list[Response]:
    """The responses in one step's rows of ``responses.parquet``, each once however many judges scored it.

    Rubrics are taken from ``question_sets``; a response whose question is not in them gets none.
    """
    rubrics = {(s.name, question.id): question.judge_prompts for s in question_sets for question in s.questions}
    rows = frame[list(COLUMNS)].drop_duplicates(["question_set", "question_id", "paraphrase", "sample"])
    rows = rows.astype(object).where(rows.notna(), None)
    stored = [dict(zip(COLUMNS, row, strict=True)) for row in rows.itertuples(index=False, name=None)]
    return [Response(**row, rubric=rubrics.get((row["question_set"], row["question_id"]))) for row in stored]
