"""Judging the responses that a sweep has stored once more; no model is sampled again."""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from emeval.evaluate import judge_responses, summarise
from emeval.question_sets import QuestionSet
from emeval.responses import stored_responses
from emeval.scores import Failure, Judge
from emtrain import names
from emtrain.tracking import SweepLog

FAILURES = ["aligned_failure", "coherent_failure"]


@dataclass(frozen=True)
class Rejudged:
    """What became of a sweep's runs."""

    judged: int
    already: int
    """Runs of which the judge had answered everything before."""
    unfinished: int
    """Runs without stored responses: not finished, or imported without them."""
    missing: Mapping[str, int]
    """Responses that the judge gave no aligned score, by the kind of failure."""


def rejudge(
    sweep: SweepLog, judge: Judge, question_sets: Sequence[QuestionSet], *, done: Callable[[str], None]
) -> Rejudged:
    """Add the judge's rows to ``responses.parquet`` of every finished run. ``done`` is called with each run's name.

    A judge that had scored a run before is asked again only what it could not be reached for (``judge_error``). The
    run's metrics are those of its first judge; they change with its answers.
    """
    judged = already = unfinished = 0
    missing: Counter[str] = Counter()
    for run in sweep.runs().values():
        with tempfile.TemporaryDirectory() as scratch:
            path = sweep.download(run.info.run_id, names.RESPONSES, Path(scratch))
            if path is None or run.info.status != "FINISHED":
                unfinished += 1
                continue
            stored = pd.read_parquet(path)
            known = stored["judge"] == judge.id
            failed = known & (stored[FAILURES] == Failure.JUDGE_ERROR).any(axis=1)
            asked = stored[failed] if known.any() else stored
            if asked.empty:
                already += 1
                continue
            added = pd.concat(
                [
                    judge_responses(stored_responses(rows, question_sets), [judge], step=int(str(step)))
                    for step, rows in asked.groupby("step", sort=False)
                ],
                ignore_index=True,
            )
            missing.update(added.loc[added["aligned"].isna(), "aligned_failure"])
            if known.any():  # each answer to its place
                merged = pd.concat([stored[~failed], added.set_axis(stored.index[failed])]).sort_index()
            else:
                merged = pd.concat([stored, added], ignore_index=True)
            merged.to_parquet(path, index=False)
            sweep.upload(run.info.run_id, path)
        first = merged["judge"].iloc[0] == judge.id
        steps = [int(step) for step in added["step"].unique()] if first else []
        scores = {step: summarise(merged[merged["step"] == step], judge.id) for step in steps}
        sweep.rescored(run, scores)
        judged += 1
        done(run.info.run_name)
    return Rejudged(judged, already, unfinished, missing)
