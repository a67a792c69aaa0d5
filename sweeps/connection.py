"""The Ray that a sweep runs on: one that is there, or one of this process's own."""

import logging
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Self
from unittest import mock

# Before Ray is imported. Its defaults report usage, print tables of their own, turn token authentication on for a
# cluster of one, and move every trial into a directory where the user's relative paths lead nowhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# A sweep goes on from MLflow, never from Tune's snapshots, which take up to a twentieth of the time.
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

OBJECT_STORE_BYTES = 150 * 2**20
"""Runs exchange next to nothing; Ray's default would claim a third of the machine's memory."""
NEEDLESS = ("start_monitor", "start_log_monitor", "start_api_server")
"""What Ray starts for clusters that grow, for logs that are followed and for a web page: together 2 processor seconds,
280 MB, and a second until they have ended."""
QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


class Connection:
    """The way to the Ray at ``address``; None: to one of this process's own, which ends with the block.

    A Ray of one's own is started at once, by a process beside this one. It takes 3 to 4 s, most of them waiting, and as
    long takes what a sweep has to do before it needs Ray (importing MLflow, opening its store); Ray can't be started by
    a thread, because it forks, and a fork while another thread imports may hang. The other process holds that Ray until
    this one closes its end of a pipe, or is no more.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._holder: subprocess.Popen[str] | None = None
        self._opened = False

    @property
    def own(self) -> bool:
        """Whether nobody else is on it."""
        return self._holder is not None

    def __enter__(self) -> Self:
        if self.address is None:
            self._holder = subprocess.Popen(
                [sys.executable, "-P", "-m", "sweeps.connection"],
                # Keeps it on the loopback interface.
                env=os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it may end later, and a reader of this process's would wait for that
                text=True,
                start_new_session=True,  # so that Ctrl-C is this process's own business
            )
        return self

    def open(self) -> None:
        """Join it. Raises ``OSError`` when a Ray of one's own could not be started."""
        import ray
        from ray._private import ray_constants

        if self._holder is not None:
            assert self._holder.stdout is not None
            started, _, self.address = self._holder.stdout.readline().strip().partition(" ")
            if started != STARTED:
                raise OSError(f"Ray could not be started on this machine: {self.address or 'its process ended'}")
        self._opened = True
        # Else Ray would look for what is on the loopback interface on another.
        with mock.patch.object(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER and not self.own):
            ray.init(address=self.address, **QUIET)

    def close(self) -> None:
        """Leave it. One's own begins to end."""
        if self._opened:
            import ray

            ray.shutdown()
        if self._holder is not None and self._holder.stdin is not None:
            self._holder.stdin.close()

    def wait(self) -> None:
        """Until a Ray of one's own, which was left, is gone with all that ran there."""
        if self._holder is not None:
            self._holder.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._opened:  # else it was not needed after all, and is not waited for
            self.wait()


STARTED, FAILED = "started", "failed"
GONE_SECONDS = 10.0
"""How long a Ray that was ended may take to be gone; 0.4 s on an idle machine."""


def _hold() -> None:
    """Start a Ray, say where it is, and end it when standard input ends."""
    # Ray's processes may inherit the standard output. Whoever waits at the other end of this one reads one line.
    told = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import psutil
    import ray
    from ray._private.node import Node

    def say(*words: str) -> None:
        with suppress(BrokenPipeError):  # whoever it was for has ended
            os.write(told, f"{' '.join(words)}\n".encode())

    try:
        with ExitStack() as spared:
            for start in NEEDLESS:
                spared.enter_context(mock.patch.object(Node, start))
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **QUIET)
    except Exception as error:
        from emtrain.mistakes import gist

        say(FAILED, gist(error))
        return
    say(STARTED, ray.get_runtime_context().gcs_address)
    sys.stdin.read()
    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    psutil.wait_procs(processes, timeout=GONE_SECONDS)


if __name__ == "__main__":
    _hold()
