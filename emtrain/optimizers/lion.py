from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    import torch


def lion(
    parameters: "Iterable[torch.nn.Parameter]",
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99),
) -> "torch.optim.Optimizer":
    """Sign of an interpolated momentum (arXiv 2302.06675): ``lion_pytorch.Lion``.

    Every entry moves by exactly the learning rate, weight decay aside, so the paper advises 3 to 10 times less of it
    than for AdamW, and as many times more weight decay. ``betas`` weigh the momentum in the update and in its own
    running mean.
    """
    from lion_pytorch import Lion  # type: ignore[import-untyped]

    return Lion(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas)
