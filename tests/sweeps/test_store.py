"""Where a sweep keeps its things, and who may work on it."""

import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.store import alone, data_directory, report_directory


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EMSWEEP_DATA", raising=False)


def test_data_is_kept_in_the_working_directory_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_directory() == tmp_path / "emsweep-data"
    assert report_directory("study") == tmp_path / "emsweep-data" / "reports" / "study"
    monkeypatch.setenv("EMSWEEP_DATA", "elsewhere")
    assert data_directory() == tmp_path / "elsewhere"
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_run_by_one_process_at_a_time() -> None:
    code = "from sweeps.store import alone\nwith alone('study'): print('has it')"
    with alone("study"), alone("another"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert second.stdout == ""
        assert "another emsweep is running the sweep 'study'" in second.stderr
    third = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert third.stdout == "has it\n"


def test_a_process_that_was_killed_holds_nothing_up() -> None:
    code = (
        "import os, signal\nfrom sweeps.store import alone\nwith alone('study'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with alone("study"):
        pass


def test_a_sweep_that_failed_can_be_run_again() -> None:
    with pytest.raises(RuntimeError, match="no memory"), alone("study"):
        raise RuntimeError("no memory")
    with alone("study"):
        pass
