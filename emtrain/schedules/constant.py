from emtrain.schedule import Schedule


def constant(total_steps: int) -> Schedule:
    """``1``: the peak learning rate throughout.

    As transformers' ``constant``, and with a warm-up ``constant_with_warmup``.
    """
    return lambda step: 1.0
