"""Another judge for the responses that a sweep has stored; no model is sampled again."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emeval.evaluate import judge_responses
from emeval.question_sets import QuestionSet
from emeval.responses import stored_responses
from emeval.scores import Judge
from emtrain import names
from emtrain.tracking import SweepLog


@dataclass(frozen=True)
class Rejudged:
    """What became of a sweep's runs."""

    judged: int
    already: int
    """Runs that had the judge's scores before."""
    unfinished: int
    """Runs without stored responses: not finished, or imported without them."""
    missing: int
    """Responses that the judge gave no aligned score."""


def rejudge(
    sweep: SweepLog, judge: Judge, question_sets: Sequence[QuestionSet], *, done: Callable[[str], None]
) -> Rejudged:
    """Add the judge's rows to ``responses.parquet`` of every finished run. ``done`` is called with each run's name.

    The run's metrics stay those of its first judge.
    """
    judged = already = unfinished = missing = 0
    for run in sweep.runs().values():
        with tempfile.TemporaryDirectory() as scratch:
            path = sweep.download(run.info.run_id, names.RESPONSES, Path(scratch))
            if path is None or run.info.status != "FINISHED":
                unfinished += 1
                continue
            stored = pd.read_parquet(path)
            if judge.id in set(stored["judge"]):
                already += 1
                continue
            added = [
                judge_responses(
                    stored_responses(stored[stored["step"] == step], question_sets), [judge], step=int(step)
                )
                for step in stored["step"].unique()
            ]
            missing += int(sum(rows["aligned"].isna().sum() for rows in added))
            pd.concat([stored, *added], ignore_index=True).to_parquet(path, index=False)
            sweep.upload(run.info.run_id, path)
        judged += 1
        done(run.info.run_name)
    return Rejudged(judged, already, unfinished, missing)
