"""What is recorded of one run, from its first step to its end.

``keep`` needs the model and is called while the run pauses and holds the device. ``judge``, ``record`` and ``finish``
need it no more, so other runs can train meanwhile.
"""

import hashlib
import json
import math
import platform
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from emeval.evaluate import judge_responses, summarise
from emeval.responses import Response
from emeval.scores import Judge
from emeval.spec import JudgeSpec
from emtrain import names
from emtrain.heldout import HeldoutLoss
from emtrain.mistakes import named
from emtrain.seeds import derive
from emtrain.tracking import RunLog, SweepLog
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, Step
from sweeps.lease import Ending, Job
from sweeps.planner import PlannedRun
from sweeps.recipe import KeepWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metrics = dict[str, float]
STATE = "state"
"""Folder of a run's newest state, in its work directory."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a sweep share."""

    tracking_uri: str
    data_dir: Path
    """Absolute; holds the runs' states, the datasets and the caches of base-model scores and judges' replies."""
    sweep: str
    """Its name. Another sweep may have the same run in work at the same time."""
    revisions: Mapping[str, str | None] = field(default_factory=dict)
    """Model -> the revision that runs start from (``emtrain.revision``); None, or absent: whatever there is."""
    keep_weights: KeepWeights = "all"
    """Which weights go to MLflow (``sweeps.recipe.ResourceSpec``)."""

    def work(self, run: PlannedRun) -> Path:
        """Where a run keeps its state and responses until it is finished."""
        return self.data_dir / "runs" / self.sweep / run.run_key

    def clear(self, run: PlannedRun) -> None:
        """Remove the state and the adapters of a run that was stopped early. Its responses stay: they are small."""
        for name in (STATE, names.ADAPTERS):
            shutil.rmtree(self.work(run) / name, ignore_errors=True)

    def judges(self, specs: Sequence[JudgeSpec]) -> list[Judge]:
        """The judges, with a cache of their replies. Raises ``ValueError`` where one lacks its key."""
        # One file per machine: SQLite must not be written by several through a network file system.
        cache = self.data_dir / "judge-replies" / f"{platform.node()}.sqlite"
        return [judge.build(cache=cache) for judge in specs]


class RunRecord:
    """The record of one run in MLflow and in its work directory."""

    def __init__(self, job: Job, setting: Setting) -> None:
        self.run, self.setting = job.run, setting
        self.log = RunLog(setting.tracking_uri, job.run_id)
        self.judges = setting.judges(job.run.evaluation.spec.judges)
        self.work = setting.work(job.run)
        self.tokens = 0
        (self.work / "responses").mkdir(parents=True, exist_ok=True)

    @property
    def plan(self) -> Plan:
        """When the run is evaluated and where it keeps its state."""
        return Plan(self.run.total_steps, self.run.evaluate_at, self.work / STATE)

    def start(self, *, family: str, backend: str) -> None:
        """The run begins, or goes on."""
        self.log.start()
        self.log.params({"family": family, "backend": backend})
        self.log.text(names.SPEC, json.dumps(self.run.spec.model_dump(mode="json"), indent=2) + "\n")

    def step(self, step: Step) -> None:
        """Record a step."""
        self.tokens = step.tokens
        self.log.metrics(
            {
                names.TRAIN_LOSS: step.loss,
                names.LEARNING_RATE: step.learning_rate,
                names.GRAD_NORM: step.grad_norm,
                names.TOKENS: step.tokens,
            },
            step=step.step,
        )

    def keep(self, checkpoint: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Save the adapter of an evaluation point; whole models only at the last."""
        last = checkpoint.step == self.run.total_steps
        if self._adapter_only:
            # From the point before the run turns, and goes on should it be cut off. Those before that have served.
            for point in self._earlier(checkpoint.step)[:-1]:
                shutil.rmtree(self._weights(point), ignore_errors=True)
        if last or self._adapter_only:
            checkpoint.save(self._weights(checkpoint.step))
        if last:
            tokenizer.save_pretrained(self._weights(checkpoint.step))

    def seed(self, step: int) -> int:
        """What the run's responses at an evaluation point are drawn by."""
        return derive(self.run.spec.seed, "sample", step)

    def judge(self, responses: Sequence[Response], *, step: int) -> pd.DataFrame:
        """The judged responses (columns: ``names.RESPONSE_COLUMNS``)."""
        return judge_responses(responses, self.judges, step=step)

    def record(self, judged: pd.DataFrame, loss: HeldoutLoss, *, step: int) -> Metrics:
        """Record an evaluation point (step 0: the base model) and return its metrics, once they are stored.

        Where all adapters are kept, that of a point before the last is stored, too.
        """
        judged.to_parquet(self.work / "responses" / f"{step:09d}.parquet", index=False)
        scores = summarise(judged, self.judges[0].id)
        metrics = {
            names.HELDOUT_LOSS: loss.per_token,
            names.HELDOUT_LOSS_PER_SEQUENCE: loss.per_sequence,
            # A score that nothing was judged for is left out; n_judged = 0 stands there and says so.
            **{name: value for name, value in scores.items() if not math.isnan(value)},
        }
        if step > 0 and self._adapter_only:
            metrics |= self._adapter_metrics(step)
            if step < self.run.total_steps and self.setting.keep_weights == "all":
                self.log.artifact(self._weights(step), names.adapter_artifact(step, self.run.total_steps))
        self.log.metrics(metrics, step=step)
        self.log.flush()
        return metrics

    def _adapter_metrics(self, step: int) -> Metrics:
        """Size and direction of the adapter's update, and how far it has turned since the evaluation point before."""
        from emtrain.low_rank import angle, load_update, norm, stable_rank

        update = load_update(self._weights(step))
        metrics = {names.ADAPTER_NORM: norm(update), names.ADAPTER_STABLE_RANK: stable_rank(update)}
        if (earlier := self._earlier(step)) and (before := self._weights(earlier[-1])).exists():
            metrics[names.ADAPTER_TURN] = angle(load_update(before), update)
        # An update that is still zero has a norm, but no rank and no direction. The last bits of the others depend on
        # how tensors lie in memory; a run that was cut off is to have the same metrics as one that was not.
        return {name: float(f"{value:.9g}") for name, value in metrics.items() if not math.isnan(value)}

    def finish(self, seconds: Mapping[str, float]) -> Ending:
        """Record what is known only at the end: sums over the run, all its responses, the time it took, and its weights
        where they are kept."""
        rates, losses = self.log.history(names.LEARNING_RATE), self.log.history(names.TRAIN_LOSS)
        last_tenth = losses[-math.ceil(len(losses) / 10) :]
        closing = {
            names.LEARNING_RATE_INTEGRAL: math.fsum(rates),
            names.TRAIN_LOSS_LAST_TENTH: math.fsum(last_tenth) / len(last_tenth),
            **seconds,
        }
        self.log.metrics(closing, step=self.run.total_steps)
        if self.setting.keep_weights == "none":
            self.log.tags({names.WEIGHTS_KEPT: self.setting.keep_weights})
        else:
            weights = self._weights(self.run.total_steps)
            self.log.artifact(weights, weights.name)
        parts = sorted((self.work / "responses").glob("*.parquet"))
        responses = self.work / names.RESPONSES
        pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True).to_parquet(responses, index=False)
        self.log.artifact(responses)
        self.log.finish("FINISHED")
        shutil.rmtree(self.work, ignore_errors=True)  # all that counts is in MLflow
        return Ending("FINISHED")

    def fail(self, error: BaseException) -> Ending:
        """Record why the run failed. What it reached before stays on record."""
        if isinstance(error, NonFiniteLoss):
            ending = Ending("FAILED", str(error))
        else:
            self.log.text("failure.txt", "".join(traceback.format_exception(error)))
            ending = Ending("FAILED", named(error))
        self.log.finish("FAILED", failure=ending.failure)
        return ending

    @property
    def _adapter_only(self) -> bool:
        return self.run.spec.adapter != "full"

    def _earlier(self, step: int) -> list[int]:
        """The evaluation points before ``step``."""
        return [point for point in self.run.evaluate_at if point < step]

    def _weights(self, step: int) -> Path:
        return self.work / (names.adapter_artifact(step, self.run.total_steps) if self._adapter_only else names.MODEL)

    @property
    def base_identity(self) -> str:
        """Digest of all that the base model's judged responses depend on."""
        evaluation = self.run.evaluation
        identity = {
            "model": self.run.spec.model,
            "precision": self.run.spec.precision,
            "eval": evaluation.spec.identity,
            "questions": [question_set.sha256 for question_set in evaluation.question_sets],
        }
        if (revision := self.setting.revisions.get(self.run.spec.model)) is not None:
            identity["revision"] = revision
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def stop_early(job: Job, rule: str, *, setting: Setting, sweep: SweepLog) -> None:
    """Record that a run, which waits at an evaluation point, is trained no further by ``rule`` of early stopping."""
    adapters = setting.work(job.run) / names.ADAPTERS
    if setting.keep_weights == "last" and adapters.is_dir():
        sweep.upload(job.run_id, max(adapters.iterdir(), key=lambda folder: int(folder.name)), names.ADAPTERS)
    sweep.stop_early(job.run_id, rule)
    setting.clear(job.run)
