"""Products with weights that are not trained."""

from typing import Any

import torch
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + bias`` for ``(..., inputs)`` and ``(outputs, inputs)``.

    In fp32 on a processor by oneDNN, as code compiled by torch has it; ``nn.functional.linear`` takes MKL, which leaves
    AVX-512 unused on processors that are not Intel's: 98 GFLOP/s against 195 on a core of an AMD EPYC.
    """
    if ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu":
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return nn.functional.linear(x, weight, bias)


class FrozenLinear(nn.Module):
    """A linear layer that is not trained. It holds the weights of ``linear`` under the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., inputs)`` -> ``(..., outputs)``."""
        y: torch.Tensor = _Frozen.apply(x, self.weight, self.bias)
        return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return product(output_gradients[0], ctx.weight.T), None, None
