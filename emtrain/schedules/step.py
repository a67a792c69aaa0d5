from emtrain.schedule import Schedule, require


def step(total_steps: int, *, drops: int = 2, factor: float = 0.1) -> Schedule:
    """``factor**i`` in part ``i`` of ``drops + 1`` equal parts of the run: a staircase.

    torch's ``StepLR`` with ``step_size = total_steps / (drops + 1)`` and ``gamma = factor``; where that is no whole
    number, a drop comes at the first update after its time.
    """
    require(drops >= 1, "drops", drops, "at least 1")
    require(0 <= factor <= 1, "factor", factor, "from 0 to 1")
    return lambda step: factor ** ((drops + 1) * step // total_steps)
