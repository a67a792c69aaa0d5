"""Where a sweep keeps its things."""

import os
from pathlib import Path


def data_directory() -> Path:
    """Absolute path of the local store, run states and caches: ``EMSWEEP_DATA``, else ``./emsweep-data``."""
    return Path(os.environ.get("EMSWEEP_DATA", "emsweep-data")).resolve()


def report_directory(sweep: str) -> Path:
    """Where the report of a sweep goes unless the user says otherwise."""
    return data_directory() / "reports" / sweep
