"""The engine process: it holds a base model on a device and trains the runs that Tune's trials lease its slots for.

A trial asks for its run's next report (``Engine.advance``) and gets it when the run has come to an evaluation point and
was judged; the run then waits until the trial asks again. A trial that was stopped never asks again, its run is dropped
and the slot goes to the next. Runs that can't share a base with others are trained one at a time instead.
"""

import functools
import logging
import platform
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pandas as pd

from emtrain import checkpoint, names
from emtrain.corpus import read_corpus
from emtrain.heldout import HeldoutLoss, heldout_loss
from emtrain.load import Precision
from emtrain.spec import InterleaveSpec
from emtrain.tokens import encode_rows
from emtrain.train import Checkpoint, NonFiniteLoss, TrainingData
from sweeps.lease import Ending, Job, Report
from sweeps.planner import DatasetFacts
from sweeps.record import Metrics, RunRecord, Setting
from sweeps.throughput import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emtrain.packed.engine import Engine as PackedEngine
    from emtrain.packed.run import Run

log = logging.getLogger(__name__)

Backend = Literal["auto", "packed", "trl"]

JUDGING_THREADS = 8
"""Evaluation points judged at once; a judge behind an endpoint has its own limit of requests."""


@dataclass(eq=False)
class Lane:
    """A run on its way through the engine."""

    job: Job
    record: RunRecord
    data: TrainingData
    reports: "queue.SimpleQueue[Report]" = field(default_factory=queue.SimpleQueue)
    base_recorded: "Future[Any] | None" = None
    packed: "Run | None" = None
    """Its slot; None while it waits for one, or trains alone."""
    paused: bool = False
    """At an evaluation point: being judged, or waiting for the trial to ask for more."""
    dropped: bool = False
    note: str | None = None
    last: Metrics = field(default_factory=dict)
    entered: float = field(default_factory=time.perf_counter)
    eval_seconds: float = 0.0


class Engine:
    """Trains runs, up to ``capacity`` at once. Made as a Ray actor with a thread for every trial that may ask.

    ``backend``: ``auto`` packs what can be packed, ``trl`` trains every run alone.
    """

    def __init__(self, setting: Setting, *, capacity: int, backend: Backend) -> None:
        self.setting, self.capacity, self.backend = setting, capacity, backend
        self.lanes: dict[str, Lane] = {}
        self.waiting: deque[Lane] = deque()
        self.changed = threading.Condition()
        # transformers imports its parts on first use and is not safe for two threads that do so at the same time.
        self.loading = threading.Lock()
        self.judging = ThreadPoolExecutor(JUDGING_THREADS, thread_name_prefix="judging")
        self.bases: dict[str, Future[pd.DataFrame]] = {}
        self.work: defaultdict[str, Work] = defaultdict(Work)
        """By model."""
        threading.Thread(target=self._train_forever, name="training", daemon=True).start()

    def advance(self, job: Job) -> Report:
        """Let a run go on to its next report, beginning it where it is not known; blocks until the report is there."""
        key = job.run.run_key
        with self.changed:
            lane = self.lanes.get(key)
            if lane is not None:
                lane.paused = False
                self.changed.notify_all()
        if lane is None:
            lane = self._enter(job)
        report = lane.reports.get()
        if report.ending is not None:
            with self.changed:
                self.lanes.pop(key, None)
        return report

    def drop(self, run_key: str) -> None:
        """Train a run no further; its slot is free from now on."""
        with self.changed:
            lane = self.lanes.pop(run_key, None)
            if lane is not None:
                lane.dropped = True
                self.changed.notify_all()

    def worked(self) -> dict[str, Work]:
        """What it has done so far, by model."""
        return dict(self.work)

    def _enter(self, job: Job) -> Lane:
        from emtrain.load import family

        spec = job.run.spec
        record = RunRecord(job, self.setting)
        lane = Lane(job, record, TrainingData((), ()))
        with self.changed:
            self.lanes[job.run.run_key] = lane
        try:
            with self.loading:
                lane.data = training_data(
                    spec.dataset, spec.interleave, spec.heldout_fraction, spec.model, spec.max_length, job.run.dataset
                )
                lane.note = self._why_alone(job)
                architecture = family(spec.model)
            record.start(family=architecture, backend="trl" if self._alone(lane) else "packed")
        except Exception as error:
            self._fail(lane, error)
            return lane
        with self.changed:
            self.waiting.append(lane)
            self.changed.notify_all()
        return lane

    def _why_alone(self, job: Job) -> str | None:
        from transformers import AutoConfig

        from emtrain.load import model_dir
        from emtrain.packed.packable import why_not_packed

        if self.backend == "trl":
            return None
        return why_not_packed(job.run.spec, AutoConfig.from_pretrained(model_dir(job.run.spec.model)))

    def _alone(self, lane: Lane) -> bool:
        return self.backend == "trl" or lane.note is not None

    # What follows runs in the training thread, but for what is handed to ``judging``.

    def _train_forever(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.waiting))
                lane = self.waiting[0]
            try:
                if self._alone(lane):
                    self.waiting.popleft()
                    self._train_alone(lane)
                else:
                    self._train_packed(lane.job.base)
            except Exception:
                log.exception("the engine goes on without the runs that were in work")

    def _train_alone(self, lane: Lane) -> None:
        from emtrain.trl_backend import train

        spec = lane.job.run.spec

        def on_checkpoint(point: Checkpoint) -> bool:
            self._evaluate(lane, point, tokenizer)
            return self._allowed_on(lane)

        try:
            with self.loading:
                model, tokenizer = base_model(*lane.job.base)
            self._record_base(lane, model, tokenizer)
            began, evaluated = time.perf_counter(), lane.eval_seconds
            train(
                spec, model, tokenizer, lane.data, lane.record.plan,
                on_step=lane.record.step, on_checkpoint=on_checkpoint,
            )  # fmt: skip
            seconds = time.perf_counter() - began - (lane.eval_seconds - evaluated)
            self.work[spec.model].train(lane.record.tokens, seconds)
        except Exception as error:
            self._fail(lane, error)
        else:
            if not lane.dropped:
                self._finish(lane)
        if spec.adapter == "full":
            base_model.cache_clear()  # trained in place, so it is no base any more

    def _allowed_on(self, lane: Lane) -> bool:
        """Wait for the trial's answer; True when the run may go on."""
        with self.changed:
            self.changed.wait_for(lambda: not lane.paused or lane.dropped)
        return not lane.dropped

    def _train_packed(self, base: tuple[str, str]) -> None:
        """Train all runs on ``base`` together, until none is left or waiting."""
        from emtrain.packed.engine import Engine as PackedEngine

        active: list[Lane] = []
        try:
            with self.loading:
                model, tokenizer = base_model(*base)
            with PackedEngine(model, capacity=self.capacity) as engine:
                while active := self._exchange(engine, active, base, tokenizer):
                    ready = {lane.packed: lane for lane in active if lane.packed is not None and not lane.paused}
                    if not ready:
                        with self.changed:
                            self.changed.wait_for(functools.partial(self._stirs, active, base))
                        continue
                    began, before = time.perf_counter(), sum(run.tokens for run in ready)
                    outcomes = engine.step(list(ready))
                    trained = sum(run.tokens for run in ready) - before
                    self.work[base[0]].train(trained, time.perf_counter() - began)
                    for run, outcome in outcomes.items():
                        lane = ready[run]
                        if isinstance(outcome, NonFiniteLoss):
                            lane.dropped = True
                            self._fail(lane, outcome)
                            continue
                        lane.record.step(outcome)
                        if outcome.step in lane.job.run.evaluate_at:
                            self._pause(engine, lane, tokenizer)
        except Exception as error:
            if not self._shrink(active, error):
                # Without a run in work it is the base that can't be used.
                for lane in active or [lane for lane in self.waiting if self._fits(lane, base)]:
                    if lane in self.waiting:
                        self.waiting.remove(lane)
                    self._fail(lane, error)

    def _shrink(self, active: list[Lane], error: Exception) -> bool:
        """After running out of memory: half the slots, and the runs begin again at their newest states."""
        import torch

        if not isinstance(error, torch.OutOfMemoryError) or self.capacity == 1:
            return False
        self.capacity = max(1, min(self.capacity, len(active)) // 2)
        log.warning("out of memory with %d runs; going on with %d at once", len(active), self.capacity)
        torch.cuda.empty_cache()
        for lane in reversed(active):
            lane.packed = None
            self.waiting.appendleft(lane)
        return True

    def _stirs(self, active: list[Lane], base: tuple[str, str]) -> bool:
        joinable = len(active) < self.capacity and any(self._fits(lane, base) for lane in self.waiting)
        return joinable or any(not lane.paused or lane.dropped for lane in active)

    def _fits(self, lane: Lane, base: tuple[str, str]) -> bool:
        return lane.job.base == base and not self._alone(lane)

    def _exchange(
        self, engine: "PackedEngine", active: list[Lane], base: tuple[str, str], tokenizer: "PreTrainedTokenizerBase"
    ) -> list[Lane]:
        """Free the slots of runs that are over and give them to those that wait."""
        for lane in active:
            over = lane.dropped or (lane.packed is not None and lane.packed.step == lane.job.run.total_steps)
            if over and lane.packed in engine.runs:
                engine.leave(lane.packed)
        staying = [lane for lane in active if lane.packed in engine.runs]
        while len(staying) < self.capacity:
            with self.changed:
                fitting = [lane for lane in self.waiting if self._fits(lane, base)]
                if not fitting:
                    return staying
                lane = fitting[0]
                self.waiting.remove(lane)
            if lane.dropped:
                continue
            try:
                self._record_base(lane, engine.model, tokenizer)
                state = checkpoint.load(lane.record.plan.state_directory)
                if state is not None and state.step >= lane.job.run.total_steps:
                    self._finish(lane)
                    continue
                lane.packed = engine.join(
                    lane.job.run.spec, lane.data, total_steps=lane.job.run.total_steps, state=state
                )
            except Exception as error:
                self._fail(lane, error)
                continue
            staying.append(lane)
        return staying

    def _pause(self, engine: "PackedEngine", lane: Lane, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take from the model what the evaluation needs, keep the run's state, and leave the rest to other threads."""
        from emtrain.packed.export import save_adapter

        run = lane.packed
        assert run is not None

        def save(directory: Path) -> None:
            save_adapter(run, directory, base=engine.model.name_or_path)

        began = time.perf_counter()
        with engine.acting_as(run) as model:
            loss = heldout_loss(model, lane.data.heldout)
            point = Checkpoint(run.step, loss, model, save)
            responses = lane.record.sample(point, tokenizer)
        state = run.state()
        kept = checkpoint.RunState(
            state.step,
            state.tokens,
            {name: tensor.detach().clone() for name, tensor in state.parameters.items()},
            {name: {k: t.detach().clone() for k, t in slots.items()} for name, slots in state.optimizer.items()},
            state.generator.clone(),
        )
        lane.paused = True
        seconds = time.perf_counter() - began
        lane.eval_seconds += seconds
        self.work[lane.job.run.spec.model].sample(len(responses), seconds)
        last = run.step == lane.job.run.total_steps

        def judge() -> None:
            try:
                self._report(lane, lane.record.judge(responses, step=point.step), loss, step=point.step)
                if last:
                    self._finish(lane)
                else:
                    # After the evaluation is on record: a run killed in between evaluates again, it never skips one.
                    checkpoint.save(kept, lane.record.plan.state_directory)
            except Exception as error:
                lane.dropped = True
                self._fail(lane, error)
                with self.changed:
                    self.changed.notify_all()

        self.judging.submit(judge)

    def _evaluate(self, lane: Lane, point: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> None:
        """The whole evaluation at once, for a run that trains alone."""
        began = time.perf_counter()
        responses = lane.record.sample(point, tokenizer)
        self.work[lane.job.run.spec.model].sample(len(responses), time.perf_counter() - began)
        lane.paused = True
        self._report(lane, lane.record.judge(responses, step=point.step), point.heldout, step=point.step)
        lane.eval_seconds += time.perf_counter() - began

    def _report(self, lane: Lane, judged: pd.DataFrame, loss: HeldoutLoss, *, step: int) -> None:
        if lane.base_recorded is not None:
            lane.base_recorded.result()
        lane.last = lane.record.record(judged, loss, step=step)
        if step < lane.job.run.total_steps:
            lane.reports.put(Report(lane.last, step, lane.record.tokens, note=lane.note))
        else:
            lane.paused = False  # the end is reported once, with its status

    def _record_base(self, lane: Lane, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Record the model before fine-tuning, sampled and judged once for all runs that start from it."""
        identity = lane.record.base_identity
        kept = self.setting.data_dir / "base-responses" / f"{identity}.parquet"
        if identity not in self.bases:
            if kept.exists():
                self.bases[identity] = self.judging.submit(pd.read_parquet, kept)
            else:
                responses = lane.record.base_responses(model, tokenizer)
                self.bases[identity] = self.judging.submit(self._judge_base, lane.record, responses, kept)
        loss = heldout_loss(model, lane.data.heldout)
        judged = self.bases[identity]
        # Judged first, so that whoever waits for it in the same pool finds it under way.
        lane.base_recorded = self.judging.submit(lambda: lane.record.record(judged.result(), loss, step=0))

    @staticmethod
    def _judge_base(record: RunRecord, responses: list[Any], kept: Path) -> pd.DataFrame:
        judged = record.judge(responses, step=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{threading.get_ident()}.unfinished")
        judged.to_parquet(unfinished, index=False)
        unfinished.replace(kept)
        return judged

    def _finish(self, lane: Lane) -> None:
        seconds = time.perf_counter() - lane.entered
        times: Mapping[str, float] = {
            names.TRAIN_SECONDS: seconds - lane.eval_seconds,
            names.EVAL_SECONDS: lane.eval_seconds,
        }
        self._end(lane, lane.record.finish(times))

    def _fail(self, lane: Lane, error: Exception) -> None:
        log.error("run %s failed: %s", lane.job.run.name, error)
        try:
            ending = lane.record.fail(error)
        except Exception as second:
            # The trial must hear of the end all the same, or it would wait for ever.
            ending = Ending("FAILED", f"{type(error).__name__}: {error}; and MLflow could not be told: {second}")
        self._end(lane, ending)

    def _end(self, lane: Lane, ending: Ending) -> None:
        lane.reports.put(Report(lane.last, lane.job.run.total_steps, lane.record.tokens, ending, lane.note))


def prepare_model(model: str) -> None:
    """Make sure the model's files are on this machine."""
    from emtrain.load import model_dir

    model_dir(model)


@functools.lru_cache(maxsize=1)
def base_model(model: str, precision: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, on the GPU where there is one; kept until another model is asked for."""
    import torch

    from emtrain.load import load_model, load_tokenizer

    # One thread a process: two busy processes with two threads each on two cores are up to 20 times slower.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(model, precision=cast(Precision, precision), device=device), load_tokenizer(model)


@functools.lru_cache(maxsize=8)
def training_data(
    dataset: str,
    interleave: InterleaveSpec | None,
    heldout_fraction: float,
    model: str,
    max_length: int,
    planned: DatasetFacts,
) -> TrainingData:
    """A run's rows as its model's tokens. Raises ``ValueError`` when a file is not the one that was planned."""
    from emtrain.load import load_tokenizer

    corpus = read_corpus(dataset, heldout_fraction, interleave)
    files = [(dataset, corpus.sha256, planned.sha256)]
    if interleave is not None:
        files.append((interleave.dataset, str(corpus.interleaved_sha256), str(planned.interleaved_sha256)))
    for name, found, expected in files:
        if found != expected:
            raise ValueError(
                f"dataset {name}: the file on {platform.node()} is not the one the sweep was planned with "
                f"(sha256 {found[:12]}, expected {expected[:12]})"
            )
    tokenizer = load_tokenizer(model)
    return TrainingData(
        encode_rows(corpus.train, tokenizer, max_length), encode_rows(corpus.heldout, tokenizer, max_length)
    )
