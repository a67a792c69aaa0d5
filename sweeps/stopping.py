"""Early stopping: the recipe's rule as a scheduler of Ray Tune, which sees runs at their evaluation points.

Tune does not hear of a run's end as a count of steps (``sweeps.trials.Trial``): no rule has a say in what is over.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from emtrain import names
from sweeps.outlook import row_tokens_of
from sweeps.planner import PlannedRun
from sweeps.recipe import StoppingSpec

if TYPE_CHECKING:
    from mlflow.entities import Run

    from emtrain.tracking import SweepLog

Reports = Mapping[str, Sequence[Mapping[str, float]]]
"""Run key -> what the run told at its evaluation points, in order."""


def scheduler(
    rule: StoppingSpec, runs: Sequence[PlannedRun], before: Reports, *, whole: Collection[str] = ()
) -> TrialScheduler:
    """The scheduler of ``rule``; ``runs``, at least one, are what the sweep's runs are like, the longest among them.

    ``before`` is what runs reported when the sweep was started before: new ones are held against them, too. Runs in a
    role of ``whole`` are trained to their ends, and others held against them; those that confirm the winners of a
    search likewise, which were asked something else: none is held against them.
    """
    longest = max(_length(run, rule.by) for run in runs)
    seen = {"time_attr": rule.by, "metric": rule.metric, "mode": "min" if rule.direction == "minimize" else "max"}
    grace = rule.grace * longest
    if rule.rule == "median":
        # Tune would pause a run that has too few fellows yet, which takes checkpoints of Tune's own: never.
        return _ByRunKey(MedianStoppingRule(**seen, grace_period=grace, min_time_slice=math.inf), rule, before, whole)
    # Otherwise Tune stops what has come as far as ``max_t``, which in tokens is an estimate, and holds a run that it
    # has judged at a rung against a lower rung that the run had skipped.
    asha = ASHAScheduler(
        **seen, max_t=longest, grace_period=grace, reduction_factor=rule.reduction, stop_last_trials=False
    )
    return _ByRunKey(asha, rule, before, whole)


def reports_before(rule: StoppingSpec, known: Mapping[str, "Run"], sweep: "SweepLog") -> Reports:
    """What the ``known`` runs of a sweep, by run key, told ``rule`` when it was started before."""
    found = {}
    for run_key, run in known.items():
        if rule.metric not in run.data.metrics:
            continue
        values = sweep.history(run.info.run_id, rule.metric)
        tokens = sweep.history(run.info.run_id, names.TOKENS) if rule.by == "tokens" else {}
        # Neither the base model's score, at step 0, nor that of the end was told.
        points = sorted(step for step in values if 0 < step < int(run.data.params["total_steps"]))
        found[run_key] = [
            {rule.metric: values[step], rule.by: tokens[step] if rule.by == "tokens" else step} for step in points
        ]
    return found


def fellows(known: Mapping[str, "Run"], planned: Collection[str]) -> dict[str, "Run"]:
    """Those of the ``known`` runs that others are held against: in this recipe's grid (``planned`` run keys), or of its
    search."""
    return {key: run for key, run in known.items() if key in planned or run.data.tags.get(names.ROLE) == "search"}


def _length(run: PlannedRun, by: str) -> float:
    if by == "steps":
        return run.total_steps
    return run.total_steps * run.spec.batch_size * row_tokens_of(run.spec).mean


@dataclass(frozen=True)
class _Known:
    """What the rules know of a trial: its id. Tune draws a new one at every start, the run's key stays."""

    trial_id: str


class _ByRunKey(FIFOScheduler):
    """A rule of Tune's that takes a run for the same one when the sweep is started again.

    It names no metric to Tune, which would end the sweep at a report without it: of a run that failed before its first
    evaluation point, or where nothing could be judged.
    """

    def __init__(self, rule: TrialScheduler, spec: StoppingSpec, before: Reports, whole: Collection[str]) -> None:
        super().__init__()
        self.rule, self.spec, self.whole = rule, spec, whole
        for run_key, reports in before.items():
            for report in reports:
                self._notice(_Known(run_key), report)

    def _notice(self, run: _Known, report: Mapping[str, float]) -> None:
        """The end of a trial is what a rule takes notice of without judging the trial by it."""
        tune: Any = None  # only asked by rules that pause trials
        self.rule.on_trial_add(tune, run)
        self.rule.on_trial_complete(tune, run, report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A run begins, or goes on."""
        self.rule.on_trial_add(tune_controller, _known(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether a run goes on from an evaluation point. Its end has no count of steps, and is no news to a rule."""
        # Of replicates that are there to be averaged those that survive would be the lucky ones.
        role = trial.config["job"].role
        if role != "confirm" and role not in self.whole:
            return self.rule.on_trial_result(tune_controller, _known(trial), result)
        if role != "confirm" and {self.spec.by, self.spec.metric} <= result.keys():
            self._notice(_known(trial), result)
        return TrialScheduler.CONTINUE


def _known(trial: Any) -> _Known:
    return _Known(trial.config["job"].run.run_key)
