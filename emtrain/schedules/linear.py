from emtrain.schedule import Schedule


def linear(total_steps: int) -> Schedule:
    """``1 - step / total_steps``: linear decay to 0.

    As transformers' ``linear``: the last update still has ``1 / total_steps``.
    """
    return lambda step: (total_steps - step) / total_steps
