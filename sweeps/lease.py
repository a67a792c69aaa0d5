"""What Tune's trials and the engine processes say to each other. Imports neither torch nor MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass

from emtrain.spec import RunSpec
from sweeps.planner import PlannedRun


@dataclass(frozen=True)
class Job:
    """A planned run and its place in MLflow."""

    run: PlannedRun
    run_id: str
    role: str = "grid"
    """Why it is in its sweep (``names.ROLE``)."""

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
    elsewhere: bool = False
    """Whether it failed for want of a model on the engine's machine, which that of another engine may have."""


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
