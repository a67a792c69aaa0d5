"""Layers that are not trained, in fewer operations than the model's own take."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(operand: torch.Tensor) -> bool:
    """Whether its products are oneDNN's: on a processor, in fp32, as far as torch was built with it."""
    return ONEDNN and operand.dtype == torch.float32 and operand.device.type == "cpu"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x W^T + bias`` for ``(..., inputs)`` and ``(outputs, inputs)``.

    ``nn.functional.linear`` takes MKL, which leaves AVX-512 unused on processors that are not Intel's: 98 GFLOP/s on a
    core of an AMD EPYC. oneDNN, which code compiled by torch takes, has 195.
    """
    if by_onednn(x):
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return nn.functional.linear(x, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained. It holds the weights of ``linear`` under the same names."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # without weights of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
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


class FrozenNorm(nn.Module):
    """A root-mean-square norm (arXiv 1910.07467) that is not trained.

    ``weight`` is what the normed input is multiplied by, in fp32 at least.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.detach(), requires_grad=False), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., width)`` -> the same shape, computed at least in fp32."""
        y: torch.Tensor = _Normed.apply(x, self.weight, self.eps)
        return y


class _Normed(torch.autograd.Function):
    """Autograd would keep and go through each of seven operations: 1.2 ms for 2,176 tokens of width 128 against 0.4."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = precise.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        normed = precise * scale
        ctx.save_for_backward(normed, scale)
        ctx.weight, ctx.dtype = weight, x.dtype
        return (normed * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normed, scale = ctx.saved_tensors
        gradient = output_gradients[0] * ctx.weight
        along = (gradient * normed).mean(dim=-1, keepdim=True)
        dx = torch.addcmul(gradient.to(normed.dtype), normed, along, value=-1).mul_(scale)
        return dx.to(ctx.dtype), None, None


@torch.no_grad()
def frozen_norms(modules: Mapping[str, nn.Module]) -> dict[str, FrozenNorm]:
    """What can take the place of root-mean-square norms among ``modules``, by name.

    Models differ in what they multiply by (Gemma by 1 + weight), so each is tried, and has to give the same numbers at
    full precision.
    """
    found = {}
    for name, module in modules.items():
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        parameters = dict(module.named_parameters())
        if not type(module).__name__.endswith("RMSNorm") or eps is None or parameters.keys() != {"weight"}:
            continue
        dtype = torch.promote_types(parameters["weight"].dtype, torch.float32)
        precise, weight = copy.deepcopy(module).to(dtype), parameters["weight"].to(dtype)
        x = torch.linspace(-1, 2, weight.numel(), dtype=dtype, device=weight.device)
        for factor in (weight, 1 + weight):
            norm = FrozenNorm(factor, eps)
            if torch.allclose(norm(x), precise(x), rtol=1e-5, atol=1e-7):
                found[name] = norm
                break
    return found
