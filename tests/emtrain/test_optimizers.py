"""Optimisers: what one update does, by hand, and signatures that can be read and checked without torch."""

import inspect
import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from emtrain.lookup import lookup, names

NAMES = names("emtrain.optimizers")


def parameters(*shapes: tuple[int, ...]) -> list[Any]:
    """Parameters of ones."""
    import torch

    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]


def update(name: str, gradients: list[float], **arguments: Any) -> float:
    """A parameter that starts at 1, after one update per gradient at learning rate 0.1."""
    import torch

    (parameter,) = parameters((1, 1))
    optimizer = lookup("emtrain.optimizers", name)([parameter], learning_rate=0.1, **arguments)
    for gradient in gradients:
        parameter.grad = torch.full((1, 1), gradient)
        optimizer.step()
    return parameter.item()


def test_adamw_moves_by_the_learning_rate_at_first_and_decays_apart_from_the_gradient() -> None:
    """The first normalised gradient is its sign; decay takes 0.1 * 0.5 of the parameter: 1 - 0.05 - 0.1."""
    assert update("adamw", [3.0], weight_decay=0.5) == pytest.approx(0.85)
    assert update("adamw", [0.0], weight_decay=0.5) == pytest.approx(0.95)


def test_adamw_betas_and_eps_reach_the_update() -> None:
    """With no memory of the gradient, the second update is its sign again: 1 - 0.1 + 0.1."""
    assert update("adamw", [3.0, -1.0], weight_decay=0.0, betas=(0.0, 0.0)) == pytest.approx(1.0)
    assert update("adamw", [1.0], weight_decay=0.0, eps=1.0) == pytest.approx(0.95)  # 1 - 0.1 * 1 / (1 + 1)


def test_sgd_is_the_gradient_with_decay_added_to_it() -> None:
    assert update("sgd", [3.0], weight_decay=0.5) == pytest.approx(1 - 0.1 * (3.0 + 0.5 * 1))


def test_sgd_momentum_keeps_the_last_update() -> None:
    """Buffers 1 and 0.5 * 1 + 1; Nesterov steps by gradient + 0.5 * buffer: 1.5 and 1.75."""
    assert update("sgd", [1.0, 1.0], weight_decay=0.0, momentum=0.5) == pytest.approx(1 - 0.1 * (1 + 1.5))
    assert update("sgd", [1.0, 1.0], weight_decay=0.0, momentum=0.5, nesterov=True) == pytest.approx(
        1 - 0.1 * (1.5 + 1.75)
    )


def test_lion_moves_by_the_learning_rate_whatever_the_size_of_the_gradient() -> None:
    assert update("lion", [1e-6], weight_decay=0.0) == pytest.approx(0.9)
    assert update("lion", [100.0], weight_decay=0.5) == pytest.approx(1 - 0.1 * 0.5 - 0.1)


def test_lion_weighs_momentum_differently_in_the_update_and_in_its_mean() -> None:
    """Momentum after the first gradient is 0.2 * 10 = 2 (second beta 0.8); the second update has the sign of
    0.5 * 2 + 0.5 * -1 > 0 (first beta 0.5), so both updates go down although the gradients disagree."""
    assert update("lion", [10.0, -1.0], weight_decay=0.0, betas=(0.5, 0.8)) == pytest.approx(0.8)
    assert update("lion", [10.0, -3.0], weight_decay=0.0, betas=(0.5, 0.8)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("adjust_lr_fn", "scale"),
    [("match_rms_adamw", 0.2 * 8**0.5), ("original", (8 / 4) ** 0.5)],
)
def test_muon_updates_by_an_orthogonal_matrix_scaled_by_its_shape(adjust_lr_fn: str, scale: float) -> None:
    """The singular values of an (8, 4) update are all near 0.1 * scale, whatever those of the gradient.

    Five Newton-Schulz steps in bf16 leave them within about a third of 1, by design.
    """
    import torch

    (parameter,) = parameters((8, 4))
    optimizer = lookup("emtrain.optimizers", "muon")(
        [parameter], learning_rate=0.1, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn
    )
    left, _ = torch.linalg.qr(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    parameter.grad = left @ torch.diag(torch.tensor([1.0, 2.0, 5.0, 10.0]))
    optimizer.step()
    singular_values = torch.linalg.svdvals(1 - parameter.detach()) / (0.1 * scale)
    assert 0.65 < singular_values.min() <= singular_values.max() < 1.35


def test_muon_momentum_nesterov_and_iterations_reach_the_update() -> None:
    """A 1 x 1 matrix moves by its sign, about 0.1 * 0.2, down when the orthogonalised value is positive.

    At momentum 0.5 the running means after gradients 10 and -3 are 5 and 1; Nesterov's value is (-3 + 1) / 2 < 0. One
    Newton-Schulz step takes 1 to a + b + c = 0.701 and a second one that to 1.114 (Jordan's coefficients).
    """
    down_twice = update("muon", [10.0, -3.0], weight_decay=0.0, momentum=0.5, nesterov=False)
    down_and_up = update("muon", [10.0, -3.0], weight_decay=0.0, momentum=0.5, nesterov=True)
    assert down_twice < 0.98 < 0.99 < down_and_up
    assert update("muon", [10.0, -3.0], weight_decay=0.0, momentum=0.9, nesterov=True) < 0.98  # (-3 + 9 * 0.6) / 10 > 0
    for ns_steps, value in ((1, 0.701), (2, 1.114)):
        assert update("muon", [7.0], weight_decay=0.0, ns_steps=ns_steps) == pytest.approx(1 - 0.02 * value, abs=4e-4)


def test_muon_leaves_a_matrix_without_gradient_to_weight_decay() -> None:
    """The A of a new LoRA adapter has gradient 0 while its B is 0."""
    assert update("muon", [0.0], weight_decay=0.5) == pytest.approx(0.95)


def test_muon_refuses_what_is_no_matrix_and_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\), \(3,\); use a LoRA adapter"):
        lookup("emtrain.optimizers", "muon")(parameters((2, 3, 4), (5, 5), (3,)), learning_rate=0.1, weight_decay=0.0)


# --- the contract, kept by every file in emtrain/optimizers ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_optimizer_takes_an_iterator_and_lowers_a_quadratic(name: str) -> None:
    """Also: the learning rate is in the param groups, where a schedule finds it, and the state can be saved."""
    import torch

    weights = parameters((3, 3), (2, 3))
    optimizer = lookup("emtrain.optimizers", name)(iter(weights), learning_rate=0.05, weight_decay=0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.05, 0.01)}
    for _ in range(5):
        optimizer.zero_grad()
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()
    assert all((weight**2).mean().item() < 0.99 for weight in weights)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_defaults_pass_their_own_annotations(name: str) -> None:
    _, *keywords = inspect.signature(lookup("emtrain.optimizers", name)).parameters.values()
    assert [parameter.name for parameter in keywords[:2]] == ["learning_rate", "weight_decay"]
    for parameter in keywords:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        if parameter.default is not parameter.empty:
            assert TypeAdapter(parameter.annotation).validate_python(parameter.default) == parameter.default


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("adamw", "betas", [0.9, 1.0]),
        ("adamw", "eps", -1e-8),
        ("sgd", "momentum", 1.0),
        ("sgd", "nesterov", "maybe"),
        ("lion", "betas", [0.9]),
        ("muon", "ns_steps", 0),
        ("muon", "adjust_lr_fn", "moonlight"),
    ],
)
def test_annotations_refuse_values_out_of_range(name: str, argument: str, value: Any) -> None:
    annotation = inspect.signature(lookup("emtrain.optimizers", name)).parameters[argument].annotation
    with pytest.raises(ValidationError):
        TypeAdapter(annotation).validate_python(value)


def test_signatures_are_read_without_torch() -> None:
    code = f"""
import inspect, sys
from emtrain.lookup import lookup
for name in {NAMES}:
    inspect.signature(lookup("emtrain.optimizers", name))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
