from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from emtrain.schedule import Schedule, require


def piecewise(
    total_steps: int, *, points: Sequence[tuple[float, float]] = ((0.0, 1.0), (0.5, 1.0), (1.0, 0.0))
) -> Schedule:
    """Straight lines through ``points``, each ``[fraction, multiplier]`` with ``fraction = step / total_steps``.

    Fractions go from 0 to 1 and may repeat for a jump, where the later point holds. The last point is where the run is
    heading: it belongs to ``total_steps``, one step after the last update, as for ``linear``. By default the peak is
    held for half the run.
    """
    fractions = [fraction for fraction, _ in points]
    require(len(points) >= 2, "points", points, "at least two [fraction, multiplier] pairs")
    require(fractions[0] == 0 and fractions[-1] == 1, "points", points, "pairs with fractions from 0 to 1")
    require(all(a <= b for a, b in pairwise(fractions)), "points", points, "in order of fraction")
    require(all(0 <= value <= 1 for _, value in points), "points", points, "pairs with multipliers from 0 to 1")

    def multiplier(step: int) -> float:
        fraction = step / total_steps
        right = min(bisect_right(fractions, fraction), len(points) - 1)
        (start, before), (end, after) = points[right - 1], points[right]
        if fraction >= end:
            return after
        return before + (after - before) * (fraction - start) / (end - start)

    return multiplier
