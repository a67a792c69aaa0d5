"""Frozen layers, against torch's and transformers' own in double precision."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from emtrain.packed.frozen import FrozenLinear, FrozenNorm, frozen_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (33, 6), (2, 5, 6)], ids=str)
def test_a_frozen_layer_and_its_gradient_are_those_of_the_linear_layer(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 7, bias=bias).to(dtype).requires_grad_(False)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weights = torch.randn(*shape[:-1], 7, dtype=dtype)
    y = FrozenLinear(linear)(x)
    (y * weights).sum().backward()

    exact = x.detach().double().requires_grad_()
    expected = linear.double()(exact)
    (expected * weights.double()).sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_a_gradient_that_is_not_contiguous_is_taken_as_it_is() -> None:
    torch.manual_seed(0)
    layer = FrozenLinear(nn.Linear(6, 4).requires_grad_(False))
    x = torch.randn(3, 5, 6, requires_grad=True)
    layer(x).transpose(1, 2).backward(dy := torch.randn(3, 4, 5))
    torch.testing.assert_close(x.grad, dy.transpose(1, 2) @ layer.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("size", [1.0, 128.0], ids=["small weights", "large weights"])
def test_a_frozen_norm_and_its_gradient_are_those_of_the_model(
    kind: type[nn.Module], size: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    norm = kind(8, eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.uniform_(0.9 * size, 1.1 * size)
    found = frozen_norms({"norm": norm})["norm"]
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, 5, 8, dtype=dtype)
    y = found(x)
    (y * weights).sum().backward()

    exact = x.detach().double().requires_grad_()
    factor = norm.weight.double() + (kind is Gemma3RMSNorm)
    expected = exact / (exact.square().mean(dim=-1, keepdim=True) + 1e-3).sqrt() * factor
    (expected * weights.double()).sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    # One rounding in half precision; in fp32 sums of eight products of the weights' size, which cancel.
    tolerance = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * size)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance * size)


class CenteredRMSNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(dim=-1, keepdim=True))


def test_a_norm_that_computes_something_else_is_left_as_it_is() -> None:
    others = {"centered": CenteredRMSNorm(8), "layer": nn.LayerNorm(8), "linear": nn.Linear(8, 8)}
    assert frozen_norms(others) == {}
    assert isinstance(frozen_norms({**others, "usual": LlamaRMSNorm(8)})["usual"], FrozenNorm)
