"""Sweeps under faults, each with real processes: whatever dies, every run is there once, finished and whole."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pytest

if TYPE_CHECKING:
    from conftest import Sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

ALONE = ("--set", "resources.backend=trl")
"""Runs that share no forward pass are the same to the last bit, whoever trains beside them."""


@pytest.fixture(scope="module")
def undisturbed(make_sweep: Callable[[], "Sweep"]) -> dict[str, Any]:
    """The numbers of the sweep when nothing happens."""
    sweep = make_sweep()
    stdout, stderr = sweep.start("--no-report", *ALONE).communicate(timeout=600)
    assert "4 of 4 runs finished" in stdout, stderr
    return sweep.numbers()


def goes_on(sweep: "Sweep", *arguments: str) -> str:
    """The same command again ends with every run finished; returns what it says."""
    process = sweep.start("--no-report", *arguments)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "4 of 4 runs finished" in stdout
    return str(stdout)


@pytest.mark.parametrize("victim", ["the driver", "ray::TrialHost"])
def test_what_is_killed_goes_on_with_the_same_numbers_to_the_last_bit(
    victim: str, make_sweep: Callable[[], "Sweep"], undisturbed: dict[str, Any]
) -> None:
    sweep = make_sweep()
    process = sweep.start("--no-report", *ALONE)
    sweep.wait_for_a_state()
    for pid in [process.pid] if victim == "the driver" else sweep.processes(victim):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    goes_on(sweep, *ALONE)
    sweep.check_whole()
    assert sweep.numbers() == undisturbed


def test_a_search_whose_process_of_trials_is_killed_loses_none_of_its_trials(
    make_sweep: Callable[[], "Sweep"],
) -> None:
    """It is over at once, with nothing failed, and the study's open trials are those that are taken up."""
    sweep = make_sweep()
    sweep.vary("grid:\n  optimizer.learning_rate: [3.0e-4, 1.0e-3]\n  seed: [0, 1]", SEARCH)
    process = sweep.start("--no-report")
    sweep.wait_for_a_state()
    for pid in sweep.processes("ray::TrialHost"):
        os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 1, stdout
    assert "the process of the trials died" in stderr
    assert "the same command goes on" in stderr
    assert {run.info.status for run in sweep.runs().values()} <= {"FINISHED", "KILLED"}
    assert set(trials(sweep)) <= {"COMPLETE", "RUNNING"}
    goes_on(sweep)
    assert trials(sweep) == ["COMPLETE"] * 4
    sweep.check_whole()
    stdout = goes_on(sweep)
    assert "then a search of 4 trials, of which 4 runs are over" in stdout


SEARCH = """search:
  trials: 4
  space: {optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}
  objectives: {heldout/loss: minimize}
resources: {max_concurrent: 1}"""


def trials(sweep: "Sweep") -> list[str]:
    """The states of the trials of the search."""
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{sweep.data / 'optuna.db'}")
    return [trial.state.name for trial in study.trials]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, which the store of MLflow half fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_told_and_the_sweep_goes_on_when_there_is_room(
    make_sweep: Callable[[], "Sweep"], small_disk: Path
) -> None:
    sweep = make_sweep()
    sweep.home, sweep.uri = small_disk, f"sqlite:///{small_disk}/emsweep-data/mlflow.db"
    process = sweep.start("--no-report")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 1, stdout
    assert "Traceback" not in stderr
    assert any(word in stdout + stderr for word in ("No space left", "disk is full"))
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    goes_on(sweep)
    sweep.check_whole()
