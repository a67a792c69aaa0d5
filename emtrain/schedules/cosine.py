from emtrain.schedule import Schedule, half_cosine


def cosine(total_steps: int) -> Schedule:
    """``(1 + cos(pi * step / total_steps)) / 2``: half a cosine down to 0.

    SGDR's single cycle (arXiv 1608.03983, equation 5) and transformers' ``cosine``: the last update is just above 0.
    """
    return lambda step: half_cosine(step / total_steps)
