import math

from emtrain.schedule import Schedule, require


def inverse_sqrt(total_steps: int, *, timescale: float = 0.1) -> Schedule:
    """``1 / sqrt(1 + step / (timescale * total_steps))``: slow decay that never reaches 0.

    ``timescale`` is a fraction of the steps after the warm-up; when it has passed the multiplier is ``1 / sqrt(2)``. At
    the default the run ends at 0.30.

    As transformers' ``inverse_sqrt``, whose ``timescale`` is in steps and by default the length of the warm-up (the
    schedule of arXiv 1706.03762): that is ``warmup_steps / (total_steps - warmup_steps)`` of the run here. Steps count
    from the end of the warm-up in both, so the peak is 1 for any warm-up, none included.
    """
    require(0 < timescale < math.inf, "timescale", timescale, "above 0 and finite")
    return lambda step: 1 / math.sqrt(1 + step / (timescale * total_steps))
