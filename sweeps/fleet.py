"""Which engine trains which run."""

import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from sweeps.lease import Job
from sweeps.throughput import Work

ANSWER_SECONDS = 20.0
AWAITED_SECONDS = 30.0
"""How long the runs that others could only queue are kept for an engine that does not answer. Where there is a machine
an engine takes 2 to 10 s to start."""
LACKING_SECONDS = 300.0
"""How long an engine gets no runs on a base that could not be had where it is: it may have been the hub that was away
for a moment."""
ABSENT_SECONDS = 1800.0
"""How long runs whose base can't be had where any other engine is wait for one that does not answer. Ray starts one
that died within seconds, a cloud a machine within minutes; or it never finds one."""


class Fleet:
    """Leases out ``engines`` (Ray's handles by name), each of which trains ``slots`` runs at once.

    ``slots`` 0: that is not known yet, and nothing is leased before ``open`` tells.

    Only an engine that answers gets runs: one that waits for a machine, or for a new one after the loss of its own,
    gets its first when it is there, and one that was away when it has dropped what others took over. The others have as
    many as they can train; twice as many, so that some train while others are being judged, once no engine is awaited
    that might train those. When an engine runs out of runs, the others give up what waits there for a slot. Trials ask
    from threads of their own.
    """

    def __init__(self, engines: Mapping[str, Any], *, slots: int) -> None:
        self.engines, self.slots = engines, slots
        self.lock = threading.Lock()
        self.leases: dict[str, tuple[str, Job]] = {}
        """Run key -> engine and job."""
        now = time.monotonic()
        self.orphans: dict[str, set[str]] = {}
        """Engines that did not answer any more -> keys of the runs that they had. One may be alive, and train them."""
        self.calls = {engine: (self._call(engine), now) for engine in engines}
        """Engines that have not answered yet -> calls to them, and since when they are awaited."""
        self.lacking: dict[tuple[str, tuple[str, str]], float] = {}
        """Engine, and base that could not be had where it is -> when that was."""
        self.asked: list[Any] = []
        """The last calls to engines to give up runs."""

    def open(self, slots: int) -> None:
        """Begin to lease out the engines; those that do not answer yet are awaited from now on."""
        with self.lock:
            self.slots, now = slots, time.monotonic()
            self.calls = {engine: (calls, now) for engine, (calls, _) in self.calls.items()}

    def lease(self, job: Job, *, held: str | None = None) -> tuple[str, Any] | None:
        """Name and handle of the engine that is to train ``job``: the one that does already; else one with its base
        where there is a choice, and the fewest runs.

        None while no engine has room. ``held`` is the engine that still has the run in memory, which is preferred
        unless another one has two runs less. One that lacks the base gets it only where all do; until that is known
        the run waits.
        """
        with self.lock:
            if job.run.run_key not in self.leases:
                answering = set(filter(self._answers, self.engines))
                room = self.slots if self._awaits() else 2 * self.slots
                able = self._able(job) or self.engines
                free = [engine for engine in able if engine in answering and len(self._on(engine)) < room]
                if not free:
                    return None
                self.leases[job.run.run_key] = min(free, key=lambda engine: self._cost(engine, job, held)), job
            chosen, _ = self.leases[job.run.run_key]
            self._even_out()
            return chosen, self.engines[chosen]

    def returned(self, job: Job, *, died: bool = False) -> None:
        """The engine of ``job`` trains it no further: it has given it up, or does not answer any more (``died``)."""
        with self.lock:
            engine, _ = self.leases.pop(job.run.run_key)
            if died:
                self.orphans.setdefault(engine, set()).add(job.run.run_key)
                self.calls[engine] = self._call(engine), time.monotonic()
                self.lacking = {key: since for key, since in self.lacking.items() if key[0] != engine}

    def lacks(self, engine: str, job: Job, *, tried: Collection[str]) -> bool:
        """The base of ``job`` can't be had where ``engine`` is; returns whether one may have it that was not ``tried``
        with this job."""
        with self.lock:
            self.lacking[engine, job.base] = time.monotonic()
            return any(other not in tried for other in self._able(job))

    def _able(self, job: Job) -> list[str]:
        """The engines that may have the base of ``job``, now or once they are there."""
        return [
            engine for engine in self.engines if not self._lacks(engine, job) and self._away(engine) < ABSENT_SECONDS
        ]

    def _lacks(self, engine: str, job: Job) -> bool:
        since = self.lacking.get((engine, job.base))
        return since is not None and time.monotonic() - since < LACKING_SECONDS

    def _on(self, engine: str) -> list[Job]:
        return [job for name, job in self.leases.values() if name == engine]

    def _cost(self, engine: str, job: Job, held: str | None) -> tuple[bool, int, bool]:
        on, here = self._on(engine), engine == held
        return any(other.base != job.base for other in on), len(on) - here, not here

    def _awaits(self) -> bool:
        return any(self._away(engine) < AWAITED_SECONDS for engine in self.calls)

    def _away(self, engine: str) -> float:
        """Seconds since which an engine is awaited; 0 where it is there."""
        return time.monotonic() - self.calls[engine][1] if engine in self.calls else 0.0

    def _call(self, engine: str) -> list[Any]:
        handle = self.engines[engine]
        return [handle.__ray_ready__.remote(), *map(handle.drop.remote, self.orphans.get(engine, ()))]

    def _answers(self, engine: str) -> bool:
        if engine not in self.calls:
            return True
        calls, since = self.calls[engine]
        if ray.wait(calls, num_returns=len(calls), timeout=0)[1]:
            return False
        try:
            ray.get(calls)
        except RayError:  # they came while it died
            self.calls[engine] = self._call(engine), since
            return False
        del self.calls[engine]
        self.orphans.pop(engine, None)
        return True

    def worked(self) -> list[dict[str, Work]]:
        """What each engine has done, by model; of one that died anew, since then."""
        return list(ray.get([engine.worked.remote() for engine in self.engines.values()], timeout=ANSWER_SECONDS))

    def release(self, run_key: str) -> None:
        """A run is over, or waits for others: its place is free."""
        with self.lock:
            self.leases.pop(run_key, None)
            self._even_out()

    def _even_out(self) -> None:
        """Where an engine has a slot free, ask those with more runs to give up half of what they have more.

        They know which of their runs wait for a slot; the trials of these ask for an engine again.
        """
        if self.asked and ray.wait(self.asked, num_returns=len(self.asked), timeout=0)[1]:
            return
        self.asked = []
        runs = Counter(engine for engine, _ in self.leases.values())
        answering = sorted(filter(self._answers, self.engines), key=lambda engine: runs[engine])
        for idle in answering:
            if self.asked or runs[idle] >= self.slots:
                return
            for busy in answering:
                many = min(self.slots - runs[idle], (runs[busy] - runs[idle]) // 2)
                if many < 1:
                    continue
                better_off = [
                    key
                    for key, (engine, job) in self.leases.items()
                    if engine == busy
                    and not self._lacks(idle, job)
                    and self._cost(idle, job, None) < self._cost(busy, job, None)
                ]
                if better_off:
                    self.asked.append(self.engines[busy].give_up.remote(better_off, most=many))
