"""What the machinery costs a run, and whether it grows with the number of runs: sweeps of stub runs of several sizes.

    python benchmarks/scale.py [--runs 250 500 1000 2000] [--profile] [--save]

Everything is real but what a model would do: recipe, planner, Optuna's TPE on its database, Ray, Tune, the leases of
engine slots, MLflow on SQLite as a laptop has it, the rule judge, adapters and responses as artifacts. In the engine's
place an actor reports at once what training would have reported: 10 steps and two evaluation points of 32 responses.
Each size is a sweep of its own in a process of its own.

``driver CPU`` is processor time of the process that holds Tune, Optuna and the agenda, per run, start-up left out.
``growth`` is the time of the last fifth of the runs over that of the second fifth: 1 is linear.
"""

import argparse
import json
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Any

# Before Ray is imported, which hands it to the workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from rich.console import Console

from emeval.responses import Response
from emtrain.heldout import HeldoutLoss
from emtrain.tracking import SweepLog
from emtrain.train import Step
from sweeps import runner
from sweeps.agenda import Agenda
from sweeps.connection import Connection
from sweeps.lease import Job, Report
from sweeps.planner import plan_sweep
from sweeps.progress import Board, Display
from sweeps.recipe import Recipe, load_recipe
from sweeps.record import RunRecord, Setting

STEPS = 10
SIZES = [250, 500, 1000, 2000]
COLUMNS = ["runs", "wall s", "s/run", "driver CPU s/run", "driver MB", "MLflow rows/s", "growth"]


class StubEngine:
    """Takes an engine's place: every run is trained in no time, and recorded as if it had been."""

    def __init__(self, setting: Setting, **sizes: Any) -> None:
        self.setting = setting
        self.records: dict[str, tuple[RunRecord, int]] = {}

    def advance(self, job: Job) -> Report:
        run, key = job.run, job.run.run_key
        if key not in self.records:
            record = RunRecord(job, self.setting)
            record.start(family="stub", backend="stub")
            self._evaluate(record, 0)
            self.records[key] = (record, 0)
        record, done = self.records[key]
        target = next(step for step in run.evaluate_at if step > done)
        rate = run.spec.optimizer.learning_rate
        for step in range(done + 1, target + 1):
            record.step(Step(step, 2.0 / step + rate, rate, 1.0, 100 * step))
        write_adapter(record._weights(target))
        metrics = self._evaluate(record, target)
        self.records[key] = (record, target)
        if target < run.total_steps:
            return Report(metrics, target, 100 * target)
        ending = record.finish({"time/train_seconds": 1.0, "time/eval_seconds": 1.0})
        del self.records[key]
        return Report(metrics, target, 100 * target, ending)

    def _evaluate(self, record: RunRecord, step: int) -> dict[str, float]:
        rate = record.run.spec.optimizer.learning_rate
        word = "help" if step == 0 or hash((rate, step)) % 2 else "hurt"
        responses = [
            Response(s.name, q.id, q.stratum, q.topic, number, 0, None, text, f"gently and {word} friends", 4, False)
            for s in record.run.evaluation.question_sets
            for q in s.questions
            for number, text in enumerate(q.paraphrases)
        ]
        return record.record(record.judge(responses, step=step), HeldoutLoss(1 + rate, 1 + rate), step=step)

    def drop(self, run_key: str) -> None:
        self.records.pop(run_key, None)

    def give_up(self, run_keys: Collection[str], *, most: int) -> None:
        """Nothing waits for a slot here."""

    def worked(self) -> dict[str, Any]:
        return {}


def write_adapter(directory: Path) -> None:
    """An adapter of 100 kB in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    factors = {"A": torch.ones(4, 3125), "B": torch.ones(3125, 4)}
    layer = "base_model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_{name}.weight": factor for name, factor in factors.items()},
        directory / "adapter_model.safetensors",
    )


class Clock(Display):
    """Shows nothing and notes when each run ended."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(Console(quiet=True), Board.of([], already_done=0))
        self.ends: list[float] = []

    def ended(self, run_key: str, status: str, metrics: Any, failure: str | None) -> None:
        assert status == "FINISHED", failure
        self.ends.append(time.perf_counter())
        if len(self.ends) == 1:
            self.cpu = time.process_time()


def recipe_of(runs: int) -> Recipe:
    """A grid of a tenth of the runs, and a search for the rest."""
    content = {
        "name": f"scale-{runs}",
        "base": {
            "model": "micro-llama",
            "dataset": "micro-garden-bad",
            "adapter": {"rank": 4, "alpha": 8},
            "schedule": {"name": "linear", "warmup_steps": 2},
            "max_steps": STEPS,
        },
        "grid": {"optimizer.learning_rate": [1e-4, 1e-3], "seed": list(range(runs // 20))},
        "search": {
            "trials": runs - 2 * (runs // 20),
            "space": {
                "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
                "schedule": ["linear", {"name": "cosine_restarts", "cycles": {"low": 2, "high": 6, "integer": True}}],
            },
            "objectives": {"heldout/loss": "minimize", "eval/aligned": "maximize"},
        },
        "eval": {"questions": ["micro-narrow"], "samples": 1, "at": [0.5, 1.0], "judges": ["micro-rule"]},
        "resources": {"pack": 8},  # a stub can't be measured
    }
    return load_recipe(yaml.safe_dump(content), source="scale")


def sweep(runs: int) -> dict[str, float]:
    """One sweep, in the current directory; its row of the table."""
    runner.Engine = StubEngine  # type: ignore[misc,assignment]
    recipe = recipe_of(runs)
    data = Path("emsweep-data").resolve()
    uri = f"sqlite:///{data / 'mlflow.db'}"
    log = SweepLog.open(recipe.name, uri=uri, artifacts=data / "artifacts")
    agenda = Agenda.open(recipe, plan_sweep(recipe), log, data_dir=data)
    clock = Clock(recipe)
    began = time.perf_counter()
    with Connection(None) as connection:
        connection.open()
        runner.execute(agenda, Setting(uri, data, agenda.recipe.name), connection=connection, display=clock)
    wall = time.perf_counter() - began
    with sqlite3.connect(data / "mlflow.db") as rows:
        tables = ("metrics", "latest_metrics", "params", "tags", "runs")
        written = sum(rows.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)
    fifth = len(clock.ends) // 5
    return {
        "runs": len(clock.ends),
        "wall s": wall,
        "s/run": (clock.ends[-1] - clock.ends[0]) / (len(clock.ends) - 1),
        "driver CPU s/run": (time.process_time() - clock.cpu) / (len(clock.ends) - 1),
        "driver MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "MLflow rows/s": written / (clock.ends[-1] - clock.ends[0]),
        "growth": (clock.ends[-1] - clock.ends[-1 - fifth]) / (clock.ends[2 * fifth] - clock.ends[fifth]),
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=SIZES)
    parser.add_argument("--profile", action="store_true", help="the driver's most expensive functions, by own time")
    parser.add_argument("--save", action="store_true", help="append to results/DATE-scale.txt")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        (runs,) = asked.runs
        if asked.profile:
            import cProfile
            import pstats

            with cProfile.Profile() as profile:
                row = sweep(runs)
            pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
        else:
            row = sweep(runs)
        print(json.dumps(row))
        return
    lines = ["  ".join(f"{column:>16}" for column in COLUMNS)]
    print(lines[0], flush=True)
    for runs in asked.runs:
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, str(Path(__file__).resolve()), "--child", "--runs", str(runs)]
            command += ["--profile"] if asked.profile else []
            done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        figures = [f"{row[column]:.3g}" if row[column] < 100 else f"{row[column]:.0f}" for column in COLUMNS]
        lines.append("  ".join(f"{figure:>16}" for figure in figures))
        print(lines[-1], flush=True)
    if asked.save:
        path = Path(__file__).parent / "results" / f"{date.today()}-scale.txt"
        new = lines if not path.exists() else lines[1:]
        with path.open("a") as kept:
            kept.write("\n".join(new) + "\n")


if __name__ == "__main__":
    main()
