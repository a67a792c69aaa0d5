"""A better minimum that is really there is found by whole sweeps and their report, one that is not there is not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def emsweep(home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k not in {"MLFLOW_TRACKING_URI", "EMSWEEP_DATA"}}
    command = [sys.executable, "-c", "from sweeps.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)


def better_minima(home: Path, *arguments: str) -> dict[str, Any]:
    reported = emsweep(home, "report", *arguments, "--json")
    assert reported.returncode == 0, reported.stderr
    found: dict[str, Any] = json.loads(reported.stdout)["better_minima"]
    return found


def test_one_seed_and_a_null_sweep_find_what_is_planted_and_nothing_else(tmp_path: Path) -> None:
    """One run of each configuration of ``planted`` against five seeds of its first one, as its recipe states."""
    planted = ["run", "planted", "--set", "grid.seed=[0]", "--set", "analysis={null_sweep: luck, margin: 10}"]
    missing = emsweep(tmp_path, *planted)
    assert missing.returncode == 2
    assert "there is no sweep 'luck'" in missing.stderr
    for arguments in (["run", "planted", "--set", "name=luck", "--set", "grid={seed: [1, 2, 3, 4, 5]}"], planted):
        ran = emsweep(tmp_path, *arguments, "--no-report")
        assert ran.returncode == 0, ran.stderr

    found = better_minima(tmp_path, "planted")
    stated = {key: found["verdict"][key] for key in ("outcome", "margin", "null_sweep")}
    assert stated == {"outcome": "found", "margin": 10, "null_sweep": "luck"}
    (verdict,) = found["verdicts"]
    assert verdict["better"] == "interleaved with micro-money-good, fraction 0.5"
    assert verdict["worse"] == "plain"
    assert any(note.startswith("The null sweep is luck: 5 seeds of one configuration") for note in found["notes"])
    assert better_minima(tmp_path, "planted", "--margin", "7")["verdict"]["margin"] == 7
    assert "5 seeds of one configuration (a null sweep)" in better_minima(tmp_path, "luck")["reason"]
