from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    import torch


def sgd(
    parameters: "Iterable[torch.nn.Parameter]",
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    nesterov: bool = False,
) -> "torch.optim.Optimizer":
    """Stochastic gradient descent: ``torch.optim.SGD``.

    Weight decay is added to the gradient, as L2 regularisation, and so passes through the momentum.

    Raises ``ValueError`` for ``nesterov`` without ``momentum``.
    """
    import torch

    return torch.optim.SGD(
        parameters, lr=learning_rate, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, fused=True
    )
