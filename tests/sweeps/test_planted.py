"""A better minimum that is really there is found by a whole sweep, and by its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SMALLER = ["--set", "grid.seed=[0, 1, 2]", "--set", "analysis.margin=10"]
NULL = ["--set", "name=luck", "--set", "grid={seed: [3, 4, 5, 6, 7]}"]


def emsweep(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in {"MLFLOW_TRACKING_URI", "EMSWEEP_DATA"}}
    command = [sys.executable, "-c", "from sweeps.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def test_a_planted_better_minimum_is_found_by_seeds_and_by_a_null_sweep(tmp_path: Path) -> None:
    """Three seeds of each configuration, then one of each held against a null sweep of five seeds."""
    ran = emsweep(tmp_path, "run", "planted", *SMALLER)
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "emsweep-data/reports/planted/report.json").read_text())["better_minima"]
    assert found["verdict"] == {"outcome": "found", "margin": 10, "null_sweep": None} | found["verdict"]
    (verdict,) = found["verdicts"]
    assert verdict["better"] == "interleaved with micro-money-good, fraction 0.5"
    assert verdict["worse"] == "plain"

    single = ["--set", "name=single", "--set", "grid.seed=[0]", "--set", "analysis.null_sweep=luck"]
    missing = emsweep(tmp_path, "run", "planted", *single)
    assert missing.returncode == 2
    assert "there is no sweep 'luck'" in missing.stderr
    for arguments in (NULL, single):
        ran = emsweep(tmp_path, "run", "planted", *arguments)
        assert ran.returncode == 0, ran.stderr
    told = emsweep(tmp_path, "report", "single", "--margin", "7", "--json")
    better = json.loads(told.stdout)["better_minima"]
    assert {key: better["verdict"][key] for key in ("outcome", "margin", "null_sweep")} == {
        "outcome": "found",
        "margin": 7,
        "null_sweep": "luck",
    }
    assert any(note.startswith("The null sweep is luck: 5 seeds of one configuration") for note in better["notes"])
