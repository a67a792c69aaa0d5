"""A sample of a recipe's own runs, trained packed and alone on this machine, and compared."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emtrain.spec import flatten
from sweeps.lease import base_of
from sweeps.planner import PlannedRun

if TYPE_CHECKING:
    from emtrain.packed.equivalence import Comparison, Tolerance


@dataclass(frozen=True)
class Verdict:
    """What was found of one run."""

    name: str
    optimizer: str
    precision: str | None = None
    """``fp32`` or ``bf16``, as the base was loaded; None for a run that can't be packed."""
    unpackable: str | None = None
    """Why it is trained alone anyway; None when it was compared."""
    comparison: "Comparison | None" = None
    tolerance: "Tolerance | None" = None

    @property
    def passed(self) -> bool | None:
        """Whether packed and alone are the same; None for a run that can't be packed."""
        if self.comparison is None or self.tolerance is None:
            return None
        return self.comparison.within(self.tolerance)

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {**asdict(self), "passed": self.passed}


def varied(runs: Sequence[PlannedRun], count: int, *, seed: int) -> list[PlannedRun]:
    """Up to ``count`` of ``runs``, one after the other that differs in most settings from those taken so far.

    ``seed`` chooses the first and among equals.
    """
    left = random.Random(seed).sample(list(runs), len(runs))
    settings = {run.run_key: set(_hashable(flatten(run.spec))) for run in runs}
    taken: list[PlannedRun] = []
    while left and len(taken) < count:
        far = max(
            left,
            key=lambda run: min((len(settings[run.run_key] ^ settings[t.run_key]) for t in taken), default=0),
        )
        left.remove(far)
        taken.append(far)
    return taken


def _hashable(leaves: dict[str, object]) -> Iterator[tuple[str, str]]:
    return ((key, repr(value)) for key, value in leaves.items())


def verify(runs: Sequence[PlannedRun], *, steps: int) -> Iterator[Verdict]:
    """Train the first ``steps`` steps of ``runs`` both ways; those that share a base are packed together.

    Raises ``ValueError`` when a model or dataset can't be used.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    from emtrain.load import load_config
    from emtrain.packed import equivalence
    from emtrain.packed.packable import why_not_packed
    from sweeps.inputs import base_model, data_of
    from sweeps.store import data_directory

    disable_progress_bar()
    data_dir = data_directory()
    packs: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in runs:
        reason = why_not_packed(run.spec, load_config(run.spec.model))
        if reason is None:
            packs.setdefault(base_of(run.spec), []).append(run)
        else:
            yield Verdict(run.name, run.spec.optimizer.name, unpackable=reason)
    for base, together in packs.items():
        model, tokenizer = base_model(*base, None)
        given = [
            (run.spec, data_of(run.spec, run.dataset.digests, revision=None, data_dir=data_dir), run.total_steps)
            for run in together
        ]
        with tempfile.TemporaryDirectory(prefix="emsweep-verify-") as scratch:
            found = equivalence.verify(given, model, tokenizer, Path(scratch), steps=steps)
        for run, comparison in zip(together, found, strict=True):
            allowed = equivalence.tolerance(run.spec.optimizer.name, model.dtype)
            precision = "fp32" if model.dtype == torch.float32 else "bf16"
            yield Verdict(run.name, run.spec.optimizer.name, precision, comparison=comparison, tolerance=allowed)
