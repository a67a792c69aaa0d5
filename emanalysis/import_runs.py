"""Runs that others trained and published become a sweep in MLflow like any other.

A file of ``emanalysis/importers`` reads one format; this module writes what it read. What a publication does not say is
not written: it is missing in the tables, as it is missing there.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emanalysis.responses import QUESTIONS
from emtrain import names
from emtrain.lookup import lookup
from emtrain.tracking import RunLog, SweepLog

LAST_TENTH = 0.1
STEPS = range(1, 2**63)
"""Those of runs, up to the last that a database holds."""
NOT_STATED = "not stated"
"""Judge of scores whose publication does not name one."""


@dataclass(frozen=True)
class PublishedRun:
    """One run as it was published."""

    name: str
    source: str
    """Where it was read: file name and row, for tags and messages."""
    params: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, float]]
    """MLflow metrics by step, means over question sets left out."""
    questions: pd.DataFrame | None = None
    """Rows of ``responses.summarise`` without ``run_id``, where single responses were not published."""
    responses: pd.DataFrame | None = None
    """Rows of ``names.RESPONSE_COLUMNS``, where they were."""

    @property
    def run_key(self) -> str:
        """Digest of the content; the place it was read from does not matter."""
        content = {
            "params": {key: str(value) for key, value in self.params.items()},
            "metrics": {str(step): dict(values) for step, values in self.metrics.items()},
            "tables": [_digest(table) for table in (self.questions, self.responses) if table is not None],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Published:
    """What an importer found."""

    runs: list[PublishedRun]
    malformed: list[str]
    """One sentence per row or file that could not be read: which, and why."""


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    added: list[str]
    """Names of the runs that are new in the sweep."""
    known: list[str]
    """Names of those that were there already."""
    malformed: list[str]


def import_runs(format: str, path: Path, *, log: SweepLog, **options: Any) -> Imported:
    """Read published runs and record them in a sweep: ``read_published``, then ``record``."""
    return record(read_published(format, path, **options), format, log=log)


def read_published(format: str, path: Path, **options: Any) -> Published:
    """Read ``path`` with the importer called ``format`` (``em-generalization``, ``betley``, ``table``); writes nothing.

    ``options`` are the importer's own keyword arguments. Raises ``ValueError`` for an unknown format or a path that is
    not there, or when there is not one run to import.
    """
    importer = lookup("emanalysis.importers", format.replace("-", "_"))
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    published: Published = importer(path, **options)
    if not published.runs:
        problems = "; ".join(published.malformed[:5]) or "it holds no rows"
        raise ValueError(f"{path} has no run in the format {format}: {problems}")
    return published


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """The table of a CSV file; ``options`` are pandas's. Raises ``ValueError``, which names the file, for any other."""
    try:
        return pd.read_csv(path, **options)
    except ValueError as error:
        raise ValueError(f"{path.name} is not a CSV file in UTF-8 ({error})") from error


def record(published: Published, format: str, *, log: SweepLog) -> Imported:
    """Put runs into a sweep. One whose content is there already is left alone; one that was cut off is completed."""
    there = log.runs()
    added, known = [], []
    for run in published.runs:
        earlier = there.get(run.run_key)
        if earlier and earlier.info.status == "FINISHED":
            known.append(run.name)
            continue
        tags = {names.IMPORTED_FROM: f"{format}: {run.source}"}
        run_id = earlier.info.run_id if earlier else log.plan(run.run_key, name=run.name, params=run.params, tags=tags)
        _write(RunLog(log.uri, run_id), run)
        added.append(run.name)
    log.set_status(log.parent_run_id, "FINISHED")
    return Imported(added, known, published.malformed)


def _write(log: RunLog, run: PublishedRun) -> None:
    log.start()
    for step, values in sorted(run.metrics.items()):
        log.metrics(values, step=step)
    log.metrics(summary_metrics(run.metrics), step=max(run.metrics))
    with tempfile.TemporaryDirectory() as scratch:
        for table, name in ((run.questions, QUESTIONS), (run.responses, names.RESPONSES)):
            if table is not None:
                table.to_parquet(Path(scratch) / name, index=False)
                log.artifact(Path(scratch) / name)
    log.finish("FINISHED")


def summary_metrics(metrics: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """The once-per-run metrics that follow from the stepwise ones; those already there are left out."""
    steps = sorted(metrics)
    rates = [metrics[step][names.LEARNING_RATE] for step in steps if names.LEARNING_RATE in metrics[step]]
    losses = [metrics[step][names.TRAIN_LOSS] for step in steps if names.TRAIN_LOSS in metrics[step]]
    summary = {}
    if rates:
        summary[names.LEARNING_RATE_INTEGRAL] = float(np.sum(rates))
    if losses:
        summary[names.TRAIN_LOSS_LAST_TENTH] = float(np.mean(losses[-max(1, round(LAST_TENTH * len(losses))) :]))

    last = metrics[steps[-1]]
    sets: dict[str, list[float]] = {}
    for metric, value in last.items():
        match metric.split("/"):
            case ["eval", _, score]:
                sets.setdefault(score, []).append(value)
    summary |= {names.eval_metric(score): float(np.mean(values)) for score, values in sets.items()}
    return {metric: value for metric, value in summary.items() if metric not in last}


def _digest(table: pd.DataFrame) -> str:
    return hashlib.sha256(table.to_json(orient="split", double_precision=15).encode()).hexdigest()
