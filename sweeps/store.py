"""Where a sweep keeps its things."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def data_directory() -> Path:
    """Absolute path of the local store, run states and caches: ``EMSWEEP_DATA``, else ``./emsweep-data``."""
    return Path(os.environ.get("EMSWEEP_DATA", "emsweep-data")).resolve()


@contextmanager
def alone(sweep: str) -> Iterator[None]:
    """The right to run a sweep, which two processes at the same data directory can't have at the same time.

    Raises ``ValueError`` when another one has it.
    """
    locks = data_directory() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{sweep}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another emsweep is running the sweep {sweep!r} in {data_directory()}; wait until it is done or stop it"
        ) from None
    try:
        yield
    finally:
        lock.release()


def report_directory(sweep: str) -> Path:
    """Where the report of a sweep goes unless the user says otherwise."""
    return data_directory() / "reports" / sweep
