"""Tune's trials, all in one process. Tune itself would give each a process of its own.

A trial only passes on what its engine reports, so it needs no process: one takes 2 to 4 processor seconds to start and
190 MB, and Tune starts one after the other, which for a sweep of 36 micro runs was half of all the time. Tune asks its
resource manager where a trial may live, and that is where ``in_one_process`` steps in.
"""

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import ray
from ray import tune
from ray.air.execution.resources.fixed import FixedAcquiredResources, FixedResourceManager
from ray.air.execution.resources.request import ResourceRequest
from ray.tune.execution import tune_controller

from sweeps.fleet import Fleet
from sweeps.halving import Halving
from sweeps.lease import Job, Report
from sweeps.packing import measured, worth_packing
from sweeps.throughput import Work

if TYPE_CHECKING:
    from emtrain.packed.gain import Packing

ENGINE_DEATHS = 2
"""How often a run whose engine died is taken up again, from its newest state, before it counts as failed."""
ASK_AGAIN_SECONDS = 0.1
STATUS, FAILURE, NOTE, LACK = "emsweep/status", "emsweep/failure", "emsweep/note", "emsweep/lack"
"""Keys of what a trial tells Tune, beside the run's metrics, ``steps`` and ``tokens``."""


class Trial(tune.Trainable):
    """A run as Tune knows it: each step is the run's next evaluation point, the last one its end.

    The end is reported with its status and without a count of steps: a rule of early stopping would otherwise stop
    runs that are over.
    """

    fleet: Fleet
    halving: Halving | None = None
    """None where runs do not wait for each other. Both are of the process that all trials share, and set by their host.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Take the job; an engine is leased at the first step."""
        self.job: Job = config["job"]
        self.leased: tuple[str, Any] | None = None
        """Name and handle of the engine that has the run, be it in a slot or waiting."""
        self.ended = False
        self.deaths = 0
        self.lacked: dict[str, str | None] = {}
        """Engines since the last report that could not have the model -> why."""
        self.last: Mapping[str, float] = {}

    def step(self) -> dict[str, Any]:
        """Ask the engine for the run's next report, once it may go on; one that may not reports an end without status.

        Raises ``RuntimeError`` when engines die under it too often.
        """
        run_key = self.job.run.run_key
        if self.halving is not None:
            if self.halving.waits(run_key):
                self.fleet.release(run_key)  # for those that it waits for
            if not self.halving.may_go_on(run_key):
                return {**self.last, "done": True}
        try:
            report = self._report()
        except Exception:
            if self.halving is not None:
                self.halving.left(run_key)
            raise
        self.last = report.metrics
        if self.halving is not None:
            # Trained alone, it would keep the device from those it waits for, so that no one waits for it either.
            if report.ending is not None or report.note is not None:
                self.halving.left(run_key)
            else:
                self.halving.came(run_key, report.steps, report.metrics.get(self.halving.metric))
        said = {NOTE: report.note, LACK: "; ".join(filter(None, self.lacked.values())) or None}
        self.lacked.clear()
        if report.ending is None:
            return {**report.metrics, **said, "steps": report.steps, "tokens": report.tokens}
        self.ended = True
        end = {STATUS: report.ending.status, FAILURE: report.ending.failure}
        return {**report.metrics, **said, **end, "done": True}

    def cleanup(self) -> None:
        """Tune is done with the trial: its place is free, and a run that has not ended is trained no further."""
        self.fleet.release(self.job.run.run_key)
        if self.leased is not None and not self.ended:
            self.leased[1].drop.remote(self.job.run.run_key)

    def _report(self) -> Report:
        while True:
            name, engine = self._lease()
            try:
                report: Report | None = ray.get(engine.advance.remote(self.job))
            except ray.exceptions.RayActorError as error:
                self.deaths += 1
                if self.deaths > ENGINE_DEATHS:
                    raise RuntimeError(f"the engine process died {self.deaths} times under this run") from error
                # Another engine takes the run up from its newest state.
                self._return(died=True)
                continue
            if report is not None:
                ending = report.ending
                if ending is None or not ending.elsewhere:
                    self.lacked.pop(name, None)  # it had been the hub
                    return report
                self.lacked[name] = ending.failure
                if not self.fleet.lacks(name, self.job, tried=self.lacked):
                    self.lacked.clear()  # all do
                    return report
            self._return()

    def _lease(self) -> tuple[str, Any]:
        """Name and handle of the engine that is to train the run; waits for one with room."""
        held = self.leased
        while (leased := self.fleet.lease(self.job, held=held and held[0])) is None:
            time.sleep(ASK_AGAIN_SECONDS)
        if held is not None and held[0] != leased[0]:
            held[1].drop.remote(self.job.run.run_key)  # the other one takes the run up from its newest state
        self.leased = leased
        return leased

    def _return(self, *, died: bool = False) -> None:
        """Give the engine that was leased back, which trains the run no further."""
        self.fleet.returned(self.job, died=died)
        self.leased = None


class TrialHost:
    """The process that all trials share, with the leases of the engines. Made as a Ray actor with threads.

    ``slots``: how many runs an engine trains at once; 0 where ``pack`` is to find out, until which runs wait.
    ``halving`` makes, in that process, what lets runs wait for each other; None where they do not.
    """

    def __init__(self, engines: Mapping[str, Any], *, slots: int, halving: Callable[[], Halving] | None = None) -> None:
        self.fleet = Fleet(engines, slots=slots)
        self.halving = halving() if halving else None
        self.trials: dict[int, tune.Trainable] = {}
        self.lock = threading.Lock()

    def pack(self, bases: Collection[tuple[str, str]]) -> "dict[str, Packing]":
        """Have the engines measure how many runs are worth packing on each base, and train so many at once from now on.

        Returns the packings by base, as text.
        """
        packings = measured(self.fleet.engines, bases)
        self.fleet.open(slots=worth_packing(packings))
        return packings

    def create(self, place: int, trainable: dict[str, Any]) -> None:
        """Make a trial from what Tune would give its process."""
        trial = Trial(**trainable)
        trial.fleet, trial.halving = self.fleet, self.halving
        with self.lock:
            self.trials[place] = trial

    def call(self, place: int, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a trial's method for Tune."""
        return getattr(self.trials[place], method)(*args, **kwargs)

    def worked(self) -> list[dict[str, Work]]:
        """What each engine has done, by model."""
        return self.fleet.worked()

    def remove(self, place: int) -> None:
        """Tune is done with the trial."""
        with self.lock:
            trial = self.trials.pop(place, None)
        if trial is not None:
            trial.stop()


class _Place:
    """What Tune takes for the actor of a trial: calls of its methods go to the host, with the place's number."""

    def __init__(self, host: Any, number: int) -> None:
        self.host, self.number = host, number

    def remote(self, **trainable: Any) -> "_Place":
        """Tune starts the actor."""
        self.trainable = trainable
        return self

    def __getattr__(self, method: str) -> SimpleNamespace:
        """Tune calls methods of the actor by ``.remote()``, Ray's own at its beginning and end among them."""
        match method:
            case "__ray_ready__":
                call = functools.partial(self.host.create.remote, self.number, self.trainable)
            case "stop" | "__ray_terminate__":
                call = functools.partial(self.host.remove.remote, self.number)
            case _:
                call = functools.partial(self.host.call.remote, self.number, method)
        return SimpleNamespace(remote=call)


@dataclass
class _Room(FixedAcquiredResources):
    """What a trial acquires of the host: a place."""

    place: _Place

    def _annotate_remote_entity(self, entity: Any, bundle: dict[str, float], bundle_index: int) -> _Place:
        return self.place


class _Rooms(FixedResourceManager):
    """Gives every trial a place at the host, as many as Tune wants."""

    def __init__(self, host: Any) -> None:
        super().__init__({"CPU": math.inf})
        self.host, self.numbers = host, itertools.count()

    def acquire_resources(self, resource_request: ResourceRequest) -> _Room | None:
        """A room for a trial."""
        acquired = super().acquire_resources(resource_request)
        if acquired is None:
            return None
        place = _Place(self.host, next(self.numbers))
        return _Room(acquired.resource_request, resource_request.bundles, place)


@contextmanager
def in_one_process(host: Any) -> Iterator[None]:
    """Experiments of Tune that begin in this context have their trials at ``host``, Ray's handle of a ``TrialHost``."""
    with mock.patch.object(tune_controller, "PlacementGroupResourceManager", functools.partial(_Rooms, host)):
        yield
