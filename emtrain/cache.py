"""What is built once and kept: a directory outside the repository, filled atomically."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from filelock import FileLock


def cache_dir() -> Path:
    """``$EMSWEEP_CACHE``, else ``$XDG_CACHE_HOME/emsweep``, else ``~/.cache/emsweep``; it may not exist yet."""
    if root := os.environ.get("EMSWEEP_CACHE"):
        return Path(root).expanduser().absolute()
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root).expanduser().absolute() / "emsweep"
    return Path.home() / ".cache" / "emsweep"


class NotBuilt(Exception):
    """The cache has no such directory, and nothing is to be built now."""


_building = ContextVar("building", default=True)


@contextmanager
def without_building() -> Iterator[None]:
    """Inside the block ``built`` raises ``NotBuilt`` where it would have to build."""
    token = _building.set(False)
    try:
        yield
    finally:
        _building.reset(token)


def built(directory: Path, build: Callable[[Path], None]) -> Path:
    """``directory``, filled by ``build`` unless it exists.

    ``build`` is given an empty directory beside it, which takes its name only when complete: a directory that
    exists is whole, and a build that is cut off leaves nothing that would be taken for one. Processes that ask at
    the same time wait for the first.
    """
    if directory.is_dir():
        return directory
    if not _building.get():
        raise NotBuilt(directory.name)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        if not directory.is_dir():
            unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
            try:
                build(unfinished)
                unfinished.chmod(0o755)  # mkdtemp makes it private
                unfinished.replace(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return directory
