"""Runs a planned sweep with Ray Tune: every run that has not finished yet, each as one trial."""

import logging
import os
import tempfile
from collections.abc import Mapping
from typing import Any

# Before Ray is imported. Its defaults report usage, print tables of their own, turn token authentication on for a
# cluster of one, and move every trial into a directory where the user's relative paths lead nowhere.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
from ray import tune

from emtrain.tracking import SweepLog, environment_tags
from sweeps import worker
from sweeps.planner import PlannedRun, SweepPlan, params
from sweeps.progress import Display
from sweeps.recipe import Recipe

OBJECT_STORE_BYTES = 150 * 2**20
"""Runs exchange next to nothing; Ray's default would claim a third of the machine's memory."""
WORKER_DEATHS = 2
"""How often a run whose worker process died is begun again, from its newest state, before it counts as failed."""


class Interrupted(RuntimeError):
    """The user stopped the sweep; what was finished is kept."""


def enter(plan: SweepPlan, sweep: SweepLog) -> tuple[list[worker.Job], int]:
    """Enter every planned run in MLflow, once. Returns the jobs left to do and how many runs were finished before."""
    known = sweep.runs()
    environment = environment_tags()
    jobs, finished = [], 0
    for run in plan.runs:
        if run.run_key in known and known[run.run_key].info.status == "FINISHED":
            finished += 1
            continue
        if run.run_key in known:
            run_id = known[run.run_key].info.run_id
            sweep.set_status(run_id, "SCHEDULED")
        else:
            run_id = sweep.plan(run.run_key, name=run.name, params=params(run), tags={**environment, **plan.tags(run)})
        jobs.append(worker.Job(run, run_id))
    return jobs, finished


def execute(
    jobs: list[worker.Job],
    setting: worker.Setting,
    sweep: SweepLog,
    recipe: Recipe,
    *,
    address: str | None,
    display: Display,
) -> None:
    """Train the jobs on the Ray at ``address``, or on a Ray of this process's own when None.

    Raises ``Interrupted`` after Ctrl-C, with the runs in work marked KILLED; they go on at the next call.
    """
    _connect(address)
    try:
        _prepare_models([job.run for job in jobs])
        _tune(jobs, setting, sweep, recipe, display)
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        # Keeps a Ray of one machine on the loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _prepare_models(runs: list[PlannedRun]) -> None:
    """Build or fetch every model once, side by side, instead of all workers waiting for the first one's lock."""
    prepare = ray.remote(num_cpus=1)(worker.prepare_model)
    ray.get([prepare.remote(model) for model in dict.fromkeys(run.spec.model for run in runs)])


def _tune(jobs: list[worker.Job], setting: worker.Setting, sweep: SweepLog, recipe: Recipe, display: Display) -> None:
    by_key = {job.run.run_key: job for job in jobs}
    gpus = ray.cluster_resources().get("GPU", 0)
    concurrent = recipe.resources.max_concurrent
    with tempfile.TemporaryDirectory(prefix="emsweep-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, jobs=by_key, setting=setting), {"cpu": 1, "gpu": 1 if gpus else 0}
            ),
            param_space={"run_key": tune.grid_search(list(by_key))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=None if concurrent == "auto" else concurrent, reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=recipe.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Feed(by_key, sweep, display)],
                failure_config=tune.FailureConfig(max_failures=WORKER_DEATHS),
            ),
        )
        tuner.fit()
    unfinished = [key for key, run in display.board.runs.items() if run.status in {"SCHEDULED", "RUNNING"}]
    for key in unfinished:
        if display.board.runs[key].status == "RUNNING":
            sweep.set_status(by_key[key].run_id, "KILLED")
    if unfinished:
        raise Interrupted(f"{len(unfinished)} runs are not finished")


def _trial(config: Mapping[str, Any], *, jobs: Mapping[str, worker.Job], setting: worker.Setting) -> None:
    """One trial: a thin shell around ``worker.do``, in a process that Tune uses again for the next trial."""

    def report(metrics: Mapping[str, float]) -> bool:
        tune.report(dict(metrics))
        return True

    ending = worker.do(jobs[config["run_key"]], setting, report)
    tune.report({"status": ending.status, "failure": ending.failure})


class _Feed(tune.Callback):
    """Passes what Tune learns of its trials on to the display, and the death of a worker on to MLflow."""

    def __init__(self, jobs: Mapping[str, worker.Job], sweep: SweepLog, display: Display) -> None:
        self.jobs, self.sweep, self.display = jobs, sweep, display

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks into a snapshot of the experiment; a sweep goes on from MLflow, never from that.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.display.started(trial.config["run_key"])

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if "status" in result:
            self.display.ended(trial.config["run_key"], result["status"], result["failure"])
        elif "step" in result:
            self.display.advanced(trial.config["run_key"], result)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        run_key = trial.config["run_key"]
        failure = f"the worker process died {WORKER_DEATHS + 1} times"
        self.sweep.fail(self.jobs[run_key].run_id, failure)
        self.display.ended(run_key, "FAILED", failure)
