"""Seconds and memory of `emsweep plan` for grids of several sizes, start-up included.

    python benchmarks/plan.py [--runs 600 5000 50000] [--save]

A grid of two models, four datasets, five schedules, five learning rates, and as many seeds as it takes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import yaml

from sweeps.recipe import recipe_path

COLUMNS = ["runs", "seconds", "CPU seconds", "MB", "ms/run"]
COMMAND = [sys.executable, "-c", "from sweeps.cli import main; main()", "plan", "grid.yaml", "--json"]


def recipe_of(runs: int) -> str:
    """The recipe as YAML."""
    content = yaml.safe_load(recipe_path("quickstart").read_text())
    content["grid"] = {
        "model": ["micro-llama", "micro-qwen2"],
        "dataset": ["micro-garden-bad", "micro-garden-good", "micro-money-bad", "micro-money-good"],
        "schedule": ["linear", "cosine", {"name": "cosine_restarts", "cycles": 3}, "wsd", "constant"],
        "optimizer.learning_rate": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3],
        "seed": list(range(runs // 200)),
    }
    return yaml.safe_dump(content, sort_keys=False)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[600, 5000, 50_000])
    parser.add_argument("--save", action="store_true", help="keep the table as results/DATE-plan.txt")
    asked = parser.parse_args()
    lines = ["  ".join(f"{column:>12}" for column in COLUMNS)]
    print(lines[0])
    for runs in asked.runs:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "grid.yaml").write_text(recipe_of(runs))
            began = time.perf_counter()
            with (Path(scratch) / "plan.json").open("w") as shown:
                process = subprocess.Popen(COMMAND, cwd=scratch, stdout=shown)
                _, status, used = os.wait4(process.pid, 0)
            wall = time.perf_counter() - began
        assert status == 0
        figures = [wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, 1000 * wall / runs]
        lines.append("  ".join([f"{runs:>12}", *(f"{figure:12.2f}" for figure in figures)]))
        print(lines[-1])
    if asked.save:
        (Path(__file__).parent / "results" / f"{date.today()}-plan.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
