from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

if TYPE_CHECKING:
    import torch


def muon(
    parameters: "Iterable[torch.nn.Parameter]",
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95,
    nesterov: bool = True,
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5,
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
) -> "torch.optim.Optimizer":
    """Momentum, orthogonalised by ``ns_steps`` Newton-Schulz iterations (Jordan et al. 2024): ``torch.optim.Muon``.

    ``adjust_lr_fn`` scales a matrix's update by its shape ``(rows, columns)``: ``match_rms_adamw`` (arXiv 2502.16982)
    by ``0.2 * sqrt(max(rows, columns))``, about the size of AdamW's update, so that one axis of learning rates serves
    both; ``original``, torch's default, by ``sqrt(max(1, rows / columns))``.

    Only matrices have an orthogonal factor. The A and B of every LoRA adapter are matrices; for a run that trains
    anything else (norms and biases of ``adapter: full``) this raises ``ValueError`` rather than train those parameters
    with a second optimiser at a learning rate nobody chose.
    """
    import torch

    parameters = list(parameters)
    shapes = sorted({tuple(parameter.shape) for parameter in parameters if parameter.ndim != 2})
    if shapes:
        raise ValueError(
            f"optimizer muon trains matrices only, but this run also trains parameters of shape "
            f"{', '.join(map(str, shapes))}; use a LoRA adapter, or adamw for adapter: full"
        )
    return torch.optim.Muon(
        parameters,
        lr=learning_rate,
        weight_decay=weight_decay,
        momentum=momentum,
        nesterov=nesterov,
        ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn,
    )
