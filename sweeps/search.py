"""Optuna's part in a sweep: a study whose every trial is one point of the space, trained once per seed.

A trial's value is the mean over its seeds of each objective at the end of the runs; the spread is stored beside it. A
trial with a run that failed is told as failed, one with a run that was stopped early as pruned, so neither misleads
the sampler with numbers of another kind. The study lives in a database under the sweep's name. What it knows of
unfinished trials is enough to go on with them after a restart, so none is left behind as running.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import optuna
from optuna.trial import TrialState
from pydantic import ValidationError

from emtrain.mistakes import explain, shown
from emtrain.spec import RunSpec
from sweeps.recipe import changed
from sweeps.search_spec import SearchSpec
from sweeps.space import draw, locate

Metrics = Mapping[str, float]
Bounds = Mapping[str, tuple[float, float]]
"""Metric -> lowest and highest feasible value."""

ASKED = "asked"
"""Study attribute: what the trials' values depend on, by key of the recipe, JSON."""
CHANGES = "changes"
"""Trial attribute: what to change in the base run, JSON."""
SPREAD = "spread"
"""Trial attribute: standard deviation over seeds of each objective, JSON; absent with one seed."""
REFUSED = "refused"
"""Trial attribute: why its point can't be a run; absent where it can."""


@dataclass
class OpenTrial:
    """A trial whose runs are not all over."""

    handle: optuna.Trial
    changes: dict[str, Any]
    waiting: list[int]
    """Seeds whose runs have not been given out."""
    results: dict[int, Metrics] = field(default_factory=dict)
    """Seed -> metrics of its finished run."""
    lost: dict[int, TrialState] = field(default_factory=dict)
    """Seed -> FAIL or PRUNED, for runs without an end to count."""


@dataclass(frozen=True)
class Proposal:
    """A run that a trial wants."""

    trial: int
    spec: RunSpec


class Search:
    """Proposes runs and learns from their ends.

    ``check`` raises ``ValueError`` for what can't be a run though its values are valid one by one. ``evaluation`` is
    what the metrics depend on besides the runs' specifications, as JSON by key of the recipe. ``bounds`` gives the
    feasible range of the constrained metrics, ``warm_start`` the finished runs of other sweeps to begin with. Both are
    asked for when the search begins, since bounds may come from a grid before it.

    Raises ``ValueError`` when the study is there and was begun with something else, but for the number of trials and
    the sampler.
    """

    def __init__(
        self,
        spec: SearchSpec,
        base: RunSpec,
        *,
        name: str,
        storage: optuna.storages.BaseStorage,
        check: Callable[[RunSpec], object] = lambda spec: None,
        evaluation: Mapping[str, Any] = MappingProxyType({}),
        bounds: Callable[[], Bounds] = dict,
        warm_start: Callable[[], Sequence[tuple[RunSpec, Metrics]]] = tuple,
    ) -> None:
        self.spec, self.base, self.check, self.bounds, self.warm_start = spec, base, check, bounds, warm_start
        self.study = optuna.create_study(
            study_name=name,
            storage=storage,
            directions=list(spec.objectives.values()),
            load_if_exists=True,
        )
        self._check_it_is_the_same_search(evaluation)
        self.study.set_metric_names(list(spec.objectives))  # for who looks at it in a dashboard
        self._seed_sampler()
        self.proposed = sum(CHANGES in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))
        """Trials asked for so far, those that began the study as finished runs of other sweeps left out."""
        self.open: dict[int, OpenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._take_up(trial)

    def _check_it_is_the_same_search(self, evaluation: Mapping[str, Any]) -> None:
        """Values of other runs, or judged by other objectives, mean nothing to this search's sampler and winners."""
        asked = {
            "search": {
                **self.spec.model_dump(mode="json", include={"space", "constraints", "seeds"}),
                "objectives": list(self.spec.objectives.items()),  # the study has their directions in this order
            },
            "base": self.base.model_dump(mode="json", exclude={"seed"}),  # trials have the search's seeds
            **evaluation,
        }
        now = json.loads(json.dumps(asked))
        begun = self.study.user_attrs.get(ASKED)
        if begun is None:
            self.study.set_user_attr(ASKED, json.dumps(now))
        elif differences := _differences(json.loads(begun), now):
            raise ValueError(
                f"the study of the sweep {self.study.study_name!r} was begun with something else, so its trials can't "
                f"be compared with new ones: {'; '.join(differences)}. Bring that back, or give the sweep another "
                "name, and what is known under search.warm_start"
            )

    def _seed_sampler(self) -> None:
        """A sampler begins its random stream anew in every process, and one of a sweep that was learnt from has drawn
        the same points: the trials so far keep it from repeating them."""
        self.study.sampler = self.spec.sampler.build(offset=len(self.study.get_trials(deepcopy=False)))

    def _take_up(self, trial: optuna.trial.FrozenTrial) -> None:
        """Go on with a trial that a former process left running."""
        if CHANGES in trial.user_attrs:
            changes = json.loads(trial.user_attrs[CHANGES])
            handle = optuna.Trial(self.study, trial._trial_id)
            self.open[trial.number] = OpenTrial(handle, changes, list(self.spec.seeds))
        else:
            # It died between asking and writing down what it got; its parameters are in no run.
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _learn(self, finished: Sequence[tuple[RunSpec, Metrics]]) -> None:
        """Runs of other sweeps become finished trials, seeds averaged, where they are the base run but for the space
        and have every metric that is asked for."""
        by_point: dict[str, tuple[tuple[dict[str, Any], dict[str, Any]], list[Metrics]]] = {}
        for run, metrics in finished:
            located = self._located(run)
            if located is not None and self._complete(metrics):
                by_point.setdefault(json.dumps(located[0], sort_keys=True), (located, []))[1].append(metrics)
        for (parameters, distributions), replicates in by_point.values():
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=parameters,
                    distributions=distributions,
                    values=[_mean(replicates, metric) for metric in self.spec.objectives],
                    constraints=self._violations(replicates),
                )
            )

    def _located(self, run: RunSpec) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Optuna's parameters and distributions of the point that ``run`` is, whatever its seed; None where it is not
        the base run but for the space."""
        content = run.model_dump(mode="json")
        try:
            changes = {key: _at(content, key) for key in self.spec.space}
        except (LookupError, TypeError):
            return None  # it has no such key

        def same(key: str, value: Any) -> bool:
            try:
                return changed(self.base, {**changes, key: value, "seed": run.seed}) == run
            except ValueError:
                return False

        return locate(self.spec.space, changes, same) if same("seed", run.seed) else None

    def _violations(self, replicates: Sequence[Metrics]) -> dict[str, float]:
        """By how much the mean of each constrained metric is out of bounds; 0 or less where it is not."""
        means = {metric: (_mean(replicates, metric), *bound) for metric, bound in self.bounds().items()}
        return {metric: max(lowest - mean, mean - highest) for metric, (mean, lowest, highest) in means.items()}

    @property
    def over(self) -> bool:
        """No run is to be proposed any more, and all that were are over."""
        return not self.open and self.proposed >= self.spec.trials

    def propose(self) -> Proposal | None:
        """The next run; None when all are given out for now.

        A point whose values can't be together in a run is a failed trial, and counts as one.
        """
        while (trial := self._waiting() or self._ask()) is not None:
            seed = trial.waiting.pop(0)
            try:
                spec = changed(self.base, {**trial.changes, "seed": seed})
                self.check(spec)
            except ValueError as error:
                lines = explain(error, RunSpec) if isinstance(error, ValidationError) else [str(error)]
                trial.handle.set_user_attr(REFUSED, "; ".join(lines))
                self.study.tell(self.open.pop(trial.handle.number).handle, state=TrialState.FAIL)
            else:
                return Proposal(trial.handle.number, spec)
        return None

    def _waiting(self) -> OpenTrial | None:
        return next((trial for trial in self.open.values() if trial.waiting), None)

    def _ask(self) -> OpenTrial | None:
        """A new trial; None when there were as many as are wanted."""
        if self.proposed >= self.spec.trials:
            return None
        if not self.study.get_trials(deepcopy=False):
            self._learn(self.warm_start())
            self._seed_sampler()
        asked = self.study.ask()
        changes = draw(self.spec.space, asked)
        asked.set_user_attr(CHANGES, json.dumps(changes))
        self.proposed += 1
        trial = self.open[asked.number] = OpenTrial(asked, changes, list(self.spec.seeds))
        return trial

    def ended(self, proposal: Proposal, metrics: Metrics | None, *, stopped_early: bool = False) -> None:
        """A proposed run is over. ``metrics`` are those of its end; None when it failed. It counts as failed, too,
        where one that is asked for is missing (its judge was away) or not finite."""
        trial, seed = self.open[proposal.trial], proposal.spec.seed
        if stopped_early:
            trial.lost[seed] = TrialState.PRUNED
        elif metrics is None or not self._complete(metrics):
            trial.lost[seed] = TrialState.FAIL
        else:
            trial.results[seed] = metrics
        if len(trial.results) + len(trial.lost) == len(self.spec.seeds):
            self._tell(self.open.pop(proposal.trial))

    def _complete(self, metrics: Metrics) -> bool:
        """Whether every metric that is asked for is there, as a finite number."""
        wanted = (*self.spec.objectives, *self.spec.constraints)
        return all(math.isfinite(metrics.get(metric, math.nan)) for metric in wanted)

    def _tell(self, trial: OpenTrial) -> None:
        if trial.lost:
            state = TrialState.FAIL if TrialState.FAIL in trial.lost.values() else TrialState.PRUNED
            self.study.tell(trial.handle, state=state)
            return
        results = list(trial.results.values())
        if len(results) > 1:
            spread = {metric: statistics.stdev(r[metric] for r in results) for metric in self.spec.objectives}
            trial.handle.set_user_attr(SPREAD, json.dumps(spread))
        for metric, violation in self._violations(results).items():
            trial.handle.set_constraint(metric, violation)
        self.study.tell(trial.handle, [_mean(results, metric) for metric in self.spec.objectives])

    def winners(self, count: int) -> list[dict[str, Any]]:
        """The changes of the best feasible trials, at most ``count`` and each once: of one objective the best first; of
        several the Pareto front, best in the last objective first."""
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        feasible = [t for t in complete if CHANGES in t.user_attrs and all(v <= 0 for v in t.constraints.values())]
        signs = [1.0 if direction == "minimize" else -1.0 for direction in self.spec.objectives.values()]
        costs = {t.number: [s * v for s, v in zip(signs, t.values, strict=True)] for t in feasible}
        front = [t for t in feasible if not any(_dominates(other, costs[t.number]) for other in costs.values())]
        chosen = feasible if len(signs) == 1 else front
        ranked = sorted(chosen, key=lambda trial: costs[trial.number][-1])
        points = dict.fromkeys(trial.user_attrs[CHANGES] for trial in ranked)  # one that was tried twice is one
        return [json.loads(changes) for changes in list(points)[:count]]


def _differences(begun: Any, now: Any, key: str = "") -> list[str]:
    """Where two JSON values differ: the dotted key, and what is there in each."""
    if not isinstance(begun, dict) or not isinstance(now, dict):
        return [] if begun == now else [f"{key} was {shown(begun)} and is {shown(now)}"]
    inner = {name: f"{key}.{name}" if key else name for name in {**begun, **now}}
    return [line for name, path in inner.items() for line in _differences(begun.get(name), now.get(name), path)]


def _mean(replicates: Sequence[Metrics], metric: str) -> float:
    return statistics.fmean(metrics[metric] for metrics in replicates)


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content
