"""Losses on lines and in balls: against whole weights in a model, and against a quadratic whose answers are known."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from emtrain.heldout import collate, heldout_loss, row_losses
from emtrain.landscape import backward_heldout_loss, between, climb, moved, random_direction
from emtrain.low_rank import LowRank, Update, norm
from emtrain.tokens import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def drawn(model: "PreTrainedModel", seed: int, rank: int) -> Update:
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    return {
        layer: LowRank(
            0.3 * torch.randn(modules[layer].out_features, rank, generator=generator),
            torch.randn(rank, modules[layer].in_features, generator=generator),
        )
        for layer in LAYERS
    }


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_point_on_the_line_is_the_model_with_the_mean_of_the_whole_weights(
    make_model: "Callable[[], PreTrainedModel]", examples: list[Example], t: float
) -> None:
    base, dense = make_model(), make_model()
    a, b = drawn(base, 1, 2), drawn(base, 2, 3)
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for layer in LAYERS:
            modules[layer].weight += (1 - t) * a[layer].left @ a[layer].right + t * b[layer].left @ b[layer].right
    before = heldout_loss(base, examples)
    with moved(base, between(a, b, t)):
        there = heldout_loss(base, examples)
    assert there.per_token == pytest.approx(heldout_loss(dense, examples).per_token, rel=1e-6)
    assert abs(there.per_token - before.per_token) > 1e-3
    assert heldout_loss(base, examples) == before


def test_the_line_between_factors_would_be_another(model: "PreTrainedModel", examples: list[Example]) -> None:
    a, b = drawn(model, 1, 2), drawn(model, 2, 2)
    factors = {
        layer: LowRank((a[layer].left + b[layer].left) / 2, (a[layer].right + b[layer].right) / 2) for layer in LAYERS
    }
    with moved(model, factors):
        between_factors = heldout_loss(model, examples).per_token
    with moved(model, between(a, b, 0.5)):
        assert abs(heldout_loss(model, examples).per_token - between_factors) > 1e-3


def test_rows_add_up_to_the_loss(model: "PreTrainedModel", examples: list[Example]) -> None:
    sums, counts = row_losses(model, examples)
    assert sorted(counts.tolist()) == sorted(example.response_tokens for example in examples)
    assert float(sums.sum() / counts.sum()) == heldout_loss(model, examples).per_token


def test_the_gradient_of_the_heldout_loss_is_that_of_the_whole_weights(
    make_model: "Callable[[], PreTrainedModel]", examples: list[Example]
) -> None:
    """With W + L R the gradient of L is that of W times R transposed. One batch by plain cross-entropy is the other."""
    base, dense = make_model().requires_grad_(False), make_model()
    step = drawn(base, 3, 2)
    modules = dict(dense.named_modules())
    with torch.no_grad():
        for layer in LAYERS:
            modules[layer].weight += step[layer].left @ step[layer].right
    batch = collate(examples)
    logits = dense(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    expected.backward()

    factors = {layer: LowRank(f.left.requires_grad_(), f.right) for layer, f in step.items()}
    with moved(base, factors):
        assert backward_heldout_loss(base, examples) == pytest.approx(expected.item(), rel=1e-5)
    for layer in LAYERS:
        of_left = modules[layer].weight.grad @ step[layer].right.T
        torch.testing.assert_close(factors[layer].left.grad, of_left, rtol=1e-3, atol=1e-6)


def test_an_update_of_another_model_is_refused(model: "PreTrainedModel") -> None:
    with (
        pytest.raises(ValueError, match=r"no layer 'model\.layers\.9\.up'"),
        moved(model, {"model.layers.9.up": LowRank(torch.ones(1, 1), torch.ones(1, 1))}),
    ):
        pass


def quadratic(curvature: torch.Tensor) -> Callable[[Update], float]:
    """Half the curvature-weighted sum of squares of the step's entries: its minimum is where the step is zero."""

    def loss(step: Update) -> float:
        value = 0.5 * (curvature * (step["w"].left @ step["w"].right).square()).sum()
        value.backward()
        return value.item()

    return loss


def test_the_highest_loss_near_the_minimum_of_a_quadratic_is_half_its_largest_curvature() -> None:
    """Within radius r of the minimum the loss is at most r^2 / 2 times the largest curvature, here in one entry."""
    curvature = 1 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    curvature[2, 3] = 9.0
    update = {"w": LowRank(torch.ones(6, 2), torch.ones(2, 5))}
    start = random_direction(update, length=0.1, generator=torch.Generator().manual_seed(1))
    radius = 0.1 * norm(update)
    assert norm(start) == pytest.approx(radius, rel=1e-5)
    highest = climb(quadratic(curvature), start, steps=30)
    assert 0.95 * 0.5 * 9 * radius**2 <= highest <= 0.5 * 9 * radius**2 * (1 + 1e-5)
    # Without a step it is the loss at the start, far below.
    assert climb(quadratic(curvature), start, steps=0) < 0.4 * highest


def test_random_directions_have_the_mean_rise_of_a_quadratic() -> None:
    """A random unit step spreads evenly over entries: the mean rise is r^2 / 2 times the mean curvature."""
    curvature = 1 + torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    update = {"w": LowRank(torch.ones(6, 2), torch.ones(2, 5))}
    generator = torch.Generator().manual_seed(2)
    rises = []
    for _ in range(500):
        step = random_direction(update, length=0.1, generator=generator)
        rises.append(float(0.5 * (curvature * (step["w"].left @ step["w"].right).square()).sum()))
    expected = 0.5 * (0.1 * norm(update)) ** 2 * float(curvature.mean())
    assert sum(rises) / len(rises) == pytest.approx(expected, rel=0.05)


def test_a_random_direction_is_as_long_in_each_layer_as_the_update_there(model: "PreTrainedModel") -> None:
    update = drawn(model, 1, 2)
    step = random_direction(update, length=0.5, generator=torch.Generator().manual_seed(0))
    for layer in LAYERS:
        assert norm({layer: step[layer]}) == pytest.approx(0.5 * norm({layer: update[layer]}), rel=1e-5)


def test_climbing_in_a_model_finds_more_than_chance(model: "PreTrainedModel", examples: list[Example]) -> None:
    model.requires_grad_(False)
    update = drawn(model, 1, 2)
    start = random_direction(update, length=0.2, generator=torch.Generator().manual_seed(0))

    def loss(step: Update) -> float:
        with moved(model, update), moved(model, step):
            return backward_heldout_loss(model, examples)

    at_start = climb(loss, start, steps=0)
    with moved(model, update):
        assert climb(loss, start, steps=5) > at_start > 0
