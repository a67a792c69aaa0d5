from emtrain.schedule import Schedule, require


def sawtooth(total_steps: int, *, cycles: int = 4, min_ratio: float = 0.0) -> Schedule:
    """``1 - (1 - min_ratio) * phase`` with ``phase = (cycles * step / total_steps) mod 1``: linear, with hard restarts.

    ``cosine_restarts`` with straight teeth. ``min_ratio`` is the lowest over the peak learning rate.
    """
    require(cycles >= 1, "cycles", cycles, "at least 1")
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    return lambda step: 1 - (1 - min_ratio) * (cycles * step % total_steps / total_steps)
