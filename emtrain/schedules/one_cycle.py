from emtrain.schedule import Schedule, half_cosine, require


def one_cycle(
    total_steps: int, *, peak_at: float = 0.3, initial_ratio: float = 0.04, final_ratio: float = 4e-6
) -> Schedule:
    """Half a cosine up from ``initial_ratio`` to 1 at update ``peak_at * total_steps - 1``, then one down.

    The last update is at ``final_ratio``. The schedule has its own warm-up and is meant for ``warmup_steps: 0``.

    Super-convergence (arXiv 1708.07120); torch's ``OneCycleLR`` with ``pct_start = peak_at``, ``div_factor = 1 /
    initial_ratio`` and ``final_div_factor = initial_ratio / final_ratio``, and the same defaults. Momentum is left
    alone (``cycle_momentum=False``). In a run shorter than ``1 / peak_at`` steps, where torch would start past the
    peak, this starts at it.
    """
    require(0 <= peak_at <= 1, "peak_at", peak_at, "from 0 to 1")
    require(0 <= initial_ratio <= 1, "initial_ratio", initial_ratio, "from 0 to 1")
    require(0 <= final_ratio <= 1, "final_ratio", final_ratio, "from 0 to 1")
    peak_step = max(0.0, peak_at * total_steps - 1)
    last_step = total_steps - 1

    def multiplier(step: int) -> float:
        if step == peak_step:
            return 1.0
        if step < peak_step:
            return initial_ratio + (1 - initial_ratio) * half_cosine(1 - step / peak_step)
        if step >= last_step:
            return final_ratio
        return final_ratio + (1 - final_ratio) * half_cosine((step - peak_step) / (last_step - peak_step))

    return multiplier
