from emtrain.schedule import Schedule, half_cosine, require


def cosine_restarts(total_steps: int, *, cycles: int = 4) -> Schedule:
    """``(1 + cos(pi * phase)) / 2`` with ``phase = (cycles * step / total_steps) mod 1``: equal cosines, hard restarts.

    As transformers' ``cosine_with_restarts`` and its ``num_cycles`` (whose default is 1, plain ``cosine``). Where
    ``cycles`` does not divide ``total_steps`` a restart falls between two updates, and the first update of the new
    cycle is a little below the peak. ``sgdr`` has whole-step and growing cycles.
    """
    require(cycles >= 1, "cycles", cycles, "at least 1")
    # The remainder is taken of integers, so that no rounding can put off a restart by a step.
    return lambda step: half_cosine(cycles * step % total_steps / total_steps)
