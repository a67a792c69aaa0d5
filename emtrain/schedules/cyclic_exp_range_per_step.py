from emtrain.schedule import Schedule, require
from emtrain.schedules.cyclic_triangular import cyclic_triangular


def cyclic_exp_range_per_step(
    total_steps: int, *, cycles: int = 4, min_ratio: float = 0.2, gamma: float = 0.95
) -> Schedule:
    """``min_ratio + (1 - min_ratio) * wave(step) * gamma**step``: triangles under an envelope that shrinks every step.

    torch's ``CyclicLR(mode="exp_range")``, and what the published runs of arXiv 2606.20814 trained with: at ``gamma``
    0.95 the envelope is below 1 % after 90 updates, so the run is constant at ``min_ratio`` from there on, and with
    half-cycles of 41 updates its highest learning rate is 17 % of the way from ``min_ratio`` to the peak. For cycles
    that shrink from one to the next, use ``cyclic_exp_range``. Other arguments as for ``cyclic_triangular``.
    """
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    require(0 <= gamma <= 1, "gamma", gamma, "from 0 to 1")
    wave = cyclic_triangular(total_steps, cycles=cycles, min_ratio=0.0)
    return lambda step: min_ratio + (1 - min_ratio) * wave(step) * gamma**step
