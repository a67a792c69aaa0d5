"""The packed layer against the same arithmetic written row by row, differentiated by autograd."""

from dataclasses import replace as changed
from itertools import chain

import pytest
import torch
from torch import nn

from emtrain.packed.batch import Dropout, Frame
from emtrain.packed.layer import PackedLinear, Route, Router, Siblings, readers, replace
from emtrain.packed.table import AdapterTable

SLOTS, RANK, INPUTS, OUTPUTS, ROWS, TOKENS = 4, 3, 5, 7, 2, 6


def make_table() -> AdapterTable:
    groups = [{"proj": (OUTPUTS, INPUTS)}]
    return AdapterTable(groups, capacity=SLOTS, rank=RANK, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def layer() -> PackedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    table = make_table()
    table.values_KP.normal_()
    table.scale_K11.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]).view(-1, 1, 1))
    return PackedLinear("proj", Siblings({"proj": linear}, table), table, Router())


def factors(layer: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.alone.a_KSI, layer.alone.b_KRO[0]


def gradients_of(layer: PackedLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.alone.a_gradient_KSI, layer.alone.b_gradients_KRO[0]


def one_by_one(
    layer: PackedLinear, x: torch.Tensor, slots: list[int], a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """``(units * rows, tokens, outputs)``: each unit's rows through its own adapter, by the formula of LoRA."""
    outputs = []
    for slot, rows in zip(slots, x.split(ROWS), strict=True):
        delta = layer.alone.scale_K11[slot] * (rows @ a[slot].T @ b[slot])
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
    a, b = (factor.clone().requires_grad_() for factor in factors(layer))
    expected = one_by_one(layer, reference_x, slots, a, b)
    (expected * weight).sum().backward()

    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference_x.grad)
    # Rows of slots that are not in the pass are zero in both.
    torch.testing.assert_close(gradients_of(layer), (a.grad, b.grad))


def test_gradients_add_up_over_passes(layer: PackedLinear) -> None:
    x = torch.randn(ROWS, TOKENS, INPUTS)
    gradients = []
    for _ in range(2):
        with layer.router.along(Route(slice(0, 1))):
            layer(x).sum().backward()
        gradients.append(gradients_of(layer)[0][0].clone())
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    assert gradients[0].any()


def test_without_a_route_it_is_the_linear_layer(layer: PackedLinear) -> None:
    x = torch.randn(ROWS, TOKENS, INPUTS)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_unit_with_nan_leaves_the_others_as_they_are(layer: PackedLinear) -> None:
    x = torch.randn(2 * ROWS, TOKENS, INPUTS)
    outputs, gradients = [], []
    for first_row in (0.5, float("nan")):
        x[0] = first_row
        a_gradient, _ = gradients_of(layer)
        a_gradient.zero_()
        with layer.router.along(Route(slice(0, 2))):
            y = layer(x)
            y.square().sum().backward()
        outputs.append(y[ROWS:].detach())
        gradients.append(a_gradient[1].clone())
        assert a_gradient[0].isnan().any() == (first_row != 0.5)
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_zero_padded_ranks_stay_zero_and_change_nothing(layer: PackedLinear) -> None:
    """With A and B zero beyond rank 2, output and gradients are those of rank 2, and nothing moves what is padding."""
    a, b = factors(layer)
    a[0, 2:], b[0, 2:] = 0, 0
    x = torch.randn(ROWS, TOKENS, INPUTS)
    with layer.router.along(Route(slice(0, 1))):
        y = layer(x)
        y.square().sum().backward()
    expected = one_by_one(layer, x, [0], a[:, :2], b[:, :2])
    torch.testing.assert_close(y, expected)
    for gradient in gradients_of(layer):
        assert gradient[0].any()
        assert not gradient[0, 2:].any()


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
    with_adapter = one_by_one(layer, dropped, [0, 1], *factors(layer))
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
    table = make_table()
    replace(model, {"0.0": PackedLinear("proj", Siblings({"proj": linear}, table), table, Router())})
    assert [name for name, _ in model.named_parameters()] == names
    assert model[0][0].weight is linear.weight
    replace(model, {"0.0": linear})
    assert model[0][0] is linear


class Attention(nn.Module):
    """Three layers that read one input, and two that read another."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, INPUTS)
        self.value, self.query = nn.Linear(INPUTS, OUTPUTS), nn.Linear(INPUTS, OUTPUTS)
        self.key = nn.Linear(INPUTS, 1, bias=False)
        self.out, self.gate = nn.Linear(OUTPUTS, 1), nn.Linear(OUTPUTS, 1)
        self.unused = nn.Linear(INPUTS, 1)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        x = self.embed(input_ids)
        y = self.query(x) + self.value(x) * self.key(x)
        return self.out(y) * self.gate(y) + self.out(2 * y)  # type: ignore[no-any-return]


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_layers_are_found_together_where_they_read_the_same_tensor() -> None:
    model = Attention()
    assert readers(model, linears_of(model)) == [["query", "value", "key"], ["out", "gate"], ["unused"]]
    assert not model.query._forward_pre_hooks


@pytest.mark.parametrize("group", [["query", "value", "key"], ["query", "key"]], ids=["all", "some"])
def test_siblings_give_what_each_layer_gives_alone(group: list[str]) -> None:
    """Outputs, the gradient of what they read, and those of the table; ``out`` is called twice, on different input."""
    torch.manual_seed(0)
    model = Attention().double().requires_grad_(False)
    linears = linears_of(model)
    results = []
    for groups in ([group, ["out", "gate"]], [[name] for name in [*group, "out", "gate"]]):
        table = AdapterTable(
            [{name: (linears[name].out_features, linears[name].in_features) for name in names} for names in groups],
            capacity=SLOTS,
            rank=RANK,
            dtype=torch.float64,
            device=torch.device("cpu"),
        )
        table.scale_K11.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]).view(-1, 1, 1))
        router = Router()
        for names in groups:
            siblings = Siblings({name: linears[name] for name in names}, table)
            replace(model, {name: PackedLinear(name, siblings, table, router) for name in names})
        generator = torch.Generator().manual_seed(1)
        layers = sorted(chain.from_iterable(groups))
        for name in layers:
            a, (b,) = table.factors(table.values_KP, [name])
            a.normal_(generator=generator)
            b.normal_(generator=generator)
        model.embed.weight.requires_grad_().grad = None
        input_ids = torch.randint(4, (3 * ROWS, TOKENS), generator=generator)
        with router.along(route := Route(torch.tensor([0, 2, 3]))):
            y = model(input_ids, use_cache=False)
            y.square().sum().backward()
        assert not [name for name in route.ahead if name in group], "an output was computed and never used"
        gradients = {name: table.factors(table.gradients_KP, [name]) for name in layers}
        results.append((y.detach(), model.embed.weight.grad, gradients))
    torch.testing.assert_close(*results)
    assert all(a[2].any() and b[2].any() and not a[1].any() for a, (b,) in results[0][2].values())
