"""Early stopping: the recipe's rule as a scheduler of Ray Tune, which sees runs at their evaluation points.

Tune does not hear of a run's end as a count of steps (``sweeps.trials.Trial``): no rule has a say in what is over.
"""

import math
from collections.abc import Sequence
from typing import Any

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from sweeps.outlook import row_tokens_of
from sweeps.planner import PlannedRun
from sweeps.recipe import StoppingSpec


def scheduler(rule: StoppingSpec, runs: Sequence[PlannedRun]) -> TrialScheduler:
    """The scheduler of ``rule``; ``runs``, at least one, are what the sweep's runs are like, the longest among them."""
    longest = max(_length(run, rule.by) for run in runs)
    seen = {"time_attr": rule.by, "metric": rule.metric, "mode": "min" if rule.direction == "minimize" else "max"}
    grace = rule.grace * longest
    if rule.rule == "median":
        # Tune would pause a run that has too few fellows yet, which takes checkpoints of Tune's own: never.
        return _Median(**seen, grace_period=grace, min_time_slice=math.inf)
    # Otherwise Tune stops what has come as far as ``max_t``, which in tokens is an estimate, and holds a run that it
    # has judged at a rung against a lower rung that the run had skipped.
    return ASHAScheduler(
        **seen, max_t=longest, grace_period=grace, reduction_factor=rule.reduction, stop_last_trials=False
    )


def _length(run: PlannedRun, by: str) -> float:
    if by == "steps":
        return run.total_steps
    return run.total_steps * run.spec.batch_size * row_tokens_of(run.spec).mean


class _Median(MedianStoppingRule):
    """Tune's rule takes a run's end for a further result and then fails to find its time, of which an end has none."""

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Any) -> None:
        """Nothing is left to learn: every result has come by ``on_trial_result``."""
