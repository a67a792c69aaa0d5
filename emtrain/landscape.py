"""The held-out loss around what runs have found: on the straight line between two updates, and in a ball around one."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from emtrain.heldout import batches, token_losses
from emtrain.low_rank import LowRank, Update, combine, norm
from emtrain.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKWARD_ROWS = 4
"""Rows per backward pass, which holds the activations of all layers."""
SHARE_OF_STEP = 0.5
"""Length of a step of ``climb`` over that of the factors it moves."""


def between(a: Update, b: Update, t: float) -> Update:
    """The point at ``t`` on the straight line from ``a`` (0) to ``b`` (1), in the space of weights.

    Not the line between their factors: the mean of two adapters' A and B is another update than the updates' mean.
    """
    return combine([(1 - t, a), (t, b)])


@contextmanager
def moved(model: "PreTrainedModel", update: Update) -> Iterator["PreTrainedModel"]:
    """``model``, a plain base, with ``update`` added to its weights inside the block.

    As in PEFT, the factors stay in their own dtype beside the layers: added to bf16 weights, most of an update would
    be rounded away. Raises ``ValueError`` when the model has not all of the update's layers.
    """
    modules = dict(model.named_modules())
    if unknown := sorted(update.keys() - modules.keys()):
        raise ValueError(f"the model has no layer {unknown[0]!r}, which the adapter changes; it is of another model")
    with ExitStack() as hooks:
        for layer, factors in update.items():
            hooks.callback(modules[layer].register_forward_hook(functools.partial(_add, factors)).remove)
        yield model


def _add(factors: LowRank, layer: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    added = torch.nn.functional.linear(inputs[0].to(factors.right.dtype), factors.right)
    return output + torch.nn.functional.linear(added, factors.left).to(output.dtype)


def backward_heldout_loss(model: "PreTrainedModel", examples: Sequence[Example]) -> float:
    """Held-out loss per response token; its gradient is added to whatever in ``model`` asks for one."""
    tokens = sum(example.response_tokens for example in examples)
    total = 0.0
    for batch in batches(examples, rows=BACKWARD_ROWS, device=model.device):
        loss = token_losses(model, batch).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    return total


def random_direction(update: Update, *, length: float, generator: torch.Generator) -> Update:
    """A Gaussian update of the same ranks, in each layer ``length`` times as long as ``update`` is there.

    Relative to each layer, as in Li et al. 2018 (arXiv 1712.09913), so that the scale of the weights has no part in
    what is measured. ``generator`` is on the CPU: the same direction on every device.
    """
    directions = {}
    for layer, factors in update.items():
        left, right = (
            torch.randn(matrix.shape, generator=generator).to(matrix) for matrix in (factors.left, factors.right)
        )
        drawn = norm({layer: LowRank(left, right)})
        directions[layer] = LowRank(left * (length * norm({layer: factors}) / drawn), right)
    return directions


def climb(loss: Callable[[Update], float], start: Update, *, steps: int) -> float:
    """The highest loss that gradient ascent finds among steps of low rank no longer than ``start``.

    ``loss`` takes a step away from the point that is examined, whose factors ask for a gradient, leaves the gradient
    with them and returns the loss there. After every step of the ascent the length is that of ``start`` again (as in
    sharpness-aware minimisation, arXiv 2010.01412, whose ball is one of parameters). It is a lower bound of the
    largest loss in the ball, at least that at ``start``.
    """
    radius = norm(start)
    step, highest = _balanced(start, radius), -torch.inf
    for turn in range(steps + 1):
        factors = {
            layer: LowRank(matrix.left.requires_grad_(), matrix.right.requires_grad_())
            for layer, matrix in step.items()
        }
        highest = max(highest, loss(factors))
        if turn == steps:
            break
        tensors = [tensor for matrix in factors.values() for tensor in (matrix.left, matrix.right)]
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        slope = _length(gradients)
        if not slope:
            break
        rate = SHARE_OF_STEP * _length(tensors) / slope
        with torch.no_grad():
            ascended = iter([tensor + rate * gradient for tensor, gradient in zip(tensors, gradients, strict=True)])
            step = _balanced({layer: LowRank(next(ascended), next(ascended)) for layer in factors}, radius)
    return highest


def _balanced(step: Update, radius: float) -> Update:
    """``step`` at this length, with left and right factors of like size, which gradients of the two assume."""
    factor = radius / norm(step)
    balanced = {}
    for layer, matrix in step.items():
        columns, values, rows = matrix.svd
        root = (factor * values).sqrt()
        balanced[layer] = LowRank(
            (columns * root).to(matrix.left.dtype).detach(), (rows * root).T.to(matrix.right.dtype).detach()
        )
    return balanced


def _length(tensors: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(tensor.detach()) for tensor in tensors]).norm())
