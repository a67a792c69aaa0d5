"""Which engine trains which run. One small Ray actor for a sweep, asked by every trial."""

import time
from collections.abc import Mapping
from typing import Any

from sweeps.lease import Job

SHUNNED_SECONDS = 60.0
"""For so long an engine that died gets no run while others are there; Ray needs as long to start it on another node."""


class Fleet:
    """Leases the slots of ``engines`` (Ray's handles by name), each with ``capacity`` of them."""

    def __init__(self, engines: Mapping[str, Any], *, capacity: int) -> None:
        self.engines, self.capacity = engines, capacity
        self.leases: dict[str, tuple[str, Job]] = {}
        """Run key -> engine and job."""
        self.died: dict[str, float] = {}
        """Engine -> when it was last seen dead."""

    def lease(self, job: Job, *, died: str | None = None) -> tuple[str, Any]:
        """Name and handle of the engine that is to train ``job``: alive, with its base and a free slot, if there is one.

        ``died`` is the engine that had it before and does not answer.
        """
        if died is not None:
            self.died[died] = time.monotonic()
        self.leases.pop(job.run.run_key, None)
        chosen = min(self.engines, key=lambda engine: self._cost(engine, job))
        self.leases[job.run.run_key] = chosen, job
        return chosen, self.engines[chosen]

    def _cost(self, engine: str, job: Job) -> tuple[bool, bool, bool, int]:
        jobs = [other for name, other in self.leases.values() if name == engine]
        shunned = time.monotonic() - self.died.get(engine, -SHUNNED_SECONDS) < SHUNNED_SECONDS
        return shunned, len(jobs) >= self.capacity, any(other.base != job.base for other in jobs), len(jobs)

    def release(self, run_key: str, *, drop: bool) -> None:
        """The trial of a run is over; with ``drop`` the run is to be trained no further."""
        engine, _ = self.leases.pop(run_key, (None, None))
        if drop and engine is not None:
            self.engines[engine].drop.remote(run_key)
