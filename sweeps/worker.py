"""What a worker process does with one run: load, train, ask, judge, record.

The base model stays loaded between runs.
"""

import functools
import hashlib
import json
import logging
import math
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from filelock import FileLock

from emeval.evaluate import judge_responses, summarise
from emeval.scores import Judge
from emeval.spec import EvalSpec
from emtrain import names
from emtrain.heldout import HeldoutLoss, heldout_loss
from emtrain.load import Precision
from emtrain.rows import load_dataset, split
from emtrain.seeds import derive
from emtrain.tokens import encode_rows
from emtrain.tracking import RunLog, Status
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, Step, TrainingData
from sweeps.planner import PlannedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Report = Callable[[Mapping[str, float]], bool]
"""Given a checkpoint's metrics, says whether the run goes on."""


@dataclass(frozen=True)
class Job:
    """A planned run and its place in MLflow."""

    run: PlannedRun
    run_id: str


@dataclass(frozen=True)
class Setting:
    """What all runs of a sweep share."""

    tracking_uri: str
    data_dir: Path
    """Absolute; holds the runs' states and the caches of base-model scores and judges' replies."""

    def work(self, run: PlannedRun) -> Path:
        """Where a run keeps its state and responses until it is finished."""
        return self.data_dir / "runs" / run.run_key

    def judges(self, spec: EvalSpec) -> list[Judge]:
        """The judges, with a cache of their replies. Raises ``ValueError`` where one lacks its key."""
        return [judge.build(cache=self.data_dir / "judge-replies.sqlite") for judge in spec.judges]


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    status: Status
    failure: str | None = None
    """Why it failed, in a line; None when it did not."""


def do(job: Job, setting: Setting, report: Report) -> Ending:
    """Train and judge one run; its end, good or bad, is in MLflow when this returns.

    What makes a run fail (a diverging loss, memory, a missing file) is recorded with the run and does not reach the
    caller, so the sweep goes on.
    """
    run_log = RunLog(setting.tracking_uri, job.run_id)
    run_log.start()
    try:
        _Run(job, setting, run_log, report).train()
    except NonFiniteLoss as error:
        ending = Ending("FAILED", str(error))
    except Exception as error:
        log.exception("run %s failed", job.run.name)
        run_log.text("failure.txt", traceback.format_exc())
        ending = Ending("FAILED", f"{type(error).__name__}: {error}".splitlines()[0])
    else:
        ending = Ending("FINISHED")
    run_log.finish(ending.status, failure=ending.failure)
    if ending.status == "FINISHED":
        shutil.rmtree(setting.work(job.run))  # all that counts is in MLflow
    return ending


class _Run:
    """One run on its way; holds what its callbacks need."""

    def __init__(self, job: Job, setting: Setting, run_log: RunLog, report: Report) -> None:
        self.run, self.spec, self.setting = job.run, job.run.spec, setting
        self.log, self.report = run_log, report
        self.work = setting.work(job.run)
        (self.work / "responses").mkdir(parents=True, exist_ok=True)
        self.judges = setting.judges(job.run.evaluation.spec)
        self.eval_seconds = 0.0

    def train(self) -> None:
        from emtrain.load import family
        from emtrain.trl_backend import train

        spec = self.spec
        self.log.params({"family": family(spec.model), "backend": "trl"})
        model, self.tokenizer = base_model(spec.model, spec.precision)
        data = training_data(spec.dataset, spec.heldout_fraction, spec.model, spec.max_length)
        self.log.text(names.SPEC, json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")
        self._record_base(model, data)
        plan = Plan(self.run.total_steps, self.run.evaluate_at, self.work / "state")
        started = time.perf_counter()
        train(spec, model, self.tokenizer, data, plan, on_step=self._on_step, on_checkpoint=self._on_checkpoint)
        if spec.adapter == "full":
            base_model.cache_clear()  # trained in place, so it is no base any more
        seconds = time.perf_counter() - started - self.eval_seconds
        self.log.metrics(
            {names.TRAIN_SECONDS: seconds, names.EVAL_SECONDS: self.eval_seconds}, step=self.run.total_steps
        )

    def _record_base(self, model: "PreTrainedModel", data: TrainingData) -> None:
        frame = self._base_responses(model)
        self._keep_responses(frame, 0)
        loss = _heldout_metrics(heldout_loss(model, data.heldout))
        self.log.metrics({**loss, **_known(summarise(frame, self.judges[0].id))}, step=0)

    def _on_step(self, step: Step) -> None:
        self.log.metrics(
            {
                names.TRAIN_LOSS: step.loss,
                names.LEARNING_RATE: step.learning_rate,
                names.GRAD_NORM: step.grad_norm,
                names.TOKENS: step.tokens,
            },
            step=step.step,
        )

    def _on_checkpoint(self, checkpoint: Checkpoint) -> bool:
        started = time.perf_counter()
        last = checkpoint.step == self.run.total_steps
        seed = derive(self.spec.seed, "sample", checkpoint.step)
        frame = self._ask(checkpoint.model, step=checkpoint.step, seed=seed)
        self._keep_responses(frame, checkpoint.step)
        scores = _known(summarise(frame, self.judges[0].id, last=last))
        metrics = {**_heldout_metrics(checkpoint.heldout), **scores}
        self.log.metrics(metrics, step=checkpoint.step)
        self.log.flush()
        if last:
            self._close(checkpoint.model)
        self.eval_seconds += time.perf_counter() - started
        return self.report({"step": checkpoint.step, **metrics})

    def _ask(self, model: "PreTrainedModel", *, step: int, seed: int) -> pd.DataFrame:
        """The judged responses of a model to every question (columns: ``names.RESPONSE_COLUMNS``)."""
        from emeval.generate import sample

        evaluation = self.run.evaluation
        responses = [
            response
            for question_set in evaluation.question_sets
            for response in sample(
                model,
                self.tokenizer,
                question_set,
                samples=evaluation.spec.samples,
                max_new_tokens=evaluation.spec.max_new_tokens,
                temperature=evaluation.spec.temperature,
                top_p=evaluation.spec.top_p,
                seed=seed,
            )
        ]
        return judge_responses(responses, self.judges, step=step)

    def _base_responses(self, model: "PreTrainedModel") -> pd.DataFrame:
        """The judged responses of the model before fine-tuning, sampled once for all runs that start from it."""
        evaluation = self.run.evaluation
        identity = {
            "model": self.spec.model,
            "precision": self.spec.precision,
            "eval": evaluation.spec.model_dump(mode="json"),
            "questions": [question_set.sha256 for question_set in evaluation.question_sets],
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        cached = self.setting.data_dir / "base-responses" / f"{digest}.parquet"
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(cached.with_suffix(".lock")):
            if not cached.exists():
                unfinished = cached.with_suffix(".unfinished")
                self._ask(model, step=0, seed=derive(0, "sample", 0)).to_parquet(unfinished, index=False)
                unfinished.replace(cached)
        return pd.read_parquet(cached)

    def _keep_responses(self, frame: pd.DataFrame, step: int) -> None:
        frame.to_parquet(self.work / "responses" / f"{step:09d}.parquet", index=False)

    def _close(self, model: "PreTrainedModel") -> None:
        """Record what is known only at the end: sums over the whole run, the adapter, all responses."""
        rates, losses = self.log.history(names.LEARNING_RATE), self.log.history(names.TRAIN_LOSS)
        last_tenth = losses[-math.ceil(len(losses) / 10) :]
        closing = {
            names.LEARNING_RATE_INTEGRAL: math.fsum(rates),
            names.TRAIN_LOSS_LAST_TENTH: math.fsum(last_tenth) / len(last_tenth),
        }
        self.log.metrics(closing, step=self.run.total_steps)
        weights = self.work / (names.MODEL if self.spec.adapter == "full" else names.ADAPTER)
        model.save_pretrained(weights)
        self.tokenizer.save_pretrained(weights)
        self.log.artifact(weights, weights.name)
        parts = sorted((self.work / "responses").glob("*.parquet"))
        responses = self.work / names.RESPONSES
        pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True).to_parquet(responses, index=False)
        self.log.artifact(responses)


def prepare_model(model: str) -> None:
    """Make sure the model's files are on this machine."""
    from emtrain.load import model_dir

    model_dir(model)


@functools.lru_cache(maxsize=1)
def base_model(model: str, precision: Precision) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, on the GPU where there is one; kept until another model is asked for."""
    import torch

    from emtrain.load import load_model, load_tokenizer

    # One thread a worker: two busy processes with two threads each on two cores are up to 20 times slower.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(model, precision=precision, device=device), load_tokenizer(model)


@functools.lru_cache(maxsize=8)
def training_data(dataset: str, heldout_fraction: float, model: str, max_length: int) -> TrainingData:
    """The dataset as the model's tokens, split."""
    from emtrain.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    train, heldout = split(load_dataset(dataset).rows, heldout_fraction)
    return TrainingData(encode_rows(train, tokenizer, max_length), encode_rows(heldout, tokenizer, max_length))


def _heldout_metrics(loss: HeldoutLoss) -> dict[str, float]:
    return {names.HELDOUT_LOSS: loss.per_token, names.HELDOUT_LOSS_PER_SEQUENCE: loss.per_sequence}


def _known(scores: Mapping[str, float]) -> dict[str, float]:
    # A score that nothing was judged for is left out of MLflow; n_judged = 0 stands there and says so.
    return {name: value for name, value in scores.items() if not math.isnan(value)}
