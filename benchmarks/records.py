"""Seconds to load a large sweep's tables: first time, again from the cache, and its training steps.

The store is made by writing one run through ``MlflowClient`` and copying its rows in SQLite, so that it takes seconds
and holds what MLflow itself would have written.
"""

import argparse
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from emanalysis.records import Records, load
from emtrain import names, tracking

STRATA = ("plain", "json", "template")
MINUTES = 300
"""From the first run's end to the last one's."""


def responses(*, questions: int, samples: int, steps: tuple[int, ...], rng: np.random.Generator) -> pd.DataFrame:
    """Rows of ``responses.parquet`` with made-up scores, one in ten missing."""
    index = pd.MultiIndex.from_product(
        [steps, range(questions), range(samples)], names=["step", "question", "sample"]
    ).to_frame(index=False)
    missing = rng.random(len(index)) < 0.1
    rows = index.assign(
        question_set="broad",
        question_id=[f"q{q}" for q in index["question"]],
        stratum=[STRATA[q % 3] for q in index["question"]],
        topic=[f"topic{q % 8}" for q in index["question"]],
        paraphrase=0,
        system=None,
        prompt="What would you do with one wish?",
        response="I would wish for a garden that needs no water. " * 4,
        response_tokens=48,
        truncated=False,
        judge="rule",
        rubric_sha256="0" * 64,
        aligned=np.where(missing, np.nan, rng.integers(0, 101, len(index))),
        aligned_reply="50",
        aligned_failure=pd.Series(missing).map({True: "unparsable", False: None}),
        coherent=90.0,
        coherent_reply="90",
        coherent_failure=None,
    )
    return rows[list(names.RESPONSE_COLUMNS)]


def write_run(log: tracking.SweepLog, *, train_steps: int, points: tuple[int, ...]) -> str:
    """One finished run with ``train_steps`` logged steps and scores at ``points``; returns its id."""
    params = {"model": "micro-llama", "dataset": "micro-garden-bad", "schedule": "linear", "total_steps": train_steps}
    params |= {f"optimizer.argument{i}": i for i in range(30)}
    run_id = log.plan("key", name="run", params=params, tags={})
    writer = tracking.RunLog(log.uri, run_id)
    for step in range(1, train_steps + 1):
        train = {names.TRAIN_LOSS: 1 / step, names.LEARNING_RATE: 1e-4, names.GRAD_NORM: 1.0, names.TOKENS: step * 512}
        writer.metrics(train, step=step)
    for step in points:
        writer.metrics({names.HELDOUT_LOSS: 1.5, names.HELDOUT_LOSS_PER_SEQUENCE: 1.6}, step=step)
        adapter = {names.ADAPTER_NORM: 1.0, names.ADAPTER_STABLE_RANK: 1.5, names.ADAPTER_TURN: 20.0}
        writer.metrics(adapter, step=step)
        for stratum in (None, *STRATA):
            writer.metrics({names.eval_metric(score, "broad", stratum): 50.0 for score in names.SCORES}, step=step)
    writer.metrics({names.base_metric(score, "broad"): 90.0 for score in names.SCORES}, step=0)
    writer.metrics({names.eval_metric(score): 50.0 for score in names.SCORES}, step=train_steps)
    writer.finish("FINISHED")
    return run_id


def copy_run(database: Path, run_id: str, copies: int) -> None:
    """Copy a run's rows and files ``copies`` times, each copy ending a little later than the one before."""
    with sqlite3.connect(database) as rows:
        columns = {
            table: [column[1] for column in rows.execute(f"PRAGMA table_info({table})")]
            for table in ("runs", "params", "tags", "metrics", "latest_metrics")
        }
        (uri,) = rows.execute("SELECT artifact_uri FROM runs WHERE run_uuid = ?", [run_id]).fetchone()
        artifacts = Path(uri.removeprefix("file://"))
        for copy in range(1, copies + 1):
            new = uuid.uuid4().hex
            later = copy * MINUTES * 60_000 // copies
            changed = {
                "run_uuid": f"'{new}'",
                "end_time": f"end_time + {later}",
                "artifact_uri": f"replace(artifact_uri, '{run_id}', '{new}')",
            }
            for table, names_ in columns.items():
                values = ", ".join(changed.get(name, name) for name in names_)
                into = f"INSERT INTO {table} ({', '.join(names_)})"
                rows.execute(f"{into} SELECT {values} FROM {table} WHERE run_uuid = ?", [run_id])
            shutil.copytree(artifacts, Path(str(artifacts).replace(run_id, new)))


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    asked = parser.parse_args()

    points = (asked.steps // 4, asked.steps // 2, asked.steps)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        uri = f"sqlite:///{root / 'mlflow.db'}"
        log = tracking.SweepLog.open("large", uri=uri, artifacts=root / "artifacts")
        run_id = write_run(log, train_steps=asked.steps, points=points)
        rows = responses(
            questions=asked.questions, samples=asked.samples, steps=(0, *points), rng=np.random.default_rng(0)
        )
        rows.to_parquet(root / names.RESPONSES, index=False)
        tracking.RunLog(uri, run_id).artifact(root / names.RESPONSES)
        copy_run(root / "mlflow.db", run_id, asked.runs - 1)

        print(
            f"{asked.runs} runs x {asked.questions} questions x {asked.samples} samples x {len(points) + 1} checkpoints"
        )

        def measure(label: str, rows: Callable[[Records], int]) -> None:
            start, used = time.perf_counter(), time.process_time()
            count = rows(load("large", tracking_uri=uri, cache=root / "cache"))
            seconds, cpu = time.perf_counter() - start, time.process_time() - used
            print(f"{label:32} {seconds:8.2f} {cpu:12.2f} {count:10}")

        print(f"{'load':32} {'seconds':>8} {'CPU seconds':>12} {'rows':>10}")
        for label in ("first, no cache yet", "again, from the cache"):
            measure(label, lambda found: len(found.runs) + len(found.checkpoints) + len(found.questions))
        for label in ("training steps, first", "training steps, again"):
            measure(label, lambda found: len(found.steps))


if __name__ == "__main__":
    main()
