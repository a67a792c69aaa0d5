"""Runs a planned sweep with Ray Tune: every run that has not finished yet, each as one trial."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
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
from ray.tune.search import Searcher

from sweeps import worker
from sweeps.agenda import Agenda
from sweeps.progress import Display

OBJECT_STORE_BYTES = 150 * 2**20
"""Runs exchange next to nothing; Ray's default would claim a third of the machine's memory."""
WORKER_DEATHS = 2
"""How often a run whose worker process died is begun again, from its newest state, before it counts as failed."""


class Interrupted(RuntimeError):
    """The user stopped the sweep; what was finished is kept."""


def execute(
    agenda: Agenda, setting: worker.Setting, *, models: Sequence[str], address: str | None, display: Display
) -> None:
    """Train what the agenda gives out, on the Ray at ``address`` or on one of this process's own when None.

    ``models`` are made ready first. Raises ``Interrupted`` after Ctrl-C, with the runs in work marked KILLED; they go
    on at the next call.
    """
    _connect(address)
    try:
        # Once and side by side, instead of all workers waiting for the first one's lock.
        prepare = ray.remote(num_cpus=1)(worker.prepare_model)
        ray.get([prepare.remote(model) for model in models])
        _tune(agenda, setting, display)
    finally:
        ray.shutdown()
    if not agenda.over:
        for job in agenda.out.values():
            agenda.sweep.set_status(job.run_id, "KILLED")
        raise Interrupted(f"{len(agenda.out)} runs were in work")


def _connect(address: str | None) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        # Keeps a Ray of one machine on the loopback interface.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def _tune(agenda: Agenda, setting: worker.Setting, display: Display) -> None:
    resources = ray.cluster_resources()
    wanted = agenda.recipe.resources.max_concurrent
    concurrent = int(resources.get("GPU") or resources["CPU"]) if wanted == "auto" else wanted
    with tempfile.TemporaryDirectory(prefix="emsweep-tune-") as scratch:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trial, setting=setting), {"cpu": 1, "gpu": 1 if resources.get("GPU") else 0}
            ),
            tune_config=tune.TuneConfig(
                search_alg=_Source(agenda, display),
                num_samples=-1,  # until the source says that it is over
                max_concurrent_trials=concurrent,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=agenda.recipe.name,
                storage_path=scratch,
                verbose=0,
                callbacks=[_Feed(display)],
                failure_config=tune.FailureConfig(max_failures=WORKER_DEATHS),
            ),
        )
        tuner.fit()


def _trial(config: Mapping[str, Any], *, setting: worker.Setting) -> None:
    """One trial: a thin shell around ``worker.do``, in a process that Tune uses again for the next trial."""
    last: dict[str, float] = {}

    def report(metrics: Mapping[str, float]) -> bool:
        last.update(metrics)
        tune.report(dict(metrics))
        return True

    ending = worker.do(config["job"], setting, report)
    # The last report is what the source is given at the end, so it carries the metrics of the end once more.
    tune.report({**last, STATUS: ending.status, FAILURE: ending.failure})


STATUS, FAILURE = "emsweep/status", "emsweep/failure"


class _Unsaved:
    """Not part of the snapshots that Tune pickles of an experiment: a sweep goes on from MLflow, never from those."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_Unsaved, Searcher):
    """Gives Tune the jobs of an agenda, and the agenda their ends."""

    def __init__(self, agenda: Agenda, display: Display) -> None:
        super().__init__()
        self.agenda, self.display = agenda, display
        self.jobs: dict[str, worker.Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        job = self.agenda.next()
        if job is None:
            return Searcher.FINISHED if self.agenda.over else None
        self.jobs[trial_id] = job
        self.display.planned(job.run)
        return {"job": job}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.jobs.pop(trial_id)
        if error or not result or STATUS not in result:
            status, failure = "FAILED", f"the worker process died {WORKER_DEATHS + 1} times"
            self.agenda.sweep.fail(job.run_id, failure)
        else:
            status, failure = result[STATUS], result[FAILURE]
        metrics = {name: value for name, value in (result or {}).items() if name.startswith(METRIC_PREFIXES)}
        self.agenda.ended(job.run.run_key, status, metrics)
        self.display.ended(job.run.run_key, status, failure)


METRIC_PREFIXES = ("heldout/", "eval/")
"""Of what a trial reports, the run's own metrics; Tune adds times and ids."""


class _Feed(_Unsaved, tune.Callback):
    """Passes what Tune learns of its running trials on to the display."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.display.started(trial.config["job"].run.run_key)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if STATUS not in result and "step" in result:
            self.display.advanced(trial.config["job"].run.run_key, result)
