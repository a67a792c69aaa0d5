from emtrain.schedule import Schedule, require


def cyclic_triangular(total_steps: int, *, cycles: int = 4, min_ratio: float = 0.2) -> Schedule:
    """``min_ratio + (1 - min_ratio) * wave(step)``: straight up to the peak and down again, ``cycles`` times.

    ``wave`` rises from 0 to 1 and falls to 0 over two half-cycles of ``half_cycle_steps`` updates. ``min_ratio`` is the
    lowest over the peak learning rate; the first update is there.

    Cyclical learning rates (arXiv 1506.01186), torch's ``CyclicLR(mode="triangular")`` with ``base_lr = min_ratio *
    max_lr`` and ``step_size_up = half_cycle_steps``.
    """
    require(cycles >= 1, "cycles", cycles, "at least 1")
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    half = half_cycle_steps(total_steps, cycles)

    def multiplier(step: int) -> float:
        from_peak = abs(step % (2 * half) - half)
        return min_ratio + (1 - min_ratio) * (1 - from_peak / half)

    return multiplier


def half_cycle_steps(total_steps: int, cycles: int) -> int:
    """Updates from the bottom of a cycle to its peak: ``total_steps // (2 * cycles)``, at least 1.

    Whole steps, as torch's ``step_size_up`` is used in published runs (332 // 8 = 41 for 4 cycles). The fewer than
    ``2 * cycles`` updates left over begin another cycle.
    """
    return max(1, total_steps // (2 * cycles))
