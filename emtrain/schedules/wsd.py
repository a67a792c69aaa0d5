import math
from typing import Literal

from emtrain.schedule import Schedule, half_cosine, require

_DECAYS = {
    "cosine": half_cosine,
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
}


def wsd(
    total_steps: int,
    *,
    decay_fraction: float = 0.2,
    decay: Literal["cosine", "linear", "1-sqrt"] = "cosine",
    min_ratio: float = 0.0,
) -> Schedule:
    """``1``, then over the last ``decay_fraction`` of the steps down to ``min_ratio``: warm-up-stable-decay.

    With ``progress`` from 0 to 1 over the decay, its shape is ``(1 + cos(pi * progress)) / 2``, ``1 - progress`` or
    ``1 - sqrt(progress)``. The decay is rounded to whole steps.

    MiniCPM (arXiv 2404.06395); ``1-sqrt`` is from arXiv 2405.18392. As transformers' ``warmup_stable_decay`` with
    ``num_decay_steps = round(decay_fraction * total_steps)``, except that the warm-up starts at 0 and not at
    ``min_ratio``.
    """
    require(0 <= decay_fraction <= 1, "decay_fraction", decay_fraction, "from 0 to 1")
    require(decay in _DECAYS, "decay", decay, f"one of {', '.join(_DECAYS)}")
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    decay_steps = round(decay_fraction * total_steps)
    stable_steps = total_steps - decay_steps
    shape = _DECAYS[decay]

    def multiplier(step: int) -> float:
        if step < stable_steps or decay_steps == 0:
            return 1.0
        return min_ratio + (1 - min_ratio) * shape((step - stable_steps) / decay_steps)

    return multiplier
