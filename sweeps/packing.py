"""How many runs are worth packing on each base of a sweep, as the engines themselves measure it."""

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from sweeps.lease import base_of
from sweeps.planner import PlannedRun

if TYPE_CHECKING:
    from emtrain.packed.gain import Packing

MORE_ENGINES_SECONDS = 5.0
"""How long to wait for further engines, to measure several bases side by side."""


def heaviest(runs: Iterable[PlannedRun]) -> dict[tuple[str, str], PlannedRun]:
    """The run with the largest step on every base, by which to measure it; runs that can't be packed left out."""
    found: dict[tuple[str, str], PlannedRun] = {}
    for run in runs:
        if run.spec.adapter != "full":
            known = found.setdefault(base_of(run.spec), run)
            found[base_of(run.spec)] = max(known, run, key=lambda run: run.spec.batch_size * run.spec.max_length)
    return found


def measured(engines: Mapping[str, Any], bases: Iterable[tuple[str, str]]) -> "dict[str, Packing]":
    """Base, as text -> its packing, where it could be measured. Waits for an engine, Ray's handles by name."""
    bases = list(bases)
    calls = {engine.__ray_ready__.remote(): engine for engine in engines.values()}
    # A cloud may take minutes to start the first machine, and may never find another.
    ray.wait(list(calls), num_returns=1)
    there, _ = ray.wait(list(calls), num_returns=min(len(bases), len(calls)), timeout=MORE_ENGINES_SECONDS)
    asked = zip(bases, itertools.cycle(calls[call] for call in there), strict=False)
    answers = {" ".join(base).removesuffix(" auto"): engine.packing.remote(base) for base, engine in asked}
    packings = {base: _answer(answer) for base, answer in answers.items()}
    return {base: packing for base, packing in packings.items() if packing is not None}


def worth_packing(packings: "Mapping[str, Packing]") -> int:
    """How many runs an engine is to train at once: the most on any base; one where nothing could be measured."""
    return max((packing.runs for packing in packings.values()), default=1)


def _answer(call: Any) -> "Packing | None":
    try:
        packing: Packing | None = ray.get(call)
    except RayError:  # the engine died; Ray starts it anew
        return None
    return packing
