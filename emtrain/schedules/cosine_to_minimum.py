from emtrain.schedule import Schedule, half_cosine, require


def cosine_to_minimum(total_steps: int, *, min_ratio: float = 0.1) -> Schedule:
    """``min_ratio + (1 - min_ratio) * (1 + cos(pi * step / total_steps)) / 2``: a cosine that ends above 0.

    ``min_ratio`` is the final over the peak learning rate. As transformers' ``cosine_with_min_lr`` and its
    ``min_lr_rate``.
    """
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    return lambda step: min_ratio + (1 - min_ratio) * half_cosine(step / total_steps)
