"""The Ray that a sweep runs on: one that is there, or one of this process's own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Before Ray is started. Its defaults report usage, print tables of their own, turn token authentication on for a
# cluster of one, and move every trial into a directory where the user's relative paths lead nowhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# A sweep goes on from MLflow, never from Tune's snapshots, which take up to a twentieth of the time.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray

OBJECT_STORE_BYTES = 150 * 2**20
"""Runs exchange next to nothing; Ray's default would claim a third of the machine's memory."""


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Join the Ray at ``address`` for the block; None starts one of this process's own, which ends with the block."""
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        # Keeps a Ray of one machine on the loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
