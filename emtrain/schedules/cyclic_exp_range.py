from emtrain.schedule import Schedule, require
from emtrain.schedules.cyclic_triangular import cyclic_triangular, half_cycle_steps


def cyclic_exp_range(total_steps: int, *, cycles: int = 4, min_ratio: float = 0.2, gamma: float = 0.7) -> Schedule:
    """``min_ratio + (1 - min_ratio) * wave(step) * gamma**i`` in cycle ``i``: triangles that shrink cycle by cycle.

    The first cycle reaches the peak. ``gamma`` 0.5 is ``cyclic_triangular2``. Other arguments as for
    ``cyclic_triangular``.

    Not torch's ``CyclicLR(mode="exp_range")``, whose ``gamma`` counts per step (``cyclic_exp_range_per_step``), but its
    ``scale_fn=lambda cycle: gamma ** (cycle - 1)`` with ``scale_mode="cycle"`` (torch counts cycles from 1).
    """
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    require(0 <= gamma <= 1, "gamma", gamma, "from 0 to 1")
    wave = cyclic_triangular(total_steps, cycles=cycles, min_ratio=0.0)
    period = 2 * half_cycle_steps(total_steps, cycles)
    return lambda step: min_ratio + (1 - min_ratio) * wave(step) * gamma ** (step // period)
