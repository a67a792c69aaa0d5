"""The held-out loss around what runs have found: on the straight line between two updates, and in a ball around one."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """The highest loss that gradient ascent finds among steps of low rank that are as long as ``start``.

    ``loss`` takes a step away from the point that is examined, one of whose factors in each layer asks for a gradient,
    leaves the gradient there and returns the loss. Every step of the ascent goes to where the gradient points, as in
    sharpness-aware minimisation (arXiv 2010.01412), but in the space of weights, and with the best approximation of the
    gradient in, by turns, the row spaces and the column spaces of the last step: a power iteration, whose result hangs
    little on ``start``. It is a lower bound of the largest loss in the ball.
    """
    length, step, highest = norm(start), start, -torch.inf
    for turn in range(steps):
        factors, asked = _half_orthonormal(step, rows=turn % 2 == 0)
        highest = max(highest, loss(factors))
        slope = math.sqrt(sum(float(_gradient(tensor).double().square().sum()) for tensor in asked.values()))
        if not slope:
            return highest
        step = {
            layer: LowRank(uphill, matrix.right.detach())
            if asked[layer] is matrix.left
            else LowRank(matrix.left.detach(), uphill)
            for layer, matrix in factors.items()
            for uphill in (_gradient(asked[layer]) * (length / slope),)
        }
    return max(highest, loss(_half_orthonormal(step, rows=True)[0]))


def _half_orthonormal(step: Update, *, rows: bool) -> tuple[Update, Mapping[str, torch.Tensor]]:
    """``step`` with orthonormal right (or left) factors, and by layer the other ones, which ask for a gradient."""
    factors, asked = {}, {}
    for layer, matrix in step.items():
        columns, values, other = matrix.svd
        left, right = (columns * values, other.T) if rows else (columns, values[:, None] * other.T)
        factors[layer] = LowRank(left.to(matrix.left.dtype), right.to(matrix.right.dtype))
        asked[layer] = (factors[layer].left if rows else factors[layer].right).requires_grad_()
    return factors, asked


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
