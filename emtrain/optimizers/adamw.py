from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

if TYPE_CHECKING:
    import torch


def adamw(
    parameters: "Iterable[torch.nn.Parameter]",
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999),
    eps: Annotated[float, Field(ge=0)] = 1e-8,
) -> "torch.optim.Optimizer":
    """Adam with decoupled weight decay (arXiv 1711.05101): ``torch.optim.AdamW``.

    ``betas`` are the decay rates of the running means of the gradient and of its square.
    """
    import torch

    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps, fused=True)
