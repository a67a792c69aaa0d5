"""The token losses against ``torch.nn.functional.cross_entropy``."""

import pytest
import torch

from emtrain.packed.loss import token_losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_and_gradients_are_those_of_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(6, 11)).to(dtype).requires_grad_()
    targets, weights = torch.tensor([0, 3, 3, 10, 7, 1]), torch.rand(6)
    losses = token_losses(logits, targets)
    (losses * weights).sum().backward()

    reference = logits.detach().clone().requires_grad_()
    precise = reference.to(torch.promote_types(dtype, torch.float32))
    expected = torch.nn.functional.cross_entropy(precise, targets, reduction="none")
    (expected * weights).sum().backward()
    assert torch.equal(losses, expected)
    torch.testing.assert_close(logits.grad, reference.grad)
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_a_token_with_nan_logits_leaves_the_others_finite() -> None:
    logits = torch.randn(3, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    losses = token_losses(logits, torch.tensor([0, 1, 2]))
    losses.sum().backward()
    assert logits.grad is not None
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.grad.isnan().any(dim=1).tolist() == [False, True, False]
