"""How many runs to pack: a short curve of the time of a run's step over the number of runs, measured and kept.

What packing saves is the time that a pass takes whatever its size, so the curve falls while the passes are small and is
flat from where they fill the device. Beyond that, packing only makes every run slower.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emtrain.cache import cache_dir
from emtrain.spec import RunSpec
from emtrain.train import TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORTH = 0.9
"""More runs must bring the time of a run's step to this share of what it was. Less is noise, and every run of the
larger pack waits longer for its steps. The curve ends when four times the runs don't: twice may be a point that came
out badly, as by a quarter on a machine that had other work."""
TIMED_STEPS, TIMED_SECONDS = 5, 0.3
"""Steps timed at each number of runs, the fastest of which counts; fewer where they take longer than this together."""


@dataclass(frozen=True)
class Packing:
    """How many runs are trained at once, and why."""

    runs: int
    reason: str
    """What ended the curve, in a few words."""
    device: str
    seconds: Mapping[int, float]
    """Runs packed -> seconds of a step of one of them: of the processor on a CPU, of the clock on a GPU. Empty where
    nothing was measured."""

    def __str__(self) -> str:
        curve = ", ".join(f"{runs}: {1e3 * seconds:.3g}" for runs, seconds in self.seconds.items())
        many = "runs are trained one at a time" if self.runs == 1 else f"{self.runs} runs are packed"
        return f"{many}; {self.reason}" + (f" (ms of a run's step, by runs packed: {curve})" if curve else "")


def packing(model: "PreTrainedModel", spec: RunSpec, data: TrainingData, *, most: int) -> Packing:
    """The packing of runs like ``spec`` on ``model``: as many as are worth it, at most ``most``, and have memory.

    Points of the curve are kept in the cache directory, for models of this shape on this device, for rows, adapters
    and optimiser of this shape, this engine and these versions of the software. Only points that are not there are
    measured, one that seems to end the curve twice: 3 s of a processor for a micro model.
    """
    import torch

    from emtrain.packed import costs

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{platform.machine()} CPU"
    tokens = spec.batch_size * statistics.mean(len(row.input_ids) for row in data.train)
    # At best, ever so many runs share all of what a pass costs beside its tokens.
    if tokens > WORTH * (tokens + costs.overhead_tokens(model, model.device)):
        return Packing(1, f"a step of {tokens:.0f} tokens fills the device", device, {})
    kept = cache_dir() / "packing" / f"{_identity(model, spec, data, device)}.json"
    points = _read(kept)
    seconds: dict[int, float] = {}
    reason, runs = "no more are wanted", 1
    while runs <= most:
        try:
            if runs not in points:
                points[runs] = _measure(model, spec, data, runs)
                if _ends(points, runs):
                    # Other work slows a machine down for seconds at a time, and what is kept counts for ever after.
                    points[runs] = min(points[runs], _measure(model, spec, data, runs), key=lambda point: point.seconds)
                _write(kept, points)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Packing(max(1, runs // 2), f"{runs} run out of memory", device, seconds)
        seconds[runs] = points[runs].seconds
        if _ends(points, runs):
            reason = "more gain less than 10 %"
            break
        # Half of the memory is for the activations of a pass (emtrain.packed.costs).
        fit = max(1, costs.free_bytes(model.device) // 2 // points[runs].bytes_per_run)
        if fit < most:
            most, reason = fit, "memory is enough for no more"
        runs *= 2
    fastest = min(seconds.values())
    enough = next(runs for runs, its in seconds.items() if WORTH * its <= fastest)
    # The last doubling may lead beyond what is wanted or has room, to a number that was not measured.
    many = 2 * enough if enough == max(seconds) else enough
    return Packing(min(many, most), reason, device, seconds)


@dataclass(frozen=True)
class _Point:
    seconds: float
    bytes_per_run: int


def _ends(points: Mapping[int, _Point], runs: int) -> bool:
    return runs >= 4 and points[runs].seconds > WORTH * points[runs // 4].seconds


def _measure(model: "PreTrainedModel", spec: RunSpec, data: TrainingData, runs: int) -> _Point:
    from emtrain.packed.engine import Engine

    # On a CPU other processes take turns with this one; the time that they take is not ours.
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    still = spec.optimizer.model_copy(update={"learning_rate": 1e-12})  # a run that diverged would leave
    total_steps = max(spec.total_steps(len(data.train)), 1 + TIMED_STEPS)
    with Engine(model, capacity=runs) as engine:
        for seed in range(runs):
            like = spec.model_copy(update={"seed": seed, "optimizer": still})
            engine.join(like, data, total_steps=total_steps)
        engine.step()  # makes what is made only once: the states of optimisers, a GPU's kernels
        taken: list[float] = []
        while not taken or (len(taken) < TIMED_STEPS and sum(taken) < TIMED_SECONDS):
            began = clock()
            engine.step()  # reads the losses, so the device is done
            taken.append(clock() - began)
        state = engine.runs[0].state()
    adapter = sum(matrix.nbytes for matrix in state.parameters.values())
    optimizer = sum(tensor.nbytes for slots in state.optimizer.values() for tensor in slots.values())
    # Weights, gradients, operands in the base's dtype; and at evaluation points a copy of all that is kept.
    return _Point(min(taken) / runs, 4 * adapter + 2 * optimizer)


def _identity(model: "PreTrainedModel", spec: RunSpec, data: TrainingData, device: str) -> str:
    import torch

    lengths = [len(row.input_ids) for row in data.train]
    responses = statistics.mean(row.response_tokens for row in data.train)
    identity = [
        [model.config.to_json_string(), str(model.dtype)],
        [device, platform.node(), torch.get_num_threads()],
        [spec.batch_size, spec.micro_rows, statistics.mean(lengths), max(lengths), responses],
        [spec.model_dump(mode="json")["adapter"], spec.optimizer.name],
        [importlib.metadata.version(name) for name in ("torch", "transformers")],
        [hashlib.sha256(source.read_bytes()).hexdigest() for source in sorted(Path(__file__).parent.glob("*.py"))],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:20]


def _read(path: Path) -> dict[int, _Point]:
    if not path.exists():
        return {}
    return {int(runs): _Point(**point) for runs, point in json.loads(path.read_text(encoding="utf-8")).items()}


def _write(path: Path, points: Mapping[int, _Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({runs: asdict(point) for runs, point in points.items()}), encoding="utf-8")
    unfinished.replace(path)
