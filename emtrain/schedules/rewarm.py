from emtrain.schedule import Schedule, half_cosine, join, linear_warmup, require


def rewarm(total_steps: int, *, at: float = 0.7, warmup: float = 0.1, peak: float = 1.0) -> Schedule:
    """A cosine to 0, then late in the run a second linear warm-up to ``peak`` and a second cosine to 0.

    ``(1 + cos(pi * p)) / 2``, ``peak * q`` and ``peak * (1 + cos(pi * r)) / 2``, where ``p``, ``q`` and ``r`` go from 0
    to 1 over the three parts.

    ``at`` is the fraction of the run where the second part begins; ``warmup`` the fraction of that second part that
    warms up, both rounded to whole steps; ``peak`` is the second peak over the first.

    Re-warming as in continual pre-training (arXiv 2308.04014), here to push a run out of the minimum it has settled in.
    """
    require(0 <= at <= 1, "at", at, "from 0 to 1")
    require(0 <= warmup <= 1, "warmup", warmup, "from 0 to 1")
    require(0 <= peak <= 1, "peak", peak, "from 0 to 1")
    first = round(at * total_steps)
    climb = round(warmup * (total_steps - first))
    second = total_steps - first - climb
    return join(
        [
            lambda step: half_cosine(step / first),
            linear_warmup(climb, to=peak),
            lambda step: peak * half_cosine(step / second) if second else 0.0,
        ],
        boundaries=[first, first + climb],
    )
