"""Which engine trains which run."""

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from sweeps.lease import Job
from sweeps.throughput import Work

ANSWER_SECONDS = 20.0


class Fleet:
    """Leases the slots of ``engines`` (Ray's handles by name), each with ``capacity`` of them.

    Only an engine that answers has slots to give: one that waits for a machine, or for a new one after the loss of
    its own, gets its first run when it is there. Trials ask from threads of their own.
    """

    def __init__(self, engines: Mapping[str, Any], *, capacity: int) -> None:
        self.engines, self.capacity = engines, capacity
        self.lock = threading.Lock()
        self.leases: dict[str, tuple[str, Job]] = {}
        """Run key -> engine and job."""
        self.calls = {engine: self._call(engine) for engine in engines}
        """Engines that have not answered yet -> a call to them."""

    def lease(self, job: Job, *, died: str | None = None) -> tuple[str, Any] | None:
        """Name and handle of the engine that is to train ``job``, one with its base where there is a choice.

        None while no engine has a free slot. ``died`` is the engine that had the job before and does not answer.
        """
        with self.lock:
            if died is not None:
                self.calls[died] = self._call(died)
            self.leases.pop(job.run.run_key, None)
            free = [name for name in self.engines if len(self._on(name)) < self.capacity and self._answers(name)]
            if not free:
                return None
            chosen = min(free, key=lambda engine: self._cost(engine, job))
            self.leases[job.run.run_key] = chosen, job
            return chosen, self.engines[chosen]

    def _on(self, engine: str) -> list[Job]:
        return [job for name, job in self.leases.values() if name == engine]

    def _cost(self, engine: str, job: Job) -> tuple[bool, int]:
        return any(other.base != job.base for other in self._on(engine)), len(self._on(engine))

    def _call(self, engine: str) -> Any:
        return self.engines[engine].__ray_ready__.remote()

    def _answers(self, engine: str) -> bool:
        call = self.calls.get(engine)
        if call is None:
            return True
        if not ray.wait([call], timeout=0)[0]:
            return False
        try:
            ray.get(call)
        except RayError:  # the call came while it died
            self.calls[engine] = self._call(engine)
            return False
        del self.calls[engine]
        return True

    def worked(self) -> list[dict[str, Work]]:
        """What each engine has done, by model; of one that died anew, since then."""
        return list(ray.get([engine.worked.remote() for engine in self.engines.values()], timeout=ANSWER_SECONDS))

    def release(self, run_key: str, *, drop: bool) -> None:
        """The trial of a run is over; with ``drop`` the run is to be trained no further."""
        with self.lock:
            engine, _ = self.leases.pop(run_key, (None, None))
        if drop and engine is not None:
            self.engines[engine].drop.remote(run_key)
