"""Learning-rate schedules as plain functions of the step, and their composition with a warm-up.

The step convention, stated once for all schedules: a step is one optimiser update, counted from 0, and
``multiplier(step)`` times the peak learning rate is what update ``step`` uses, ``0 <= step < total_steps``. It is the
convention of transformers and of torch's ``LambdaLR``: the first update of a warm-up of ``w`` steps has learning rate
0, update ``w`` the peak, and a decay to 0 arrives there at ``total_steps``, one step after the last update.
``LambdaLR`` asks for that value too, so a schedule is defined at ``total_steps`` as well.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from emtrain.lookup import lookup

if TYPE_CHECKING:
    from emtrain.spec import ScheduleSpec

Schedule = Callable[[int], float]
"""Step -> multiplier of the peak learning rate: finite, from 0 to 1, the same for the same step."""


def build(spec: "ScheduleSpec", total_steps: int) -> Schedule:
    """The schedule of a run of ``total_steps`` updates: warm-up, then the named schedule over the steps that remain.

    The warm-up rises to the first value of the schedule proper: to the peak as in transformers for all that start
    there, and without a jump for those that start low (``cyclic_triangular``, ``one_cycle``).

    Raises ``ValueError`` if the warm-up leaves no step for the schedule.
    """
    if spec.warmup_steps >= total_steps:
        raise ValueError(
            f"schedule.warmup_steps is {spec.warmup_steps} but the run has {total_steps} steps; "
            f"the warm-up must leave at least one step for {spec.name!r}"
        )
    proper: Schedule = lookup("emtrain.schedules", spec.name)(total_steps - spec.warmup_steps, **spec.arguments)
    return join([linear_warmup(spec.warmup_steps, to=proper(0)), proper], boundaries=[spec.warmup_steps])


def linear_warmup(steps: int, *, to: float = 1.0) -> Schedule:
    """``to * step / steps``: from 0 at the first update to ``to`` at update ``steps``, and ``to`` from there on."""
    return lambda step: to * (step / steps) if step < steps else to


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One schedule after another: ``schedules[i + 1]`` starts at step ``boundaries[i]``, which it sees as its step 0.

    Raises ``ValueError`` unless there is one boundary fewer than schedules and they do not decrease.
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"{len(schedules)} schedules need {len(schedules) - 1} boundaries, not {len(boundaries)}")
    starts = [0, *boundaries]
    if starts != sorted(starts):
        raise ValueError(f"boundaries are {list(boundaries)}; they must be steps >= 0 in increasing order")

    def multiplier(step: int) -> float:
        current = bisect_right(starts, step) - 1
        return schedules[current](step - starts[current])

    return multiplier


def trace(schedule: Schedule, total_steps: int) -> list[float]:
    """The multiplier of every update of a run, ``(total_steps,)``."""
    return [schedule(step) for step in range(total_steps)]


def half_cosine(progress: float) -> float:
    """``(1 + cos(pi * progress)) / 2``: from 1 at progress 0 to 0 at progress 1, and 0 beyond."""
    return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def require(condition: bool, argument: str, value: object, valid: str) -> None:
    """Raise ``ValueError`` naming a schedule's ``argument``, its ``value`` and the ``valid`` range."""
    if not condition:
        raise ValueError(f"{argument} is {value!r}; it must be {valid}")
