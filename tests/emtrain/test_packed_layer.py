"""The packed layer against the same arithmetic written row by row, differentiated by autograd."""

from dataclasses import replace as changed

import pytest
import torch
from torch import nn

from emtrain.packed.batch import Dropout, Frame
from emtrain.packed.layer import PackedLinear, Route, Router, replace
from emtrain.packed.table import AdapterTable

SLOTS, RANK, INPUTS, OUTPUTS, ROWS, TOKENS = 4, 3, 5, 7, 2, 6


def make_table() -> AdapterTable:
    shapes = {"proj": (OUTPUTS, INPUTS)}
    return AdapterTable(shapes, capacity=SLOTS, rank=RANK, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    table = make_table()
    table.values_KP.normal_()
    table.scale_K11.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]).view(-1, 1, 1))
    return PackedLinear("proj", linear, table, Router())


def one_by_one(
    layer: PackedLinear, x: torch.Tensor, slots: list[int], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``(units * rows, tokens, outputs)``: each unit's rows through its own adapter, by the formula of LoRA."""
    outputs = []
    for slot, rows in zip(slots, x.split(ROWS), strict=True):
        delta = layer.scale_K11[slot] * (rows @ a[slot].T @ b[slot])
        outputs.append(nn.functional.linear(rows, layer.weight, layer.bias) + delta)
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("slots", "index"), [([1, 2], slice(1, 3)), ([0, 2, 3], torch.tensor([0, 2, 3]))], ids=["slice", "gathered"]
)
def test_each_unit_goes_through_its_own_adapter_and_gives_its_gradients_to_it_alone(
    layer: PackedLinear, slots: list[int], index: slice | torch.Tensor
) -> None:
    x = torch.randn(len(slots) * ROWS, TOKENS, INPUTS, requires_grad=True)
    weight = torch.randn(len(slots) * ROWS, TOKENS, OUTPUTS)
    with layer.router.along(Route(index)):
        y = layer(x)
        (y * weight).sum().backward()

    reference_x = x.detach().clone().requires_grad_()
    a, b = (factor.clone().requires_grad_() for factor in (layer.a_KRI, layer.b_KRO))
    expected = one_by_one(layer, reference_x, slots, a, b)
    (expected * weight).sum().backward()

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference_x.grad)
    torch.testing.assert_close(layer.a_gradient_KRI, a.grad)  # rows of slots that are not in the pass are zero in both
    torch.testing.assert_close(layer.b_gradient_KRO, b.grad)


def test_gradients_add_up_over_passes(layer: PackedLinear) -> None:
    x = torch.randn(ROWS, TOKENS, INPUTS)
    gradients = []
    for _ in range(2):
        with layer.router.along(Route(slice(0, 1))):
            layer(x).sum().backward()
        gradients.append(layer.a_gradient_KRI[0].clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    assert gradients[0].any()


def test_without_a_route_it_is_the_linear_layer(layer: PackedLinear) -> None:
    x = torch.randn(ROWS, TOKENS, INPUTS)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_unit_with_nan_leaves_the_others_as_they_are(layer: PackedLinear) -> None:
    x = torch.randn(2 * ROWS, TOKENS, INPUTS)
    outputs, gradients = [], []
    for first_row in (0.5, float("nan")):
        x[0] = first_row
        layer.a_gradient_KRI.zero_()
        with layer.router.along(Route(slice(0, 2))):
            y = layer(x)
            y.square().sum().backward()
        outputs.append(y[ROWS:].detach())
        gradients.append(layer.a_gradient_KRI[1].clone())
        assert layer.a_gradient_KRI[0].isnan().any() == (first_row != 0.5)
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_zero_padded_ranks_stay_zero_and_change_nothing(layer: PackedLinear) -> None:
    """With A and B zero beyond rank 2, output and gradients are those of rank 2, and nothing moves what is padding."""
    layer.a_KRI[0, 2:] = 0
    layer.b_KRO[0, 2:] = 0
    x = torch.randn(ROWS, TOKENS, INPUTS)
    with layer.router.along(Route(slice(0, 1))):
        y = layer(x)
        y.square().sum().backward()
    expected = one_by_one(layer, x, [0], layer.a_KRI[:, :2], layer.b_KRO[:, :2])
    torch.testing.assert_close(y, expected)
    assert not layer.a_gradient_KRI[0, 2:].any()
    assert not layer.b_gradient_KRO[0, 2:].any()


def test_dropout_draws_what_nn_dropout_draws_for_the_unit_alone(layer: PackedLinear) -> None:
    """Unit 1 has dropout and its own frame is 1 row of 4 tokens; unit 0 has none."""
    own = Frame(1, 4)
    dropout = Dropout(0.3, torch.Generator().manual_seed(5), ("proj",))
    x = torch.randn(2 * ROWS, TOKENS, INPUTS, requires_grad=True)
    route = Route(slice(0, 2), dropouts=[(1, own, dropout)])
    with layer.router.along(route):
        y = layer(x)
        y.sum().backward()
        assert torch.equal(layer(x), y)  # a layer that runs again in the same pass sees the same mask

    with torch.random.fork_rng():
        torch.manual_seed(5)
        reference_x = x.detach().clone().requires_grad_()
        dropped = reference_x.clone()
        dropped[ROWS : ROWS + own.rows, : own.tokens] = nn.Dropout(0.3)(
            reference_x[ROWS : ROWS + own.rows, : own.tokens]
        )
    with_adapter = one_by_one(layer, dropped, [0, 1], layer.a_KRI, layer.b_KRO)
    base_of_dropped = nn.functional.linear(dropped, layer.weight, layer.bias)
    expected = with_adapter - base_of_dropped + nn.functional.linear(reference_x, layer.weight, layer.bias)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference_x.grad)


def test_layers_that_a_run_does_not_adapt_do_not_draw(layer: PackedLinear) -> None:
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    x = torch.randn(ROWS, TOKENS, INPUTS)
    elsewhere = Dropout(0.3, generator, ("other",))
    with layer.router.along(Route(slice(0, 1), dropouts=[(0, Frame(ROWS, TOKENS), elsewhere)])):
        layer(x)
    assert torch.equal(generator.get_state(), before)
    here = changed(elsewhere, layers=("proj",))
    with layer.router.along(Route(slice(0, 1), dropouts=[(0, Frame(ROWS, TOKENS), here)])):
        layer(x)
    assert not torch.equal(generator.get_state(), before)


def test_it_takes_the_place_of_a_linear_layer_under_the_same_parameter_names() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(INPUTS, OUTPUTS)), nn.ReLU())
    names = [name for name, _ in model.named_parameters()]
    linear = model[0][0]
    replace(model, {"0.0": PackedLinear("proj", linear, make_table(), Router())})
    assert [name for name, _ in model.named_parameters()] == names
    assert model[0][0].weight is linear.weight
    replace(model, {"0.0": linear})
    assert model[0][0] is linear
