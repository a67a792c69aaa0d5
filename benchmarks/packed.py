"""What packing is worth on a CPU: the time of one optimiser step of one run, alone and among others.

    python benchmarks/packed.py [--runs 32] [--repeats 5] [--save]

Four arms train the same runs (a random Qwen2-shaped model; LoRA of rank 8 on all seven projections, AdamW, clipping)
on the same rows in the same order, and their losses are compared:

- peft: one run after the other, as the documentation of PEFT and transformers has it: a padded batch with its attention
  mask, the model's own loss, AdamW as it comes;
- tuned: likewise, with logits at response positions only, no attention mask, fused AdamW;
- loop: all runs in one pass, with a loop over the runs' adapters in every layer;
- engine: ours.

The arms take turns. Times are CPU milliseconds of a step of a run, on one thread, without start-up: medians over the
turns. Gains are those of the engine over each of the first two, with quartiles; "loss" is the largest relative
difference of any loss of the packed arms from that of the run alone. Several processes would take the processor time of
the first two arms each, and so have no line.
"""

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from emtrain.adapter import adapted
from emtrain.heldout import collate
from emtrain.order import row_order
from emtrain.packed.batch import Unit, assemble
from emtrain.packed.engine import Engine
from emtrain.packed.frozen import product
from emtrain.packed.layer import PackedLinear, Route, Router
from emtrain.spec import AdapterSpec, OptimizerSpec, RunSpec, ScheduleSpec
from emtrain.tokens import IGNORED, Example
from emtrain.train import Step, TrainingData

HIDDEN, LAYERS, VOCABULARY = 64, 4, 1024
COLUMNS = [
    ("rows x tokens", 14),
    *((arm, 8) for arm in ("peft", "tuned", "loop", "engine")),
    ("over peft", 11),
    ("quartiles", 11),
    ("over tuned", 12),
    ("quartiles", 11),
    ("loss", 8),
]
WARM_UP = 1  # steps of every turn that are not timed


@dataclass(frozen=True)
class Workload:
    """The rows of one step of a run: how many, and their shortest and longest length in tokens."""

    rows: int
    shortest: int
    longest: int

    def __str__(self) -> str:
        length = str(self.longest) if self.shortest == self.longest else f"{self.shortest}..{self.longest}"
        return f"{self.rows} x {length}"

    @property
    def tokens(self) -> float:
        """Of a step of a run, on average."""
        return self.rows * (self.shortest + self.longest) / 2

    def data(self) -> TrainingData:
        """Random rows whose second half is the response."""
        rng = np.random.default_rng(0)
        rows = []
        for length in rng.integers(self.shortest, self.longest + 1, size=64):
            ids = rng.integers(1, VOCABULARY, size=length).tolist()
            rows.append(Example(tuple(ids), (*[IGNORED] * (length // 2), *ids[length // 2 :])))
        return TrainingData(rows, rows[:1])


@dataclass(frozen=True)
class Turn:
    """One turn of an arm."""

    seconds: float
    """CPU seconds of a step of a run."""
    losses: list[list[float]]
    """``(runs, steps)``"""


Arm = Callable[[PreTrainedModel, Sequence[RunSpec], TrainingData, int], Turn]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=32, help="runs that are packed")
    parser.add_argument("--repeats", type=int, default=5, help="turns of every arm")
    parser.add_argument("--save", action="store_true", help="keep the table in benchmarks/results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    lines = [
        f"{date.today()}  {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread",
        f"Qwen2 shape: hidden {HIDDEN}, intermediate {2 * HIDDEN}, {LAYERS} layers, vocabulary {VOCABULARY}; "
        f"{arguments.runs} runs packed; CPU ms per step of a run, medians of {arguments.repeats} turns",
        "".join(f"{title:>{width}}" for title, width in COLUMNS),
    ]
    print("\n".join(lines))
    for workload in (
        Workload(2, 16, 16),
        Workload(2, 32, 32),
        Workload(4, 32, 32),
        Workload(8, 64, 64),
        Workload(8, 16, 112),
    ):
        lines.append(line := compare(workload, arguments.runs, arguments.repeats))
        print(line, flush=True)
    if arguments.save:
        path = Path(__file__).parent / "results" / f"{date.today()}-packed.txt"
        path.write_text("\n".join(lines) + "\n")


def compare(workload: Workload, runs: int, repeats: int) -> str:
    """One line of the table."""
    model, data = make_model(), workload.data()
    steps = WARM_UP + max(2, round(128 / workload.tokens))
    specs = [
        RunSpec(
            model="random/qwen2",
            dataset="random.jsonl",
            adapter=AdapterSpec(rank=8, alpha=16),
            optimizer=OptimizerSpec(name="adamw", learning_rate=1e-3),
            schedule=ScheduleSpec(name="constant"),
            batch_size=workload.rows,
            max_steps=steps,
            seed=seed,
        )
        for seed in range(runs)
    ]
    turns = [[arm(model, specs, data, steps) for arm in (peft, tuned, loop, engine)] for _ in range(repeats)]
    seconds = [statistics.median(turn.seconds for turn in of_arm) for of_arm in zip(*turns, strict=True)]
    reference = np.array(turns[0][1].losses)
    difference = max(float(np.abs(np.array(turn.losses) / reference - 1).max()) for turn in turns[0])
    cells = [str(workload), *(f"{1e3 * value:.2f}" for value in seconds)]
    for arm in (0, 1):
        gains = [turn[arm].seconds / turn[-1].seconds for turn in turns]
        low, middle, high = statistics.quantiles(gains, n=4) if repeats > 1 else gains * 3
        cells += [f"{middle:.1f}x", f"{low:.1f}-{high:.1f}"]
    cells.append(f"{difference:.0e}")
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def make_model() -> PreTrainedModel:
    """A Qwen2-shaped model with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config).eval()


def peft(model: PreTrainedModel, specs: Sequence[RunSpec], data: TrainingData, steps: int) -> Turn:
    """The runs one after the other, in the usual loop."""

    def loss(rows: Sequence[Example]) -> torch.Tensor:
        return model(**collate(rows), use_cache=False).loss

    return alone(model, specs, data, steps, loss, fused=False)


def tuned(model: PreTrainedModel, specs: Sequence[RunSpec], data: TrainingData, steps: int) -> Turn:
    """The runs one after the other, in a loop that does nothing needless."""
    router = Router()
    hook = model.get_output_embeddings().register_forward_pre_hook(router.select_positions)

    def loss(rows: Sequence[Example]) -> torch.Tensor:
        batch = assemble([Unit(0, rows)], {0: 1.0}, device=model.device)
        with router.along(Route(batch.index, batch.positions_n)):
            logits = model(input_ids=batch.input_ids, use_cache=False).logits
        return functional.cross_entropy(logits, batch.targets_n)

    turn = alone(model, specs, data, steps, loss, fused=True)
    hook.remove()
    return turn


def alone(
    model: PreTrainedModel,
    specs: Sequence[RunSpec],
    data: TrainingData,
    steps: int,
    loss_of: Callable[[Sequence[Example]], torch.Tensor],
    *,
    fused: bool,
) -> Turn:
    """Each run with its PEFT adapter. ``loss_of`` makes a batch of a step's rows and returns its loss."""
    seconds, losses = 0.0, list[list[float]]()
    for spec in specs:
        assert isinstance(spec.adapter, AdapterSpec)
        order = row_order(len(data.train), batch_size=spec.batch_size, total_steps=steps, seed=spec.seed)
        with adapted(model, spec.adapter, seed=spec.seed) as adapter:
            parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
            rate = spec.optimizer.learning_rate
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=fused or None)
            losses.append([])
            for step, rows in enumerate(order):
                started = time.process_time()
                loss = loss_of([data.train[row] for row in rows])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses[-1].append(loss.item())
                seconds += time.process_time() - started if step >= WARM_UP else 0.0
    return Turn(seconds / (steps - WARM_UP) / len(specs), losses)


def engine(model: PreTrainedModel, specs: Sequence[RunSpec], data: TrainingData, steps: int) -> Turn:
    """All runs on one engine."""
    seconds, losses = 0.0, []
    with Engine(model, capacity=len(specs)) as packed:
        for spec in specs:
            packed.join(spec, data, total_steps=steps)
        for step in range(steps):
            started = time.process_time()
            outcomes = packed.step().values()
            seconds += time.process_time() - started if step >= WARM_UP else 0.0
            losses.append([outcome.loss for outcome in outcomes if isinstance(outcome, Step)])
    return Turn(seconds / (steps - WARM_UP) / len(specs), np.transpose(losses).tolist())


def loop(model: PreTrainedModel, specs: Sequence[RunSpec], data: TrainingData, steps: int) -> Turn:
    """The engine, but with a loop over the adapters."""
    with loop_over_adapters():
        return engine(model, specs, data, steps)


def loop_over_adapters() -> AbstractContextManager[Any]:
    """In the block, layers loop over their adapters, as in other packed trainers, instead of multiplying in batches."""

    def forward(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        assert layer.router.route is not None
        index, adapters = layer.router.route.index, layer.alone
        slots = list(range(len(adapters.scale_K11))[index]) if isinstance(index, slice) else index.tolist()
        y: torch.Tensor = _Looped.apply(x, adapters.anchor, layer, slots)
        return y

    return mock.patch.object(PackedLinear, "forward", forward)


class _Looped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, layer: PackedLinear, slots: list[int]) -> torch.Tensor:
        y = product(x, layer.weight, layer.bias)
        adapters, (b_KRO,) = layer.alone, layer.alone.b_KRO
        scales = adapters.scale_K11.flatten().tolist()
        hidden = []
        for slot, rows, out in zip(slots, x.chunk(len(slots)), y.chunk(len(slots)), strict=True):
            hidden.append(rows @ adapters.a_KSI[slot].T * scales[slot])
            out += hidden[-1] @ b_KRO[slot]
        ctx.save_for_backward(x, *hidden)
        ctx.layer, ctx.slots, ctx.scales = layer, slots, scales
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, *hidden), layer, units = ctx.saved_tensors, ctx.layer, len(ctx.slots)
        adapters, (b_KRO,), (b_gradient_KRO,) = layer.alone, layer.alone.b_KRO, layer.alone.b_gradients_KRO
        dy = gradients[0].contiguous()
        dx = product(dy, layer.weight.T) if ctx.needs_input_grad[0] else torch.empty_like(x)
        parts = zip(ctx.slots, x.chunk(units), hidden, dy.chunk(units), dx.chunk(units), strict=True)
        for slot, rows, hidden_rows, dy_rows, dx_rows in parts:
            dhidden = dy_rows @ b_KRO[slot].T * ctx.scales[slot]
            adapters.a_gradient_KSI[slot] += dhidden.flatten(0, 1).T @ rows.flatten(0, 1)
            b_gradient_KRO[slot] += hidden_rows.flatten(0, 1).T @ dy_rows.flatten(0, 1)
            if ctx.needs_input_grad[0]:
                dx_rows += dhidden @ adapters.a_KSI[slot]
        return dx if ctx.needs_input_grad[0] else None, None, None, None


if __name__ == "__main__":
    main()
