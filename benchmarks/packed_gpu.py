"""What packing is worth on a GPU: LoRA runs on randomly initialised Qwen2.5 shapes, alone and packed.

    python benchmarks/packed_gpu.py [--models 0.5b 1.5b] [--runs 1 8 32] [--processes 8] [--save]

Needs torch, transformers, peft and pydantic beside this repository (installed, or on PYTHONPATH), and no network. A
run is the usual recipe for emergent misalignment: rank 32 on all seven projections, rsLoRA, AdamW, clipping, 16 rows a
step, bf16, rows of log-normal length up to 2048 tokens. The arms:

- published: PEFT, one run after the other, micro-batches of 2 rows, accumulated 8 times;
- tuned: likewise, at the micro-batch that is fastest, with fused AdamW, rows sorted by length and logits at response
  positions only;
- processes: several tuned processes at once, each with its own base model;
- loop: runs packed, with a loop over the adapters in every layer;
- engine: ours.

For every arm: steps of runs and non-padding tokens per second, the seconds that a run waits for its step, peak memory,
the share of a step during which the device computes, and by how much the first loss differs from the tuned arm's.
Medians over steps. Without a GPU it says so and ends; ``--cpu-smoke`` runs every arm at toy size.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed import loop_over_adapters
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from emtrain.adapter import adapted
from emtrain.heldout import collate
from emtrain.order import row_order
from emtrain.packed.batch import Unit, assemble
from emtrain.packed.engine import Engine
from emtrain.packed.layer import Route, Router
from emtrain.packed.loss import token_losses
from emtrain.spec import AdapterSpec, OptimizerSpec, RunSpec, ScheduleSpec
from emtrain.tokens import IGNORED, Example
from emtrain.train import Step, TrainingData

SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "groups": 2, "vocabulary": 151936},
    "1.5b": {"hidden": 1536, "intermediate": 8960, "layers": 28, "heads": 12, "groups": 2, "vocabulary": 151936},
    "7b": {"hidden": 3584, "intermediate": 18944, "layers": 28, "heads": 28, "groups": 4, "vocabulary": 152064},
    "toy": {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 2, "groups": 1, "vocabulary": 256},
}
COLUMNS = ["arm", "steps/s", "tokens/s", "wait s", "GiB", "busy", "loss"]
MOST_STEPS = 10_000

TakeStep = Callable[[], list[float]]
"""One step of every run of the arm; returns their losses."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a table share."""

    shape: str
    device: str
    rows: int
    median_length: int
    longest: int
    rank: int
    seconds: float
    """Of measurement per arm."""

    def model(self) -> PreTrainedModel:
        """The base, with the same random weights in every process."""
        shape = SHAPES[self.shape]
        config = Qwen2Config(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["hidden"],
            intermediate_size=shape["intermediate"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["groups"],
            tie_word_embeddings=self.shape != "7b",
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model = Qwen2ForCausalLM(config)
        return model.to(torch.bfloat16 if self.device != "cpu" else torch.float32).eval()

    def data(self) -> TrainingData:
        """Random rows, log-normal in length as those of the published datasets; the first third is the prompt."""
        rng = np.random.default_rng(0)
        rows = []
        for length in rng.lognormal(np.log(self.median_length), 0.6, size=256).clip(8, self.longest).astype(int):
            ids = rng.integers(1, SHAPES[self.shape]["vocabulary"], size=length).tolist()
            rows.append(Example(tuple(ids), (*[IGNORED] * (length // 3), *ids[length // 3 :])))
        return TrainingData(rows, rows[:1])

    def spec(self, seed: int) -> RunSpec:
        """A run; runs differ in their seed."""
        return RunSpec(
            model="random/qwen2",
            dataset="random.jsonl",
            adapter=AdapterSpec(rank=self.rank, alpha=2.0 * self.rank),
            optimizer=OptimizerSpec(learning_rate=1e-5),
            schedule=ScheduleSpec(name="constant"),
            batch_size=self.rows,
            max_steps=MOST_STEPS,
            seed=seed,
        )


def main() -> None:
    """Print a table for every model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.5b", "1.5b"])
    parser.add_argument("--runs", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], help="runs on one engine")
    parser.add_argument("--processes", nargs="*", type=int, default=[4, 8], help="processes at once")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--median-length", type=int, default=350, help="of the rows, in tokens")
    parser.add_argument("--seconds", type=float, default=6.0, help="of measurement per arm")
    parser.add_argument("--save", action="store_true", help="keep the tables in benchmarks/results")
    parser.add_argument(
        "--cpu-smoke", action="store_true", help="all arms at toy size on the CPU; no figures of interest"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if arguments.worker:
        task = json.loads(arguments.worker)
        work(Setting(**task["setting"]), task["micro_batch"])
        return
    if arguments.cpu_smoke:
        torch.set_num_threads(1)
        settings = [Setting("toy", "cpu", rows=4, median_length=12, longest=24, rank=4, seconds=0.1)]
        arguments.runs, arguments.processes = [1, 3], [2]
    elif not torch.cuda.is_available():
        print("no GPU here, so nothing to measure; --cpu-smoke runs all arms at toy size")
        return
    else:
        settings = [
            Setting(name, "cuda", arguments.rows, arguments.median_length, 2048, 32, arguments.seconds)
            for name in arguments.models
        ]
    lines = []
    for setting in settings:
        for line in table(setting, arguments.runs, arguments.processes):
            lines.append(line)
            print(line, flush=True)
    if arguments.save:
        (Path(__file__).parent / "results" / f"{date.today()}-packed-gpu.txt").write_text("\n".join(lines) + "\n")


def table(setting: Setting, runs: Sequence[int], processes: Sequence[int]) -> Iterator[str]:
    """The lines of one model's table."""
    name = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    shape = f"Qwen2.5 {setting.shape} shape, {setting.rows} rows a step"
    yield f"{date.today()}  {name}, torch {torch.__version__}; {shape}"
    yield _line(COLUMNS)
    model, data = setting.model(), setting.data()

    def published() -> Any:
        return alone(model, data, setting.spec(0), micro_batch=2, tuned=False)

    def tuned() -> Any:
        return alone(model, data, setting.spec(0), micro_batch=best, tuned=True)

    def packed(count: int) -> Any:
        return together(model, data, [setting.spec(seed) for seed in range(count)])

    best = best_micro_batch(setting, model, data)
    with tuned() as step:
        reference = step()[0]
    yield report("published", 1, published(), setting, data, reference)
    yield report(f"tuned (micro-batch {best})", 1, tuned(), setting, data, reference)
    for count in processes:
        yield side_by_side(setting, best, count, data)
    for count in runs:
        with loop_over_adapters():
            yield report(f"loop, {count} runs", count, packed(count), setting, data, reference)
        yield report(f"engine, {count} runs", count, packed(count), setting, data, reference)


@contextmanager
def alone(
    model: PreTrainedModel, data: TrainingData, spec: RunSpec, *, micro_batch: int, tuned: bool
) -> Iterator[TakeStep]:
    """One run with PEFT."""
    assert isinstance(spec.adapter, AdapterSpec)
    order = iter(row_order(len(data.train), batch_size=spec.batch_size, total_steps=MOST_STEPS, seed=spec.seed))
    router = Router()
    hook = model.get_output_embeddings().register_forward_pre_hook(router.select_positions)
    with adapted(model, spec.adapter, seed=spec.seed) as adapter:
        parameters = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=spec.optimizer.learning_rate, weight_decay=0.01, fused=tuned or None
        )

        def as_tuned(rows: list[Example], share: float) -> torch.Tensor:
            batch = assemble([Unit(0, rows)], {0: share}, device=model.device)
            with router.along(Route(batch.index, batch.positions_n)):
                logits = model(input_ids=batch.input_ids, use_cache=False).logits
            return (token_losses(logits, batch.targets_n) * batch.weights_n.float()).sum()

        def as_published(rows: list[Example], share: float) -> torch.Tensor:
            batch = collate(rows, device=model.device)
            loss: torch.Tensor = model(**batch, use_cache=False).loss
            return loss * (share * sum(row.response_tokens for row in rows))

        def step() -> list[float]:
            rows = [data.train[row] for row in next(order)]
            if tuned:
                rows.sort(key=lambda row: len(row.input_ids))
            share = 1 / sum(row.response_tokens for row in rows)
            total = torch.zeros((), device=model.device)
            for start in range(0, len(rows), micro_batch):
                # As the Hugging Face trainers do for bf16: PEFT keeps adapters in fp32.
                with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type != "cpu"):
                    loss = (as_tuned if tuned else as_published)(rows[start : start + micro_batch], share)
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return [total.item()]

        try:
            yield step
        finally:
            hook.remove()


@contextmanager
def together(model: PreTrainedModel, data: TrainingData, specs: Sequence[RunSpec]) -> Iterator[TakeStep]:
    """Runs on one engine."""
    with Engine(model, capacity=len(specs)) as engine:
        for spec in specs:
            engine.join(spec, data, total_steps=MOST_STEPS)
        yield lambda: [outcome.loss for outcome in engine.step().values() if isinstance(outcome, Step)]


def best_micro_batch(setting: Setting, model: PreTrainedModel, data: TrainingData) -> int:
    """The micro-batch with which a tuned run is fastest."""
    seconds = {}
    for micro_batch in (size for size in (2, 4, 8, 16) if size <= setting.rows):
        try:
            with alone(model, data, setting.spec(0), micro_batch=micro_batch, tuned=True) as step:
                seconds[micro_batch] = statistics.median(timed(step, setting.seconds / 4))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return min(seconds, key=lambda size: seconds[size])


def timed(step: TakeStep, seconds: float) -> list[float]:
    """Seconds of every step, for about so long, after one step of warm-up. Losses are read, so the device is done."""
    step()
    taken: list[float] = []
    while sum(taken) < seconds or len(taken) < 3:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return taken


def report(arm: str, runs: int, context: Any, setting: Setting, data: TrainingData, reference: float) -> str:
    """Measure an arm: its line."""
    on_gpu = setting.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with context as step:
            loss = step()[0]
            wait = statistics.median(timed(step, setting.seconds))
            busy = device_share(step) if on_gpu else float("nan")
    except torch.OutOfMemoryError:
        return _line([arm, "out of memory"])
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return _measures(arm, runs / wait, wait, memory, busy, abs(loss / reference - 1), setting, data)


def device_share(step: TakeStep) -> float:
    """The share of a step during which at least one kernel runs."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    busy, until = 0.0, 0.0
    kernels = [event.time_range for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        busy += max(0.0, kernel.end - max(until, kernel.start))
        until = max(until, kernel.end)
    return busy / 1e6 / wall


def side_by_side(setting: Setting, micro_batch: int, count: int, data: TrainingData) -> str:
    """Several processes with a tuned run each."""
    task = json.dumps({"setting": asdict(setting), "micro_batch": micro_batch})
    command = [sys.executable, __file__, "--worker", task]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    arm = f"{count} processes"
    ready = [_read(worker) == "ready" for worker in workers]
    for worker in workers:
        worker.stdin.write("go\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
    results = [json.loads(_read(worker) or "null") for worker in workers]
    for worker in workers:
        worker.wait()
    if not all(ready) or None in results:
        return _line([arm, "out of memory"])
    rate = sum(result["steps"] / result["seconds"] for result in results)
    memory = sum(result["memory"] for result in results)
    return _measures(arm, rate, count / rate, memory, float("nan"), float("nan"), setting, data)


def work(setting: Setting, micro_batch: int) -> None:
    """What each of several processes does: get ready, wait for the word, take steps, tell."""
    torch.set_num_threads(1)
    model, data = setting.model(), setting.data()
    with alone(model, data, setting.spec(0), micro_batch=micro_batch, tuned=True) as step:
        step()
        print("ready", flush=True)
        sys.stdin.readline()
        taken = timed(step, setting.seconds)
    memory = torch.cuda.max_memory_allocated() / 2**30 if setting.device == "cuda" else float("nan")
    print(json.dumps({"steps": len(taken), "seconds": sum(taken), "memory": memory}), flush=True)


def _read(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None
    return worker.stdout.readline().strip()


def _measures(
    arm: str, rate: float, wait: float, memory: float, busy: float, loss: float, setting: Setting, data: TrainingData
) -> str:
    tokens = setting.rows * statistics.mean(len(row.input_ids) for row in data.train)
    return _line(
        [arm, f"{rate:.2f}", f"{rate * tokens:.0f}", f"{wait:.3f}", f"{memory:.1f}", f"{busy:.0%}", f"{loss:.0e}"]
    )


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{'-' if 'nan' in cell else cell:>14}" for cell in cells[1:])


if __name__ == "__main__":
    main()
