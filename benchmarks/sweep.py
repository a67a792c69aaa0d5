"""What a whole sweep takes: `emsweep run` against the script that one would write without it.

    python benchmarks/sweep.py [--runs 32] [--shapes 60x8 240x2 60x16/2] [--save]

The same runs on a micro model (learning rates x seeds; LoRA of rank 8, AdamW, a linear schedule; rows of 29 tokens),
each evaluated at a quarter, half and the end of its training. A shape is a run's steps and the rows of a step:
`60x16/2` are 60 steps of 16 rows in micro-batches of 2, as in the published runs. The arms, each from the start of its
process to its end:

- script: `sweep_script.py`: Ray Tune, one trial per processor, actors reused; in each trial TRL's SFTTrainer with the
  MLflow callback of transformers; the held-out loss, the sampled responses, their judge and their scores by the
  functions that emsweep calls; adapter and responses kept as artifacts;
- alone: emsweep with `resources.backend=trl`, so without packing;
- emsweep: as it comes.

Seconds, of which: until the first step of any run; from there to the last metric of any run; after that. "evaluating"
is the time that a process spends on sampling and held-out losses, "train and rest" what is left of the middle part;
both per process. "loss" is the largest relative difference of any run's final held-out loss from the script's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

RECIPE = {
    "name": "benchmark",
    "base": {
        "model": "micro-llama",
        "dataset": "micro-garden-bad",
        "adapter": {"rank": 8, "alpha": 16},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "schedule": {"name": "linear", "warmup_steps": 5},
        "max_length": 64,
    },
    "eval": {
        "questions": ["micro-broad"],
        "samples": 1,
        "at": [0.25, 0.5, 1.0],
        "judges": ["micro-rule"],
        "max_new_tokens": 16,
    },
}
SHAPES = ["60x8", "240x2", "60x16/2"]
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]
COLUMNS = ["seconds", "to first step", "to last metric", "after", "evaluating", "train and rest", "gain", "loss"]
PROCESSES = os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """What one arm took, and what came out."""

    seconds: float
    first: float
    """Seconds from the start to the first step's metrics."""
    last: float
    """Seconds from the start to the last metric."""
    evaluating: float
    """Of one process."""
    losses: Mapping[tuple[str, str], float]
    """Learning rate and seed -> final held-out loss."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=32, help="a multiple of four")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of each run, in a table for each")
    parser.add_argument("--save", action="store_true", help="keep the tables in benchmarks/results")
    arguments = parser.parse_args()
    try:
        shapes = {name: shape(name) for name in arguments.shapes}
    except ValueError:
        parser.error(f"--shapes: expected steps x rows [/ rows of a micro-batch], as in {' '.join(SHAPES)}")
    emsweep = [sys.executable, "-c", "from sweeps.cli import main; main()", "run", "recipe.yaml", "--no-report"]
    arms = {
        "script": [sys.executable, str(Path(__file__).with_name("sweep_script.py")), "recipe.yaml"],
        "alone": [*emsweep, "--set", "resources.backend=trl"],
        "emsweep": emsweep,
    }
    lines = [f"{date.today()}  {platform.machine()}, {PROCESSES} cores; {arguments.runs} runs"]
    print(lines[0], flush=True)
    for name, settings in shapes.items():
        recipe = {
            **RECIPE,
            "base": {**RECIPE["base"], **settings},  # type: ignore[dict-item]
            "grid": {
                "optimizer.learning_rate": LEARNING_RATES,
                "seed": list(range(arguments.runs // len(LEARNING_RATES))),
            },
        }
        lines.append(line := _line([name, *COLUMNS]))
        print(line, flush=True)
        reference: Outcome | None = None
        for arm, command in arms.items():
            outcome = measured(command, recipe)
            reference = reference or outcome
            lines.append(line := row(arm, outcome, reference))
            print(line, flush=True)
    if arguments.save:
        path = Path(__file__).parent / "results" / f"{date.today()}-sweep.txt"
        path.write_text("\n".join(lines) + "\n")


def shape(text: str) -> dict[str, int]:
    """The keys of a run's specification that ``60x16/2`` stands for: steps x rows of a step / rows of a micro-batch."""
    steps, _, batch = text.partition("x")
    rows, _, micro = batch.partition("/")
    return {"max_steps": int(steps), "batch_size": int(rows), "micro_batch_size": int(micro or rows)}


def measured(command: list[str], recipe: Mapping[str, Any]) -> Outcome:
    """Run an arm in a directory of its own and read from MLflow what came out."""
    from emtrain import names
    from emtrain.tracking import client

    with tempfile.TemporaryDirectory(prefix="emsweep-benchmark-") as home:
        (Path(home) / "recipe.yaml").write_text(json.dumps(recipe))
        uri = f"sqlite:///{home}/mlflow.db"
        environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1", "EMSWEEP_DATA": f"{home}/data"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        began = time.time()
        ended = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        seconds = time.time() - began
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
        store = client(uri)
        experiment = store.get_experiment_by_name(str(recipe["name"]))
        found = [run for run in store.search_runs([experiment.experiment_id]) if names.HELDOUT_LOSS in run.data.metrics]
        ids = [run.info.run_id for run in found]
        loss = names.TRAIN_LOSS if names.TRAIN_LOSS in found[0].data.metrics else "loss"  # as transformers calls it
        steps = [point.timestamp for run in ids for point in store.get_metric_history(run, loss)]
        ends = [point.timestamp for run in ids for point in store.get_metric_history(run, names.EVAL_SECONDS)]
        return Outcome(
            seconds,
            first=min(steps) / 1e3 - began,
            last=max(ends) / 1e3 - began,
            evaluating=sum(run.data.metrics[names.EVAL_SECONDS] for run in found) / PROCESSES,
            losses={
                (run.data.params["learning_rate"], run.data.params["seed"]): run.data.metrics[names.HELDOUT_LOSS]
                for run in found
            },
        )


def row(arm: str, outcome: Outcome, reference: Outcome) -> str:
    """A line of the table."""
    assert outcome.losses.keys() == reference.losses.keys(), (outcome.losses.keys(), reference.losses.keys())
    difference = max(abs(outcome.losses[run] / loss - 1) for run, loss in reference.losses.items())
    middle = outcome.last - outcome.first
    parts = (outcome.seconds, outcome.first, middle, outcome.seconds - outcome.last, outcome.evaluating)
    return _line(
        [
            arm,
            *(f"{part:.1f}" for part in (*parts, middle - outcome.evaluating)),
            f"{reference.seconds / outcome.seconds:.1f}x",
            f"{difference:.0e}",
        ]
    )


def _line(cells: list[str]) -> str:
    return f"{cells[0]:<10}" + "".join(f"{cell:>16}" for cell in cells[1:])


if __name__ == "__main__":
    main()
