"""Which engine trains which run."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from sweeps.lease import Job
from sweeps.throughput import Work

ANSWER_SECONDS = 20.0
AWAITED_SECONDS = 30.0
"""How long the runs that others could only queue are kept for an engine that does not answer. Where there is a machine
an engine takes 2 to 10 s to start."""


class Fleet:
    """Leases out ``engines`` (Ray's handles by name), each of which trains ``slots`` runs at once.

    Only an engine that answers gets runs: one that waits for a machine, or for a new one after the loss of its own,
    gets its first when it is there. The others have as many as they can train; twice as many, so that some train while
    others are being judged, once no engine is awaited that might train those. When the last runs are leased and an
    engine runs out of them, another one gives up what it has only queued. Trials ask from threads of their own.
    """

    def __init__(self, engines: Mapping[str, Any], *, slots: int) -> None:
        self.engines, self.slots = engines, slots
        self.lock = threading.Lock()
        self.leases: dict[str, tuple[str, Job]] = {}
        """Run key -> engine and job."""
        now = time.monotonic()
        self.calls = {engine: (self._call(engine), now) for engine in engines}
        """Engines that have not answered yet -> a call to them, and since when they are awaited."""
        self.asked: Any = None
        """The last call to an engine to give up runs; None where there was none."""

    def lease(
        self, job: Job, *, held: str | None = None, died: str | None = None, given_up: bool = False
    ) -> tuple[str, Any] | None:
        """Name and handle of the engine that is to train ``job``: the one that does already; else one with its base
        where there is a choice, and the fewest runs.

        None while no engine has room. ``held`` is the engine that still has the run in memory, which is preferred
        unless another one has two runs less; ``died`` one that had the job before and does not answer; ``given_up``
        says that its engine has given it up.
        """
        with self.lock:
            if died is not None:
                self.calls[died] = self._call(died), time.monotonic()
            if died is not None or given_up:
                self.leases.pop(job.run.run_key, None)
            if job.run.run_key not in self.leases:
                answering = [engine for engine in self.engines if self._answers(engine)]
                room = self.slots if self._awaits() else 2 * self.slots
                free = [engine for engine in answering if len(self._on(engine)) < room]
                if not free:
                    return None
                self.leases[job.run.run_key] = min(free, key=lambda engine: self._cost(engine, job, held)), job
            chosen, _ = self.leases[job.run.run_key]
            return chosen, self.engines[chosen]

    def _on(self, engine: str) -> list[Job]:
        return [job for name, job in self.leases.values() if name == engine]

    def _cost(self, engine: str, job: Job, held: str | None) -> tuple[bool, int, bool]:
        on, here = self._on(engine), engine == held
        return any(other.base != job.base for other in on), len(on) - here, not here

    def _awaits(self) -> bool:
        return any(time.monotonic() - since < AWAITED_SECONDS for _, since in self.calls.values())

    def _call(self, engine: str) -> Any:
        return self.engines[engine].__ray_ready__.remote()

    def _answers(self, engine: str) -> bool:
        if engine not in self.calls:
            return True
        call, since = self.calls[engine]
        if not ray.wait([call], timeout=0)[0]:
            return False
        try:
            ray.get(call)
        except RayError:  # the call came while it died
            self.calls[engine] = self._call(engine), since
            return False
        del self.calls[engine]
        return True

    def worked(self) -> list[dict[str, Work]]:
        """What each engine has done, by model; of one that died anew, since then."""
        return list(ray.get([engine.worked.remote() for engine in self.engines.values()], timeout=ANSWER_SECONDS))

    def release(self, run_key: str) -> None:
        """A run is over, or waits for others: its place is free."""
        with self.lock:
            self.leases.pop(run_key, None)
            if self.asked is None or ray.wait([self.asked], timeout=0)[0]:
                self.asked = self._even_out()

    def _even_out(self) -> Any:
        """Ask an engine with more runs than slots to give up as many as the one with the fewest has slots for.

        Returns the call; None where there is no need for one.
        """
        ordered = sorted(filter(self._answers, self.engines), key=lambda engine: len(self._on(engine)))
        for busy in reversed(ordered[1:]):
            many = min(self.slots - len(self._on(ordered[0])), len(self._on(busy)) - self.slots)
            better_off = [
                run_key
                for run_key, (engine, job) in self.leases.items()
                if engine == busy and self._cost(ordered[0], job, None) < self._cost(busy, job, None)
            ]
            if many > 0 and better_off:
                return self.engines[busy].give_up.remote(better_off, most=many)
        return None
