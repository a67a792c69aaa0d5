"""Where the wall time of a sweep goes, and how much of it is neither training nor sampling.

    python benchmarks/overhead.py [--recipe quickstart] [--save]

`emsweep run`, from the start of its process to its end, models built beforehand. Training and sampling (held-out losses
included) are what the engines count, a mean over them. The rest is told apart by when MLflow got its first and its last
metric: what comes before (imports, planning, Ray, loading the model), what comes after (the end of Tune and Ray, the
report), and what lies between: engines that wait for judges, for Tune, or for the last run on another engine.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    seconds, runs = measured(arguments.recipe)
    wall = sum(seconds.values())
    lines = [
        f"{date.today()}  {platform.machine()}, {os.cpu_count()} cores; {arguments.recipe}, {runs} runs",
        f"{'part':<24}{'seconds':>10}{'share':>10}",
        *(f"{part:<24}{spent:>10.1f}{spent / wall:>10.1%}" for part, spent in seconds.items()),
    ]
    machinery = wall - seconds["training"] - seconds["sampling"]
    lines += [f"{'all':<24}{wall:>10.1f}", f"{'neither':<24}{machinery:>10.1f}{machinery / wall:>10.1%}"]
    print("\n".join(lines))
    if arguments.save:
        path = Path(__file__).parent / "results" / f"{date.today()}-overhead.txt"
        path.write_text("\n".join(lines) + "\n")


def measured(recipe: str) -> tuple[dict[str, float], int]:
    """Seconds by part, in the order of the table, and how many runs there were. Raises ``CalledProcessError``."""
    from emtrain import names
    from emtrain.tracking import SweepLog, client
    from sweeps.recipe import load_recipe, recipe_path

    name = load_recipe(recipe_path(recipe).read_text(), source=recipe).name
    with tempfile.TemporaryDirectory(prefix="emsweep-benchmark-") as data:
        environment = {**os.environ, "EMSWEEP_DATA": data, "OMP_NUM_THREADS": "1"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        command = [sys.executable, "-c", "from sweeps.cli import main; main()", "run", recipe]
        began = time.time()
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)
        wall = time.time() - began
        uri = f"sqlite:///{data}/mlflow.db"
        store, sweep = client(uri), SweepLog.find(name, uri=uri)
        worked: list[dict[str, dict[str, Any]]] = json.loads(
            Path(store.download_artifacts(sweep.parent_run_id, names.WORK, data)).read_text()
        )
        runs = [run.info.run_id for run in sweep.runs().values()]
        stamps = [
            point.timestamp / 1e3 - began
            for metric in (names.HELDOUT_LOSS, names.TRAIN_LOSS, names.EVAL_SECONDS)
            for run in runs
            for point in store.get_metric_history(run, metric)
        ]
        training, sampling = (
            sum(work[kind] for works in worked for work in works.values()) / len(worked)
            for kind in ("training_seconds", "sampling_seconds")
        )
    before, after = min(stamps), wall - max(stamps)
    between = wall - before - training - sampling - after
    parts = {"before the first metric": before, "training": training, "sampling": sampling}
    return {**parts, "waiting in between": between, "after the last metric": after}, len(runs)


if __name__ == "__main__":
    main()
