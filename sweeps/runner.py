"""Runs a planned sweep with Ray Tune: every run that has not finished yet, each as one trial."""

import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from emtrain import names
from emtrain.load import files_at_hand, on_hub
from sweeps import cluster, throughput
from sweeps.agenda import Agenda, is_over
from sweeps.connection import Connection
from sweeps.content import keep_datasets, pinned
from sweeps.engine import Engine
from sweeps.halving import Halving, rung_steps
from sweeps.lease import Job, base_of
from sweeps.packing import heaviest, worth_packing
from sweeps.planner import PlannedRun, examples
from sweeps.progress import Display
from sweeps.recipe import StoppingSpec
from sweeps.record import Setting, stop_early
from sweeps.stopping import fellows, reports_before, scheduler
from sweeps.trials import FAILURE, LACK, NOTE, STATUS, Trial, TrialHost, in_one_process

if TYPE_CHECKING:
    from emtrain.packed.gain import Packing


class Interrupted(RuntimeError):
    """The user stopped the sweep; what was finished is kept."""


class HostDied(RuntimeError):
    """The process of the trials is gone, and with it the sweep; what was finished is kept."""


def execute(agenda: Agenda, setting: Setting, *, connection: Connection, display: Display) -> None:
    """Train what the agenda gives out, on the Ray that ``connection`` is open to, and close it.

    Models and datasets are made ready first. Raises ``Interrupted`` after Ctrl-C, ``HostDied`` when the process of the
    trials dies, with the runs in work marked KILLED; they go on at the next call. Raises ``ValueError`` when a model or
    dataset can't be made ready.
    """
    runs = examples(agenda.recipe, agenda.plan)
    keep_datasets(runs, setting.data_dir)
    revisions = pinned(dict.fromkeys(run.spec.model for run in runs), agenda.recorded_revisions)
    for model, revision in revisions.items():
        if revision is None and on_hub(model):
            display.note(
                f"{model}: neither the hub nor the cache of this machine tells its commit; should the repository move "
                "on meanwhile, later runs start from other weights"
            )
    agenda.revisions, setting = revisions, replace(setting, revisions=revisions)
    died: HostDied | None = None
    try:
        if connection.own:
            capacity = cluster.Capacity.of(ray.cluster_resources())
            lacking = {model: of for model, of in revisions.items() if files_at_hand(model, revision=of) is None}
            cluster.fetch_models(lacking, [])
        else:
            capacity = cluster.capacity()
            cluster.check_shared(setting.data_dir)
            cluster.fetch_models(revisions, cluster.trainers(capacity))
        _tune(agenda, setting, display, capacity, runs)
    except KeyboardInterrupt:
        pass  # the agenda is not over, which is told below
    except HostDied as error:
        died = error
    finally:
        connection.close()
    stopped = [end.run for end in agenda.ends.values() if end.status == "KILLED"]
    interrupted = agenda.out or not agenda.over
    if stopped or interrupted:
        connection.wait()  # engines must be gone before the files of their runs are removed, or their status is told
    for run in stopped:
        setting.clear(run)  # of a state that was still being written when the run was stopped
    if interrupted:
        recorded = agenda.sweep.runs()
        for run_key, job in agenda.out.items():
            run = recorded[run_key]
            if run.info.status in ("FINISHED", "FAILED"):  # before its engine was gone
                display.ended(run_key, run.info.status, run.data.metrics, run.data.tags.get(names.FAILURE))
            else:
                agenda.sweep.set_status(job.run_id, "KILLED")
        raise died or Interrupted(f"{len(agenda.out)} runs were in work")


def _tune(
    agenda: Agenda, setting: Setting, display: Display, capacity: cluster.Capacity, samples: Sequence[PlannedRun]
) -> None:
    """``samples`` has a run of every kind that the sweep may train."""
    wanted = agenda.recipe.resources
    # No more than there are runs: each may make a cloud start a machine.
    runs = None if agenda.recipe.search else len(agenda.plan.runs)
    count = capacity.engines if runs is None else min(capacity.engines, runs)
    most = 1 if wanted.backend == "trl" else MOST_PACKED if wanted.pack == "auto" else wanted.pack
    if wanted.max_concurrent != "auto":
        count = min(count, wanted.max_concurrent)
        most = min(most, math.ceil(wanted.max_concurrent / count))
    if runs is not None:
        most = min(most, math.ceil(runs / count))  # so that every engine has some
    yardsticks = heaviest(samples) if wanted.pack == "auto" and most > 1 else {}
    stopping = agenda.recipe.stopping
    halving = stopping is not None and stopping.rule == "halving"

    def concurrent(packed: int) -> int:
        # While one half is being judged and Tune makes up its mind, the other trains.
        trials = 2 * count * packed if wanted.max_concurrent == "auto" else wanted.max_concurrent
        return max(trials, len(agenda.plan.runs)) if halving else trials  # all are to come to a rung

    make = ray.remote(Engine).options(
        # Ray starts an engine that dies anew, on another node where its own is lost.
        num_cpus=1,
        num_gpus=capacity.gpus_per_engine,
        max_restarts=-1,
        max_concurrency=4 * count * most + 4,
    )
    bases = {base_of(run.spec) for run in samples}
    only_base = bases.pop() if len(bases) == 1 else None
    engines = {
        f"engine-{number}": make.remote(
            setting, capacity=most, heaviest=yardsticks, only_base=only_base, backend=wanted.backend
        )
        for number in range(count)
    }
    make_host = ray.remote(TrialHost).options(num_cpus=0, resources=_here(), max_concurrency=2 * concurrent(most) + 4)
    host = make_host.remote(engines, slots=0 if yardsticks else most, halving=_halving(agenda) if halving else None)
    # Trials begin, and wait, while the engines start and measure.
    packed = host.pack.remote(list(yardsticks)) if yardsticks else most
    source = _Source(agenda, setting, display, host, packed=packed, concurrent=concurrent)
    with tempfile.TemporaryDirectory(prefix="emsweep-tune-") as scratch, in_one_process(host):
        tuner = tune.Tuner(
            Trial,
            tune_config=tune.TuneConfig(
                search_alg=source,
                num_samples=-1,  # until the source says that it is over
                scheduler=None if stopping is None or halving else _scheduler(agenda, stopping, samples),
                max_concurrent_trials=concurrent(most) + 1,  # so that the source, which has its own limit, is asked
            ),
            run_config=tune.RunConfig(
                name=agenda.recipe.name,
                storage_path=scratch,
                # Engines keep the states of their runs.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                verbose=0,
                callbacks=[_Feed(display)],
            ),
        )
        tuner.fit()
    if source.host_died:
        raise HostDied("the process of the trials died: it was killed, or the machine ran out of memory")
    if source.packings is None:  # else no run has begun, and engines may not even answer
        _account(host, agenda)


def _account(host: Any, agenda: Agenda) -> None:
    """Keep what the engines have done with the sweep, and how fast, for the next plan."""
    try:
        worked: list[dict[str, throughput.Work]] = ray.get(host.worked.remote())
    except ray.exceptions.RayError:
        return  # an engine was lost at the very end; the next sweep measures again
    done = [{model: asdict(work) for model, work in works.items()} for works in worked]
    agenda.sweep.write_text(names.WORK, json.dumps(done, indent=2) + "\n")
    for model in {model for works in worked for model in works}:
        measured = throughput.measure([works[model] for works in worked if model in works], sweep=agenda.recipe.name)
        if measured is not None:
            throughput.keep(model, measured)


def _here() -> dict[str, float]:
    """What to ask of Ray for a process that only waits: next to nothing of the node that this process is on.

    On a cluster that is the head, which outlives all workers.
    """
    own = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == own)
    return {f"node:{node['NodeManagerAddress']}": 0.001}


MOST_PACKED = 32
"""Runs packed together where the recipe leaves it open."""


def _scheduler(agenda: Agenda, rule: StoppingSpec, samples: Sequence[PlannedRun]) -> TrialScheduler:
    """The scheduler of the recipe's rule, with what is known of runs that ran before."""
    known = fellows(agenda.known, {run.run_key for run in agenda.plan.runs})
    search = agenda.recipe.search
    baseline = search is not None and any(bound.of_baseline for bound in search.constraints.values())
    return scheduler(rule, samples, reports_before(rule, known, agenda.sweep), whole={"grid"} if baseline else ())


def _halving(agenda: Agenda) -> Callable[[], Halving]:
    """Makes the halving of the grid's runs, with what is known of those that ran before."""
    rule, runs = agenda.recipe.stopping, agenda.plan.runs
    assert rule is not None
    longest = max(run.total_steps for run in runs)
    known = {run.run_key: agenda.known[run.run_key] for run in runs if run.run_key in agenda.known}
    return functools.partial(
        Halving,
        {
            run.run_key: rung_steps(run.evaluate_at, longest=longest, grace=rule.grace, reduction=rule.reduction)
            for run in runs
        },
        metric=rule.metric,
        reduction=rule.reduction,
        direction=rule.direction,
        known={key: agenda.sweep.history(run.info.run_id, rule.metric) for key, run in known.items()},
        over=[key for key, run in known.items() if is_over(run)],
    )


class _Unsaved:
    """Not part of the snapshots that Tune pickles of an experiment: a sweep goes on from MLflow, never from those."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Source(_Unsaved, Searcher):
    """Gives Tune the jobs of an agenda, and the agenda their ends.

    ``packed``: how many runs an engine trains at once, or Ray's handle of what the engines have yet to measure (base ->
    packing). ``concurrent`` says how many jobs to give out for that; as for one until it is known. ``host`` is the
    process of the trials. Once it has died no more jobs are given out, and those that were in work stay out: they did
    not fail, and the study of a search must not hear so.
    """

    def __init__(
        self,
        agenda: Agenda,
        setting: Setting,
        display: Display,
        host: Any,
        *,
        packed: "int | ray.ObjectRef[dict[str, Packing]]",
        concurrent: Callable[[int], int],
    ) -> None:
        super().__init__()
        self.agenda, self.setting, self.display, self.concurrent = agenda, setting, display, concurrent
        self.host, self.host_died = host, False
        self.packings = None if isinstance(packed, int) else packed
        self.most_out = concurrent(packed if isinstance(packed, int) else 1)
        self.rule = agenda.recipe.stopping.rule if agenda.recipe.stopping else ""
        self.jobs: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.packings is not None and ray.wait([self.packings], timeout=0)[0] and self._host_lives():
            self._packed(ray.get(self.packings))
            self.packings = None
        if self.host_died:
            return Searcher.FINISHED
        if len(self.jobs) >= self.most_out:
            return None
        job = self.agenda.next()
        if job is None:
            return Searcher.FINISHED if self.agenda.over else None
        self.jobs[trial_id] = job
        self.display.planned(job.run)
        return {"job": job}

    def _packed(self, packings: "Mapping[str, Packing]") -> None:
        """The packings by base, as text, are said and kept."""
        for base, packing in packings.items():
            self.display.note(f"{base}: {packing}")
        text = json.dumps({base: asdict(packing) for base, packing in packings.items()}, indent=2)
        self.agenda.sweep.write_text(names.PACKING, text + "\n")
        self.most_out = self.concurrent(worth_packing(packings))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job, result = self.jobs.pop(trial_id), result or {}
        status, failure = result.get(STATUS), result.get(FAILURE)
        if status is None and error and not self._host_lives():
            return
        if status is None and error:
            status, failure = "FAILED", "the process that trained it died again and again"
            self.agenda.sweep.fail(job.run_id, failure)
        elif status is None:
            status, failure = "KILLED", f"stopped early by {self.rule}"
            stop_early(job, self.rule, setting=self.setting, sweep=self.agenda.sweep)
        metrics = {name: value for name, value in result.items() if name.startswith(METRIC_PREFIXES)}
        self.agenda.ended(job.run.run_key, status, metrics)
        self.display.ended(job.run.run_key, status, metrics, failure)

    def _host_lives(self) -> bool:
        if not self.host_died:
            try:
                ray.get(self.host.__ray_ready__.remote())
            except ray.exceptions.RayActorError:
                self.host_died = True
        return not self.host_died


METRIC_PREFIXES = ("heldout/", "eval/")
"""Of what a trial reports, the run's own metrics; Tune adds times and ids."""


class _Feed(_Unsaved, tune.Callback):
    """Passes what Tune learns of its running trials on to the display."""

    def __init__(self, display: Display) -> None:
        self.display = display

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self.display.started(trial.config["job"].run.run_key)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result.get(NOTE):
            self.display.note(f"trained alone: {result[NOTE]}")
        if result.get(LACK):
            self.display.note(f"{result[LACK]}; its runs are trained elsewhere")
        if "steps" in result:
            self.display.advanced(trial.config["job"].run.run_key, result)
