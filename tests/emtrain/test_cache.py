"""What is in the cache is whole, and is built once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emtrain.cache import built, cache_dir


def test_the_place_is_the_users_to_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("EMSWEEP_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "emsweep"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "emsweep"
    monkeypatch.setenv("EMSWEEP_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "mine"


def test_a_directory_is_built_the_first_time_only(tmp_path: Path) -> None:
    def build(directory: Path) -> None:
        calls.append(directory)
        (directory / "file").write_text("whole")

    calls: list[Path] = []
    for _ in range(2):
        directory = built(tmp_path / "models" / "one", build)
        assert (directory / "file").read_text() == "whole"
    assert len(calls) == 1
    assert directory == tmp_path / "models" / "one"


def test_a_build_that_fails_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        built(tmp_path / "one", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert built(tmp_path / "one", lambda directory: (directory / "whole").touch()).is_dir()


def test_a_build_that_is_killed_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from emtrain.cache import built
def build(directory):
    (directory / "half").touch()
    os._exit(9)
built(Path(sys.argv[1]), build)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "one")], check=False)
    assert not (tmp_path / "one").exists()
    directory = built(tmp_path / "one", lambda unfinished: (unfinished / "whole").touch())
    assert [path.name for path in directory.iterdir()] == ["whole"]


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    program = """
import os, sys, time
from pathlib import Path
from emtrain.cache import built
def build(directory):
    time.sleep(0.3)
    (directory / str(os.getpid())).touch()
print(len(list(built(Path(sys.argv[1]), build).iterdir())))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "one")]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in asking] == ["1", "1", "1"]
    assert len(list((tmp_path / "one").iterdir())) == 1


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX ones")
def test_others_may_read_what_is_built(tmp_path: Path) -> None:
    assert built(tmp_path / "one", lambda directory: None).stat().st_mode & 0o777 == 0o755
