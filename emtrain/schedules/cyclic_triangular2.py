from emtrain.schedule import Schedule, require
from emtrain.schedules.cyclic_triangular import cyclic_triangular, half_cycle_steps


def cyclic_triangular2(total_steps: int, *, cycles: int = 4, min_ratio: float = 0.2) -> Schedule:
    """``min_ratio + (1 - min_ratio) * wave(step) / 2**i`` in cycle ``i``: ``cyclic_triangular``, halved every cycle.

    The first cycle reaches the peak, the second halfway from ``min_ratio`` to it, and so on.

    torch's ``CyclicLR(mode="triangular2")``; arguments as for ``cyclic_triangular``.
    """
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    wave = cyclic_triangular(total_steps, cycles=cycles, min_ratio=0.0)
    period = 2 * half_cycle_steps(total_steps, cycles)
    return lambda step: min_ratio + (1 - min_ratio) * wave(step) * 0.5 ** (step // period)
