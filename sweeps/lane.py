"""A run on its way through an engine process."""

import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emtrain.checkpoint import RunState
from emtrain.train import TrainingData
from sweeps.lease import Job, Report
from sweeps.record import Metrics, RunRecord

if TYPE_CHECKING:
    from emtrain.packed.run import Run


@dataclass(eq=False)
class Lane:
    """What the engine knows of a run, from its first report to its last."""

    job: Job
    record: RunRecord
    data: TrainingData
    reports: "queue.SimpleQueue[Report | None]" = field(default_factory=queue.SimpleQueue)
    """None is the last, where the engine has given the run up."""
    base_recorded: "Future[Any] | None" = None
    packed: "Run | None" = None
    """Its slot; None while it waits for one, or trains alone."""
    state: RunState | None = None
    """What it goes on from in the slot that it waits for; None where that is its newest state on disk, if any."""
    evaluated: int = 0
    """The newest evaluation point that it has come past."""
    paused: bool = False
    """At an evaluation point: being judged, or waiting for the trial to ask for more."""
    dropped: bool = False
    note: str | None = None
    last: Metrics = field(default_factory=dict)
    entered: float = field(default_factory=time.perf_counter)
    eval_seconds: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether there is something to do about it."""
        return not self.paused or self.dropped

    @property
    def movable(self) -> bool:
        """Whether another engine can take it up while it waits for a slot: all that it has reached is on disk."""
        # After running out of memory a run has come further than that.
        on_disk = self.state is None or self.state.step == self.evaluated
        recorded = self.base_recorded is None or self.base_recorded.done()
        return self.ready and not self.dropped and on_disk and recorded

    @property
    def due(self) -> bool:
        """Whether it is to be evaluated before its next step."""
        step = self.packed.step if self.packed is not None else 0
        return not self.dropped and step in self.job.run.evaluate_at and step > self.evaluated

    @property
    def over(self) -> bool:
        """Whether it will take no further step, and needs its slot no more."""
        return self.dropped or self.evaluated == self.job.run.total_steps
