"""The engine process: it holds a base model on a device and trains the runs that Tune's trials lease its slots for.

A trial asks for its run's next report (``Engine.advance``) and gets it when the run has come to an evaluation point and
was judged; the run then waits until the trial asks again. A trial that was stopped never asks again, its run is dropped
and the slot goes to the next. Runs that can't share a base with others are trained one at a time instead.
"""

import functools
import gc
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from emeval.responses import Response
from emtrain import checkpoint, names
from emtrain.heldout import HeldoutLoss, heldout_loss
from emtrain.mistakes import gist, named
from emtrain.revision import Unavailable
from emtrain.seeds import derive
from emtrain.spec import RunSpec
from emtrain.tracking import client
from emtrain.train import Checkpoint, NonFiniteLoss, TrainingData, checked
from sweeps.inputs import base_model, data_of
from sweeps.lane import Lane
from sweeps.lease import Ending, Job, Report
from sweeps.planner import PlannedRun
from sweeps.record import RunRecord, Setting
from sweeps.throughput import Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emtrain.packed.engine import Engine as PackedEngine
    from emtrain.packed.gain import Packing
    from emtrain.packed.run import Run as PackedRun

log = logging.getLogger(__name__)

Backend = Literal["auto", "packed", "trl"]

JUDGING_THREADS = 8
"""Evaluation points judged at once; a judge behind an endpoint has its own limit of requests."""


class Engine:
    """Trains runs, up to ``capacity`` at once. Made as a Ray actor with a thread for every trial that may ask.

    ``heaviest``: base -> the run by which to measure how many are worth packing; on a base that is not there it is as
    many as possible. ``only_base``: the one that all runs start from, which is loaded at once; None where there are
    several. ``backend``: ``auto`` packs what can be packed, ``trl`` trains every run alone.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        capacity: int,
        heaviest: Mapping[tuple[str, str], PlannedRun],
        only_base: tuple[str, str] | None,
        backend: Backend,
    ) -> None:
        self.setting, self.capacity, self.heaviest, self.backend = setting, capacity, heaviest, backend
        self.slots: dict[tuple[str, str], int] = {}
        """Base -> how many runs train on it at once."""
        self.pass_tokens: dict[tuple[str, str], int] = {}
        """Base -> most tokens of a pass, where its first guess was too many."""
        self.notes: dict[tuple[str, Any], str | None] = {}
        """Model and adapter -> why runs with them train alone; None where they are packed."""
        self.lanes: dict[str, Lane] = {}
        self.waiting: deque[Lane] = deque()
        self.active: list[Lane] = []
        """Those that have a slot."""
        self.changed = threading.Condition()
        # transformers imports its parts on first use and is not safe for two threads that do so at the same time.
        self.loading = threading.Lock()
        self.judging = ThreadPoolExecutor(JUDGING_THREADS, thread_name_prefix="judging")
        self.bases: dict[str, Future[pd.DataFrame]] = {}
        """The judged responses of models before fine-tuning."""
        self.base_losses: dict[tuple[Any, ...], HeldoutLoss] = {}
        self.work: defaultdict[str, Work] = defaultdict(Work)
        """By model."""
        threading.Thread(target=self._prepare, args=(only_base,), name="preparing", daemon=True).start()
        threading.Thread(target=self._train_forever, name="training", daemon=True).start()

    def _prepare(self, base: tuple[str, str] | None) -> None:
        """What packed runs would wait for: some 4 s of imports, the store, and the base where that is known."""
        try:
            with self.loading:
                # Imports make half a million objects that stay; to go through them again and again takes a quarter of
                # the time.
                gc.disable()
                try:
                    import peft  # noqa: F401
                    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
                finally:
                    gc.enable()
                gc.freeze()  # before the base is there: a model that is trained itself must be free to go
                if base is not None:
                    self._base(base)
                client(self.setting.tracking_uri)  # with the lock: ``packing`` measures what this process does
        except Exception as error:
            log.info("the first run will be told: %s", error)

    def packing(self, base: tuple[str, str]) -> "Packing | None":
        """How many runs on ``base`` to train at once, as measured here; None for a base that can't be used."""
        from emtrain.packed.gain import packing

        run = self.heaviest[base]
        try:
            with self.loading:
                model, _ = self._base(base)
                return packing(model, run.spec, self._data(run), most=self.capacity)
        except Exception:
            log.exception("could not measure what packing is worth on %s", base[0])
            return None

    def advance(self, job: Job) -> Report | None:
        """Let a run go on to its next report, beginning it where it is not known; blocks until the report is there.

        None when the engine has given the run up meanwhile.
        """
        key = job.run.run_key
        with self.changed:
            lane = self.lanes.get(key)
            if lane is not None:
                lane.paused = False
                self.changed.notify_all()
        if lane is None:
            try:
                lane = self._enter(job)
            except Exception as error:  # there is no record of it to say so in
                log.exception("run %s could not begin", job.run.name)
                return Report({}, 0, 0, Ending("FAILED", named(error)))
        report = lane.reports.get()
        if report is not None and report.ending is not None:
            with self.changed:
                self.lanes.pop(key, None)
        return report

    def drop(self, run_key: str) -> None:
        """Train a run no further; its slot is free from now on."""
        with self.changed:
            lane = self.lanes.pop(run_key, None)
            if lane is not None:
                lane.dropped = True
                lane.reports.put(None)  # to whoever may still wait, as after a lost connection
                self.changed.notify_all()

    def give_up(self, run_keys: Collection[str], *, most: int) -> None:
        """Leave to another engine what waits here for a slot, of these runs so many at most, those that came last."""
        with self.changed:
            movable = [lane for lane in self.waiting if lane.movable and lane.job.run.run_key in run_keys]
            for lane in movable[-most:]:
                self.waiting.remove(lane)
                del self.lanes[lane.job.run.run_key]
                lane.reports.put(None)

    def worked(self) -> dict[str, Work]:
        """What it has done so far, by model."""
        return dict(self.work)

    def _enter(self, job: Job) -> Lane:
        from emtrain.load import family

        record = RunRecord(job, self.setting)
        lane = Lane(job, record, TrainingData((), ()))
        with self.changed:
            self.lanes[job.run.run_key] = lane
        try:
            with self.loading:
                lane.data = self._data(job.run)
                lane.note = self._why_alone(job.run.spec)
                architecture = family(job.run.spec.model, revision=self._revision(job.run.spec.model))
            record.start(family=architecture, backend="trl" if self._alone(lane) else "packed")
        except Exception as error:
            self._fail(lane, error)
            return lane
        with self.changed:
            self.waiting.append(lane)
            self.changed.notify_all()
        return lane

    def _why_alone(self, spec: RunSpec) -> str | None:
        from emtrain.load import load_config
        from emtrain.packed.packable import why_not_packed

        if self.backend == "trl":
            return None
        if (kind := (spec.model, spec.adapter)) not in self.notes:
            self.notes[kind] = why_not_packed(spec, load_config(spec.model, revision=self._revision(spec.model)))
        return self.notes[kind]

    def _base(self, base: tuple[str, str]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        return base_model(*base, self._revision(base[0]))

    def _data(self, run: PlannedRun) -> TrainingData:
        revision = self._revision(run.spec.model)
        return data_of(run.spec, run.dataset.digests, revision=revision, data_dir=self.setting.data_dir)

    def _revision(self, model: str) -> str | None:
        return self.setting.revisions.get(model)

    def _alone(self, lane: Lane) -> bool:
        return self.backend == "trl" or lane.note is not None

    # What follows runs in the training thread, but for what is handed to ``judging``.

    def _train_forever(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: any(lane.ready for lane in self.waiting))
                lane = next(lane for lane in self.waiting if lane.ready)
                if alone := self._alone(lane):
                    self.waiting.remove(lane)
            try:
                if not alone:
                    self._train_packed(lane.job.base)
                elif not lane.dropped:
                    self._train_alone(lane)
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
                model, tokenizer = self._base(lane.job.base)
            self._record_base(lane, model, tokenizer)
            began, evaluated = time.perf_counter(), lane.eval_seconds
            train(
                spec, model, tokenizer, lane.data, lane.record.plan,
                on_step=lane.record.step, on_checkpoint=on_checkpoint,
            )  # fmt: skip
            seconds = time.perf_counter() - began - (lane.eval_seconds - evaluated)
            self.work[spec.model].train(lane.record.tokens, seconds)
        except Exception as error:
            if not lane.dropped:  # else its state is being removed
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
        from torch import OutOfMemoryError

        from emtrain.packed.engine import Engine as PackedEngine

        self.active.clear()
        try:
            with self.loading:
                model, tokenizer = self._base(base)
            with PackedEngine(model, capacity=self._slots(base), most_tokens=self.pass_tokens.get(base)) as engine:
                try:
                    self._take_steps(engine, base, tokenizer)
                except OutOfMemoryError:
                    if not self._shrink(engine, base):
                        raise
        except Exception as error:
            # Without a run in work it is the base that can't be used.
            with self.changed:
                hit = [lane for lane in self.active if not lane.over] or self._fitting(base)
                for lane in hit:
                    if lane in self.waiting:
                        self.waiting.remove(lane)
            for lane in hit:
                self._fail(lane, error)

    def _take_steps(self, engine: "PackedEngine", base: tuple[str, str], tokenizer: "PreTrainedTokenizerBase") -> None:
        while self._exchange(engine, base, tokenizer):
            if due := [lane for lane in self.active if lane.due]:
                self._pause(engine, due, tokenizer)
            going = [lane for lane in self.active if lane.ready and not lane.over]
            ready = {lane.packed: lane for lane in going if lane.packed is not None}
            if not ready:
                with self.changed:
                    self.changed.wait_for(functools.partial(self._stirs, base))
                continue
            began, before = time.perf_counter(), sum(run.tokens for run in ready)
            outcomes = engine.step(list(ready))
            trained = sum(run.tokens for run in ready) - before
            self.work[base[0]].train(trained, time.perf_counter() - began)
            for run, outcome in outcomes.items():
                if isinstance(outcome, NonFiniteLoss):
                    ready[run].dropped = True
                    self._fail(ready[run], outcome)
                else:
                    ready[run].record.step(outcome)

    def _slots(self, base: tuple[str, str]) -> int:
        if base not in self.slots:
            found = self.packing(base) if base in self.heaviest else None
            self.slots[base] = self.capacity if found is None else found.runs
        return self.slots[base]

    def _shrink(self, engine: "PackedEngine", base: tuple[str, str]) -> bool:
        """After running out of memory: half the slots, or half the tokens of a pass for a run alone, down to one row.

        The runs wait for their slots with all that they have reached. False when there is nothing left to halve.
        """
        import torch

        inside = [lane for lane in self.active if lane.packed in engine.runs and not lane.over]
        longest = max((len(row.input_ids) for lane in inside for row in lane.data.train), default=0)
        if inside and engine.capacity > 1:
            self.slots[base] = max(1, len(inside) // 2)
            log.warning("out of memory with %d runs; going on with %d at once", len(inside), self.slots[base])
        elif inside and engine.most_tokens > longest and not _drops(inside[0]):
            self.pass_tokens[base] = max(longest, engine.most_tokens // 2)
            log.warning("out of memory with one run; going on with %d tokens a pass", self.pass_tokens[base])
        else:
            return False
        torch.cuda.empty_cache()
        for lane in inside:
            self._put_off(lane, engine)
        return True

    def _put_off(self, lane: Lane, engine: "PackedEngine") -> None:
        """Let a run wait for a slot again, with all that it has reached."""
        assert lane.packed is not None
        # At an evaluation point it is on disk by the time the run goes on. Where many wait for each other, their states
        # would fill the device.
        lane.state = None if lane.packed.step == lane.evaluated else lane.packed.state()
        engine.leave(lane.packed)
        lane.packed = None
        self.active.remove(lane)
        with self.changed:
            self.waiting.append(lane)

    def _stirs(self, base: tuple[str, str]) -> bool:
        return any(lane.ready or lane.over for lane in self.active) or bool(self._fitting(base))

    def _fitting(self, base: tuple[str, str]) -> list[Lane]:
        """Those that wait for a slot on this base and would go on."""
        return [lane for lane in self.waiting if lane.ready and lane.job.base == base and not self._alone(lane)]

    def _exchange(self, engine: "PackedEngine", base: tuple[str, str], tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Free the slots of runs that are over and give them to those that wait; False when no run is left."""
        from torch import OutOfMemoryError

        for lane in self.active:
            if lane.over and lane.packed in engine.runs:
                engine.leave(lane.packed)
        self.active[:] = [lane for lane in self.active if lane.packed in engine.runs]
        with self.changed:
            wanted = len(self.active) + len(self._fitting(base)) - engine.capacity
            for lane in [lane for lane in self.active if not lane.ready][: max(0, wanted)]:
                self._put_off(lane, engine)  # being judged, or not asked for yet, it gives way to one that would go on
        while len(self.active) < engine.capacity:
            with self.changed:
                fitting = self._fitting(base)
                if not fitting:
                    break
                lane = fitting[0]
                self.waiting.remove(lane)
            if lane.dropped:
                continue
            try:
                self._join(engine, lane, tokenizer)
            except OutOfMemoryError:
                if not self.active:
                    self._fail(lane, MemoryError("the device has too little memory for one run"))
                    continue
                with self.changed:
                    self.waiting.appendleft(lane)
                raise
            except Exception as error:
                self._fail(lane, error)
        return bool(self.active)

    def _join(self, engine: "PackedEngine", lane: Lane, tokenizer: "PreTrainedTokenizerBase") -> None:
        total_steps = lane.job.run.total_steps
        if lane.base_recorded is None:
            self._record_base(lane, engine.model, tokenizer)
        if lane.state is None:
            lane.state = checkpoint.load(lane.record.plan.state_directory)
            if lane.state is not None:
                lane.evaluated = lane.state.step
                if lane.evaluated >= total_steps:
                    self._finish(lane)
                    return
        lane.packed = engine.join(lane.job.run.spec, lane.data, total_steps=total_steps, state=lane.state)
        lane.state = None
        self.active.append(lane)

    def _pause(self, engine: "PackedEngine", lanes: Sequence[Lane], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take from the model what the evaluation of these runs needs, keep their states, leave the rest to others."""
        from emtrain.packed.export import save_adapter

        began = time.perf_counter()
        pausing: list[tuple[Lane, PackedRun, HeldoutLoss]] = []
        for lane in lanes:
            assert lane.packed is not None
            run = lane.packed
            save = functools.partial(save_adapter, run, base=engine.model.name_or_path)
            with engine.acting_as(run) as model:
                try:
                    loss = checked(heldout_loss(model, lane.data.heldout), run.step, run.learning_rate)
                except NonFiniteLoss as error:  # its NaN would end the sampling of all
                    lane.dropped = True
                    self._fail(lane, error)
                    continue
                lane.record.keep(Checkpoint(run.step, loss, model, save), tokenizer)
                pausing.append((lane, run, loss))
        if not pausing:
            return
        runs = [run for _, run, _ in pausing]
        seeds = [lane.record.seed(run.step) for lane, run, _ in pausing]
        with engine.acting_as(*runs) as model:
            asked = _ask(lanes[0].job.run, model, tokenizer, seeds=seeds)  # a sweep asks all its runs the same
        seconds = time.perf_counter() - began
        self.work[lanes[0].job.run.spec.model].sample(sum(map(len, asked)), seconds)
        for (lane, run, loss), responses in zip(pausing, asked, strict=True):
            state = run.state()  # which may find no memory: then the run is still to be evaluated
            lane.evaluated, lane.paused = run.step, True
            lane.eval_seconds += seconds / len(pausing)
            self.judging.submit(self._judge, lane, responses, loss, state)

    def _judge(self, lane: Lane, responses: Sequence[Response], loss: HeldoutLoss, state: checkpoint.RunState) -> None:
        try:
            judged = lane.record.judge(responses, step=state.step)
            if lane.dropped:  # meanwhile: another engine may have it
                return
            self._report(lane, judged, loss, step=state.step, state=state)
            if state.step == lane.job.run.total_steps:
                self._finish(lane)
        except Exception as error:
            lane.dropped = True
            self._fail(lane, error)
            with self.changed:
                self.changed.notify_all()

    def _evaluate(self, lane: Lane, point: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> None:
        """The whole evaluation at once, for a run that trains alone."""
        began = time.perf_counter()
        lane.record.keep(point, tokenizer)
        (responses,) = _ask(lane.job.run, point.model, tokenizer, seeds=[lane.record.seed(point.step)])
        self.work[lane.job.run.spec.model].sample(len(responses), time.perf_counter() - began)
        lane.paused = True
        self._report(lane, lane.record.judge(responses, step=point.step), point.heldout, step=point.step)
        lane.eval_seconds += time.perf_counter() - began

    def _report(
        self,
        lane: Lane,
        judged: pd.DataFrame,
        loss: HeldoutLoss,
        *,
        step: int,
        state: "checkpoint.RunState | None" = None,
    ) -> None:
        """Record an evaluation point, keep ``state`` where there is one, and tell the trial."""
        if lane.base_recorded is not None:
            lane.base_recorded.result()
        lane.last = lane.record.record(judged, loss, step=step)
        if step == lane.job.run.total_steps:
            lane.paused = False  # the end is reported once, with its status
            return
        if state is not None:
            # After the evaluation is on record: a run killed in between evaluates again, it never skips one. Before the
            # trial hears of it: what it asks for then must not end before its state is written.
            checkpoint.save(state, lane.record.plan.state_directory)
        lane.reports.put(Report(lane.last, step, lane.record.tokens, note=lane.note))

    def _record_base(self, lane: Lane, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        """Record the model before fine-tuning, sampled and judged once for all runs that start from it."""
        run, identity = lane.job.run, lane.record.base_identity
        kept = self.setting.data_dir / "base-responses" / f"{identity}.parquet"
        rows = (lane.job.base, run.dataset.digests, run.spec.heldout_fraction, run.spec.max_length)
        began, responses = time.perf_counter(), list[Response]()
        if rows not in self.base_losses:
            self.base_losses[rows] = heldout_loss(model, lane.data.heldout)
        if identity not in self.bases:
            if kept.exists():
                self.bases[identity] = self.judging.submit(pd.read_parquet, kept)
            else:
                (responses,) = _ask(run, model, tokenizer, seeds=[derive(0, "sample", 0)])
                self.bases[identity] = self.judging.submit(self._judge_base, lane.record, responses, kept)
        self.work[run.spec.model].sample(len(responses), time.perf_counter() - began)
        judged, loss = self.bases[identity], self.base_losses[rows]
        # Judged first, so that whoever waits for it in the same pool finds it under way.
        lane.base_recorded = self.judging.submit(lambda: lane.record.record(judged.result(), loss, step=0))

    @staticmethod
    def _judge_base(record: RunRecord, responses: Sequence[Response], kept: Path) -> pd.DataFrame:
        judged = record.judge(responses, step=0)
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{threading.get_ident()}.unfinished")
        judged.to_parquet(unfinished, index=False)
        unfinished.replace(kept)
        return judged

    def _finish(self, lane: Lane) -> None:
        if not lane.last:  # killed between its last evaluation and its end
            lane.last = lane.record.log.metrics_at(lane.job.run.total_steps)
        seconds = time.perf_counter() - lane.entered
        times: Mapping[str, float] = {
            names.TRAIN_SECONDS: seconds - lane.eval_seconds,
            names.EVAL_SECONDS: lane.eval_seconds,
        }
        self._end(lane, lane.record.finish(times))

    def _fail(self, lane: Lane, error: Exception) -> None:
        log.error("run %s failed: %s", lane.job.run.name, error)
        elsewhere = isinstance(error, Unavailable)
        try:
            ending = replace(lane.record.fail(error), elsewhere=elsewhere)
        except Exception as second:
            # The trial must hear of the end all the same, or it would wait for ever.
            ending = Ending("FAILED", f"{named(error)}; and MLflow could not be told: {gist(second)}", elsewhere)
        self._end(lane, ending)

    def _end(self, lane: Lane, ending: Ending) -> None:
        lane.reports.put(Report(lane.last, lane.job.run.total_steps, lane.record.tokens, ending, lane.note))


def _drops(lane: Lane) -> bool:
    """Whether a run has dropout, whose draws take the micro-batches of its specification as they are."""
    adapter = lane.job.run.spec.adapter
    return adapter != "full" and adapter.dropout > 0


def _ask(
    run: PlannedRun, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, seeds: Sequence[int]
) -> list[list[Response]]:
    from emeval.generate import ask

    return ask(model, tokenizer, run.evaluation.question_sets, run.evaluation.spec, seeds=seeds)
