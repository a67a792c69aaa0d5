"""Which run of a sweep comes next: the grid, then what the search proposes, then the confirmation of its winners.

The agenda enters each run in MLflow before it is given out, and knows from there which are finished, so a sweep that
is started again walks the same way and skips what is done.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emtrain import names
from emtrain.spec import RunSpec
from emtrain.tracking import SweepLog, environment_tags, metrics_at
from sweeps.lease import Job
from sweeps.planner import (
    Evaluation,
    PlannedRun,
    SweepPlan,
    confirmation,
    datasets_of,
    examples,
    plan_run,
    run_names,
)
from sweeps.recipe import Recipe, changed
from sweeps.search_spec import SearchSpec

if TYPE_CHECKING:
    from mlflow.entities import Run

    from sweeps.search import Bounds, Metrics, Proposal, Search


def is_over(known: "Run") -> bool:
    """Whether a run, as MLflow has it, is not to be taken up again: it is finished, or was stopped early."""
    return known.info.status == "FINISHED" or names.STOPPED in known.data.tags


@dataclass(frozen=True)
class Ended:
    """A run that is over: its status and the metrics of its end."""

    run: PlannedRun
    status: str
    metrics: "Metrics"


class Agenda:
    """Gives out the jobs of a sweep, each once, and is told how they ended.

    ``search`` is the recipe's search as a study, None where it has none.
    """

    def __init__(self, recipe: Recipe, plan: SweepPlan, sweep: SweepLog, search: "Search | None") -> None:
        self.recipe, self.plan, self.sweep, self.search = recipe, plan, sweep, search
        self.environment = environment_tags()
        self.revisions: Mapping[str, str | None] = {}
        """Model -> what its runs start from, which they are tagged with; set before the first is given out."""
        self.known = sweep.runs()
        for found in self.known.values():
            # Its process is gone: nobody else runs the sweep. It may not be among what this recipe asks for.
            if found.info.status == "RUNNING":
                sweep.set_status(found.info.run_id, "KILLED")
        self.ends: dict[str, Ended] = {}
        """Run key -> end, of every run that is over."""
        self.out: dict[str, Job] = {}
        """Run key -> job, of those given out."""
        self.proposals: dict[str, list[Proposal]] = {}
        self.over = False
        self._bounds: Bounds | None = None
        self._stages = self._walk()

    @property
    def recorded_revisions(self) -> dict[str, str]:
        """Model -> what the first run with it started from, of those that a former call entered and tagged."""
        found: dict[str, str] = {}
        for run in self.known.values():
            if names.MODEL_REVISION in run.data.tags:
                found.setdefault(run.data.params["model"], run.data.tags[names.MODEL_REVISION])
        return found

    @classmethod
    def open(cls, recipe: Recipe, plan: SweepPlan, sweep: SweepLog, *, data_dir: Path) -> "Agenda":
        """The agenda of a recipe, with its study, where it has a search, in ``data_dir``.

        Raises ``ValueError`` when a sweep to start the search from is not there, or the study was begun with
        another search, base run or evaluation.
        """
        agenda = cls(recipe, plan, sweep, None)
        if recipe.search is not None:
            agenda.search = agenda._study(recipe.search, f"sqlite:///{data_dir / 'optuna.db'}")
        return agenda

    def _study(self, spec: SearchSpec, database: str) -> "Search":
        import optuna

        from sweeps.search import Search

        others = [SweepLog.find(other, uri=self.sweep.uri) for other in spec.warm_start]
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = optuna.storages.RDBStorage(database)
        return Search(
            spec,
            self.recipe.base,
            name=self.recipe.name,
            storage=storage,
            check=lambda run: plan_run(run, self.plan.evaluation, name=""),
            evaluation=self._evaluation(spec),
            bounds=self.bounds,
            warm_start=lambda: self._comparable(others),
        )

    def _comparable(self, others: Sequence[SweepLog]) -> list[tuple[RunSpec, "Metrics"]]:
        """Specification and metrics of the finished runs of other sweeps that would be the same runs in this one: by
        their rows, questions, judges and weights, too."""
        found: dict[str, tuple[RunSpec, Metrics]] = {}
        for other in others:
            for known in other.finished({names.QUESTIONS_SHA256: self.plan.evaluation.questions_tag}):
                try:
                    run = plan_run(RunSpec.model_validate(other.spec(known)), self.plan.evaluation, name="")
                except ValueError:
                    continue  # what it was trained on is not here any more
                weights = {self.revisions.get(run.spec.model), known.data.tags.get(names.MODEL_REVISION)} - {None}
                if run.run_key == known.data.tags[names.RUN_KEY] and len(weights) < 2:
                    found[run.run_key] = run.spec, metrics_at(known, run.total_steps)
        return list(found.values())

    def _evaluation(self, spec: SearchSpec) -> dict[str, Any]:
        """What the values of the search's trials depend on besides the specifications of their runs."""
        searched = examples(self.recipe, replace(self.plan, runs=()))
        pairs = [pair for run in searched for pair in zip(datasets_of(run.spec), run.dataset.digests, strict=False)]
        found = {**self.plan.evaluation.identity, "datasets": dict(pairs)}
        if any(bound.of_baseline for bound in spec.constraints.values()):
            found |= self.recipe.model_dump(mode="json", include={"grid"})  # which trials are feasible follows from it
        return found

    def next(self) -> Job | None:
        """The next job; None while others must end first, or when the sweep is ``over``."""
        job = next(self._stages, _END)
        self.over = job is _END
        return job if isinstance(job, Job) else None

    def ended(self, run_key: str, status: str, metrics: "Metrics") -> None:
        """A job that was given out is over: FINISHED, FAILED, or KILLED by early stopping."""
        job = self.out.pop(run_key)
        self._record(Ended(job.run, status, metrics))

    def _walk(self) -> Iterator[Job | None]:
        """Jobs in order; None where the next one depends on some that are out."""
        for run in self.plan.runs:
            yield from self._give(run, "grid")
        if self.search is None:
            return
        if any(bound.of_baseline for bound in self.search.spec.constraints.values()):
            yield from self._wait()
        self.bounds()  # one that there is no baseline for is told before a trial is trained
        while not self.search.over:
            proposal = self.search.propose()
            if proposal is None:
                if not self.search.over:  # as when the last points could be no runs
                    yield None
                continue
            run = self._planned(proposal.spec, self.plan.evaluation)
            # Two trials may want the same run: it is trained once and counts for both.
            self.proposals.setdefault(run.run_key, []).append(proposal)
            if run.run_key not in self.out:
                yield from self._give(run, "search")
        yield from self._wait()
        for run in self._confirmation():
            yield from self._give(run, "confirm")

    def _wait(self) -> Iterator[None]:
        while self.out:
            yield None

    def _give(self, run: PlannedRun, role: str) -> Iterator[Job]:
        """The job of a run, entered in MLflow; nothing when the run is over already."""
        known = self.known.get(run.run_key)
        if run.run_key in self.ends:
            self._record(self.ends[run.run_key])
            return
        if known is not None and is_over(known):
            # The tag is set before the status, and a process may die in between.
            status = "KILLED" if names.STOPPED in known.data.tags else known.info.status
            self._record(Ended(run, status, metrics_at(known, run.total_steps)))
            return
        revision = self.revisions.get(run.spec.model)
        pin = {} if revision is None else {names.MODEL_REVISION: revision}
        tags = {**self.environment, **run.tags, **pin, names.ROLE: role}
        run_id = self.sweep.plan(run.run_key, name=run.name, params=run.params, tags=tags, entered=known)
        self.out[run.run_key] = job = Job(run, run_id, role)
        yield job

    def _record(self, end: Ended) -> None:
        self.ends[end.run.run_key] = end
        for proposal in self.proposals.pop(end.run.run_key, []):
            assert self.search is not None
            metrics = end.metrics if end.status == "FINISHED" else None
            self.search.ended(proposal, metrics, stopped_early=end.status == "KILLED")

    def _planned(self, spec: RunSpec, evaluation: Evaluation) -> PlannedRun:
        return plan_run(spec, evaluation, name=run_names([self.recipe.base, spec])[1])

    def _confirmation(self) -> list[PlannedRun]:
        """The winners and the cells they are measured against, with new seeds and new questions."""
        assert self.search is not None
        confirm, evaluation = self.search.spec.confirm, confirmation(self.recipe)
        if confirm is None or evaluation is None:
            return []
        # Without the base run's seed, as cells are: a winner may be one of them.
        winners = self.search.winners(confirm.winners)
        specs = [changed(self.recipe.base, {**changes, "seed": 0}) for changes in winners]
        specs += self._baseline_cells()
        return [
            self._planned(spec.model_copy(update={"seed": seed}), evaluation)
            for spec in dict.fromkeys(specs)
            for seed in confirm.seeds
        ]

    def _cells(self, metric: str) -> dict[RunSpec, float]:
        """The mean of a metric over the seeds of each of the grid's cells, of finished runs that have it: in one whose
        judge was away it is missing."""
        cells: dict[RunSpec, list[float]] = {}
        for run in self.plan.runs:
            end = self.ends.get(run.run_key)
            if end is not None and end.status == "FINISHED" and math.isfinite(end.metrics.get(metric, math.nan)):
                cells.setdefault(run.spec.model_copy(update={"seed": 0}), []).append(end.metrics[metric])
        return {cell: statistics.fmean(values) for cell, values in cells.items()}

    def _baseline_cells(self) -> list[RunSpec]:
        """The cells of the grid that the winners are measured against: those that the baselines of the constraints come
        from; without such constraints the best one in the search's last objective. None without a finished grid."""
        assert self.search is not None
        spec = self.search.spec
        wanted = [(metric, bound.at_most is None) for metric, bound in spec.constraints.items() if bound.of_baseline]
        metric, direction = list(spec.objectives.items())[-1]
        return [
            (max if largest else min)(cells, key=cells.__getitem__)
            for metric, largest in wanted or [(metric, direction == "maximize")]
            if (cells := self._cells(metric))
        ]

    def bounds(self) -> "Bounds":
        """The feasible range of each constrained metric, the grid's figures put in.

        Raises ``ValueError`` when a bound is the baseline and no run of the grid has finished with its metric.
        """
        assert self.search is not None
        if self._bounds is not None:
            return self._bounds
        found = {}
        for metric, bound in self.search.spec.constraints.items():
            lowest = self._bound(metric, bound.at_least, max, -math.inf)
            found[metric] = (lowest, self._bound(metric, bound.at_most, min, math.inf))
        self._bounds = found  # asked for by every trial, and the grid is over
        return found

    def _bound(self, metric: str, limit: Any, best: Any, none: float) -> float:
        if limit is None:
            return none
        if limit != "baseline":
            return float(limit)
        cells = self._cells(metric)
        if not cells:
            raise ValueError(
                f"search.constraints.{metric}: there is no baseline, since no run of the grid has finished with a "
                f"{metric}; see how they ended (emsweep status {self.recipe.name}), or give the bound as a number"
            )
        return float(best(cells.values()))


_END = object()
