"""The learning rates of published runs, which other people's code logged, come out of our schedules.

The runs are those of arXiv 2606.20814: transformers' cosine schedules and torch's CyclicLR on a 32B model. Their tables
are read from the folder ``EMSWEEP_PUBLISHED_RUNS``, by default ``published_runs`` in a ``shared`` folder beside this
repository.
"""

import ast
import csv
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from emtrain.schedule import build, trace
from emtrain.spec import ScheduleSpec

FOLDER = Path(os.environ.get("EMSWEEP_PUBLISHED_RUNS", Path(__file__).parents[3] / "shared" / "published_runs"))

pytestmark = pytest.mark.skipif(
    not any(FOLDER.glob("run_table_*.csv")),
    reason=f"no run_table_*.csv in {FOLDER}; EMSWEEP_PUBLISHED_RUNS names the folder of published runs",
)

# The published code cycles 4 times in all of them, and its gamma is torch's, per step.
COSINE: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("cosine", {}),
    "cosine_with_restarts": ("cosine_restarts", {"cycles": 4}),
}
CYCLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "triangular": ("cyclic_triangular", {"cycles": 4}),
    "triangular2": ("cyclic_triangular2", {"cycles": 4}),
    "exp_range": ("cyclic_exp_range_per_step", {"cycles": 4, "gamma": 0.95}),
}
NUMBER = r"([\d.]+(?:e-?\d+)?)"


def schedule_of(run: str) -> tuple[ScheduleSpec, float]:
    """The schedule that a published run's name describes, and its peak learning rate."""
    if match := re.search(rf"_(cosine|cosine_with_restarts)_(\d+)_{NUMBER}(?:_|$)", run):
        name, arguments = COSINE[match[1]]
        return ScheduleSpec(name=name, warmup_steps=int(match[2]), **arguments), float(match[3])
    if match := re.search(rf"_mode-([a-z0-9_]+)_base_lr-{NUMBER}_max_lr-{NUMBER}(?:_|$)", run):
        name, arguments = CYCLIC[match[1]]
        lowest, peak = float(match[2]), float(match[3])
        return ScheduleSpec(name=name, min_ratio=lowest / peak, **arguments), peak
    raise ValueError(f"the name of run {run!r} describes no schedule")


@pytest.fixture(scope="module")
def logged() -> dict[str, list[float]]:
    """The learning rate of every update, by run."""
    csv.field_size_limit(sys.maxsize)
    runs: dict[str, list[float]] = {}
    for table in FOLDER.glob("run_table_*.csv"):
        with table.open(newline="") as file:
            for row in csv.DictReader(file):
                history: list[dict[str, Any]] = ast.literal_eval(row["log_history"])
                updates = [entry for entry in history if "learning_rate" in entry]
                # The trainer counts updates from 1; none may be missing, or an off-by-one could hide.
                assert [entry["step"] for entry in updates] == list(range(1, len(updates) + 1))
                runs[row["run"]] = [entry["learning_rate"] for entry in updates]
    return runs


def test_every_learning_rate_of_every_published_run_is_reproduced(logged: dict[str, list[float]]) -> None:
    """To 1e-9 of each value (they are logged as full floats), and exactly where it is 0."""
    assert len(logged) >= 35
    for run, learning_rates in logged.items():
        spec, peak = schedule_of(run)
        multipliers = trace(build(spec, len(learning_rates)), len(learning_rates))
        assert [peak * multiplier for multiplier in multipliers] == pytest.approx(learning_rates, rel=1e-9, abs=0), run


def test_the_published_exp_range_decays_per_step_and_not_per_cycle(logged: dict[str, list[float]]) -> None:
    """Read per cycle, the same gamma would have had a fourth peak at 0.95**3; theirs had come to rest by step 100."""
    exp_range = {run: learning_rates for run, learning_rates in logged.items() if "mode-exp_range" in run}
    assert exp_range
    for run, learning_rates in exp_range.items():
        per_step, peak = schedule_of(run)
        per_cycle = per_step.model_copy(update={"name": "cyclic_exp_range"})
        lowest = per_step.arguments["min_ratio"] * peak
        fourth_peak = 7 * (len(learning_rates) // 8)
        assert peak * build(per_cycle, len(learning_rates))(fourth_peak) > 0.85 * peak
        assert max(learning_rates[100:]) < lowest + 0.01 * (peak - lowest)
