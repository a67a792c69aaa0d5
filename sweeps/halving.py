"""Synchronous successive halving: runs wait for each other at rungs, from which only the best go on.

Jamieson and Talwalkar, arXiv 1502.07943, algorithm 1.
"""

import threading
from collections.abc import Collection, Mapping
from typing import Literal


def rung_steps(evaluate_at: Collection[int], *, longest: int, grace: float, reduction: int) -> tuple[int | None, ...]:
    """The step at which a run stands at each rung: its first evaluation point from there on and before the next rung.

    Rungs are at ``grace * longest`` steps, ``reduction`` times as many and so on, before ``longest``. The run's last
    evaluation point is its end and no rung. None where it has no point there.
    """
    marks = []
    mark = grace * longest
    while mark < longest:
        marks.append(mark)
        mark *= reduction
    points = sorted(evaluate_at)[:-1]
    bounds = zip(marks, [*marks[1:], longest], strict=True)
    return tuple(next((point for point in points if low <= point < high), None) for low, high in bounds)


def best(values: Mapping[str, float], *, reduction: int, direction: Literal["minimize", "maximize"]) -> set[str]:
    """The best ``1 / reduction`` of the runs, rounded down but at least one; of equals the first by run key."""
    sign = 1 if direction == "minimize" else -1
    ranked = sorted(values, key=lambda key: (sign * values[key], key))
    return set(ranked[: max(1, len(ranked) // reduction)])


class Halving:
    """Says which runs go on, to threads that ask, one for each run. A rung is decided when all have come there or are
    over. A run without a value there (nothing could be judged) is held against none, and goes on.

    ``steps``: run key -> ``rung_steps``. ``known``: run key -> step -> the metric, of what ran before. ``over``: runs
    that will not run any more.
    """

    def __init__(
        self,
        steps: Mapping[str, tuple[int | None, ...]],
        *,
        metric: str,
        reduction: int,
        direction: Literal["minimize", "maximize"],
        known: Mapping[str, Mapping[int, float]],
        over: Collection[str],
    ) -> None:
        self.steps, self.metric, self.reduction, self.direction = steps, metric, reduction, direction
        rungs = len(next(iter(steps.values())))
        self.values: list[dict[str, float | None]] = [{} for _ in range(rungs)]
        """Of each rung: run key -> value of those that came there; None for those without one."""
        self.over, self.stopped = set(over), set[str]()
        self.decided = 0
        """Rungs so far, the lowest first."""
        self.changed = threading.Condition()
        for run_key, values in known.items():
            for step, value in sorted(values.items()):
                self._enter(run_key, step, value)
        with self.changed:
            self._decide()  # not before all are there: a rung is decided once, among those that came to it

    def came(self, run_key: str, step: int, value: float | None) -> None:
        """A run has come to an evaluation point; past those rungs, too, that it did not tell of."""
        with self.changed:
            self._enter(run_key, step, value)
            self._decide()

    def left(self, run_key: str) -> None:
        """A run is over, finished or failed: no one waits for it any more."""
        with self.changed:
            self.over.add(run_key)
            self._decide()

    def waits(self, run_key: str) -> bool:
        """Whether it is not decided yet if a run goes on from the last rung it came to."""
        with self.changed:
            reached = max((rung for rung, values in enumerate(self.values) if run_key in values), default=-1)
            return self.decided <= reached and run_key not in self.stopped

    def may_go_on(self, run_key: str) -> bool:
        """Whether a run goes on from the last rung it came to; waits until that is decided."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waits(run_key))
            return run_key not in self.stopped

    def _enter(self, run_key: str, step: int, value: float | None) -> None:
        for rung, at in enumerate(self.steps[run_key]):
            if at is not None and at <= step:
                self.values[rung].setdefault(run_key, value if at == step else None)

    def _decide(self) -> None:
        while self.decided < len(self.values):
            rung = self.decided
            came = self.values[rung]
            expected = {run_key for run_key, steps in self.steps.items() if steps[rung] is not None}
            if expected - came.keys() - self.over - self.stopped:
                return
            ranked = {key: value for key, value in came.items() if value is not None and key not in self.stopped}
            self.stopped |= ranked.keys() - best(ranked, reduction=self.reduction, direction=self.direction)
            self.decided += 1
            self.changed.notify_all()
