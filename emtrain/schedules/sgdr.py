from bisect import bisect_right

from emtrain.schedule import Schedule, half_cosine, require


def sgdr(total_steps: int, *, cycles: int = 3, growth: float = 2.0, peak_decay: float = 1.0) -> Schedule:
    """``peak_decay**i * (1 + cos(pi * phase)) / 2``: cosine cycles ``i``, each ``growth`` times as long as the last.

    ``phase`` runs from 0 to 1 within a cycle. The cycles fill the run: 3 cycles with growth 2 take 1/7, 2/7 and 4/7 of
    it. ``peak_decay`` multiplies the peak at every restart; 1 restarts at the full learning rate.

    SGDR (arXiv 1608.03983), torch's ``CosineAnnealingWarmRestarts`` with ``T_mult`` = growth, except that the length of
    the first cycle follows from the run instead of being given in steps. Cycles are rounded to whole steps, at least
    one, so every restart is at its peak; cycles that do not fit into a very short run are left out.
    """
    require(cycles >= 1, "cycles", cycles, "at least 1")
    require(1 <= growth <= 10, "growth", growth, "from 1 to 10")
    require(0 <= peak_decay <= 1, "peak_decay", peak_decay, "from 0 to 1")
    lengths = [growth ** (cycle + 1 - cycles) for cycle in range(cycles)]  # relative to the last, so none overflows
    starts = [max(cycle, round(total_steps * sum(lengths[:cycle]) / sum(lengths))) for cycle in range(cycles)]
    ends = [*starts[1:], max(total_steps, starts[-1] + 1)]

    def multiplier(step: int) -> float:
        cycle = bisect_right(starts, step) - 1
        phase = (step - starts[cycle]) / (ends[cycle] - starts[cycle])
        return peak_decay**cycle * half_cosine(phase)

    return multiplier
