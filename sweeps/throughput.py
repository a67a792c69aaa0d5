"""How fast this machine trains and samples a model, measured by its sweeps and kept for the next plan."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from emtrain.cache import cache_dir

LEAST_SECONDS = 3.0
"""Of training and of sampling; in less an engine has hardly warmed up."""


@dataclass
class Work:
    """What an engine has done with one model, and the seconds for which it did nothing else."""

    tokens: int = 0
    """Trained on, prompts included, padding not."""
    training_seconds: float = 0.0
    responses: int = 0
    sampling_seconds: float = 0.0

    def train(self, tokens: int, seconds: float) -> None:
        """Add training."""
        self.tokens += tokens
        self.training_seconds += seconds

    def sample(self, responses: int, seconds: float) -> None:
        """Add an evaluation point: the held-out loss and the responses."""
        self.responses += responses
        self.sampling_seconds += seconds


@dataclass(frozen=True)
class Throughput:
    """Of all engines of a machine together."""

    tokens_per_second: float
    """While training."""
    responses_per_second: float
    """While sampling, which training waits for; judges behind an endpoint it does not wait for."""
    measured: str
    """When and by what."""

    def __str__(self) -> str:
        rates = f"{self.tokens_per_second:,.0f} tokens/s and {self.responses_per_second:,.1f} responses/s"
        return f"{rates}, measured {self.measured}"


def measure(works: Iterable[Work], *, sweep: str) -> Throughput | None:
    """The throughput of engines side by side, from the work of each; None where none has both trained and
    sampled for long enough."""
    whole = [work for work in works if min(work.training_seconds, work.sampling_seconds) >= LEAST_SECONDS]
    if not whole:
        return None
    return Throughput(
        sum(work.tokens / work.training_seconds for work in whole),
        sum(work.responses / work.sampling_seconds for work in whole),
        f"{date.today()} by {sweep}",
    )


def keep(model: str, throughput: Throughput) -> None:
    """Remember the newest throughput of a model on this machine."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({**_kept(), model: asdict(throughput)}, indent=2) + "\n")
    unfinished.replace(path)


def known(model: str) -> Throughput | None:
    """What was kept last; None where the machine has finished no sweep of the model."""
    found = _kept().get(model)
    return Throughput(**found) if found else None


def _kept() -> dict[str, dict[str, Any]]:
    try:
        kept: dict[str, dict[str, Any]] = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return kept


def _path() -> Path:
    return cache_dir() / "throughput.json"
