from emtrain.schedule import Schedule, require


def polynomial(total_steps: int, *, power: float = 1.0, min_ratio: float = 0.0) -> Schedule:
    """``min_ratio + (1 - min_ratio) * (1 - step / total_steps)**power``: linear for 1, quick first for more.

    As transformers' ``polynomial`` with ``lr_end = min_ratio * learning_rate`` (by default an absolute 1e-7, here 0)
    and torch's ``PolynomialLR``; the default ``power`` is that of both.
    """
    require(0 < power < float("inf"), "power", power, "above 0 and finite")
    require(0 <= min_ratio <= 1, "min_ratio", min_ratio, "from 0 to 1")
    return lambda step: min_ratio + (1 - min_ratio) * ((total_steps - step) / total_steps) ** power
