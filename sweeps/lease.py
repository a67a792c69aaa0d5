"""What Tune's trials and the engine processes say to each other. Imports neither torch nor MLflow: trials are thin."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from emtrain.spec import RunSpec
from sweeps.planner import PlannedRun

ENGINE_DEATHS = 2
"""How often a run whose engine died is taken up again, from its newest state, before it counts as failed."""
ASK_AGAIN_SECONDS = 0.5
STATUS, FAILURE, NOTE = "emsweep/status", "emsweep/failure", "emsweep/note"


@dataclass(frozen=True)
class Job:
    """A planned run and its place in MLflow."""

    run: PlannedRun
    run_id: str

    @property
    def base(self) -> tuple[str, str]:
        """What it is trained on: runs with the same base can share an engine."""
        return base_of(self.run.spec)


def base_of(spec: RunSpec) -> tuple[str, str]:
    """Model and precision."""
    return spec.model, spec.precision


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: str
    """FINISHED or FAILED."""
    failure: str | None = None
    """Why it failed, in a line; None when it did not."""


@dataclass(frozen=True)
class Report:
    """What a trial is told: a run's evaluation point, or its end."""

    metrics: Mapping[str, float]
    """Of the evaluation point; of the last one at the end."""
    steps: int
    tokens: int
    ending: Ending | None = None
    note: str | None = None
    """Why the run trains alone, where it does."""


def trial(config: Mapping[str, Any]) -> None:
    """A trial of Ray Tune: asks its engine for one report after the other and passes them on.

    The end of a run is reported once, with its status and without a count of steps: a rule of early stopping would
    otherwise stop runs that are over.
    """
    job, fleet = config["job"], config["fleet"]
    name, engine = _lease(fleet, job)
    deaths = 0
    while True:
        try:
            report: Report = ray.get(engine.advance.remote(job))
        except ray.exceptions.RayActorError as error:
            deaths += 1
            if deaths > ENGINE_DEATHS:
                raise RuntimeError(f"the engine process died {deaths} times under this run") from error
            # Another engine takes the run up from its newest state.
            name, engine = _lease(fleet, job, died=name)
            continue
        if report.ending is not None:
            end = {STATUS: report.ending.status, FAILURE: report.ending.failure, NOTE: report.note}
            tune.report({**report.metrics, **end})
            return
        tune.report({**report.metrics, "steps": report.steps, "tokens": report.tokens, NOTE: report.note})


def _lease(fleet: Any, job: Job, *, died: str | None = None) -> tuple[str, Any]:
    """The engine that is to train a job; waits for one with a free slot."""
    while (leased := ray.get(fleet.lease.remote(job, died=died))) is None:
        died = None  # told once
        time.sleep(ASK_AGAIN_SECONDS)
    name, engine = leased
    return name, engine
