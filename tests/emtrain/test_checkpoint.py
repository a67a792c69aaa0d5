"""The state of a run is whole or absent, and holds all that the next step needs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emtrain import checkpoint
from emtrain.checkpoint import NEWEST, RunState, load, save


def state(step: int = 3) -> RunState:
    return RunState(
        step=step,
        tokens=120,
        parameters={"layers.0.q.weight": torch.full((2, 3), float(step)), "head.bias": torch.ones(2).bfloat16()},
        optimizer={"layers.0.q.weight": {"exp_avg": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}},
        generator=torch.get_rng_state(),
    )


def same(a: RunState, b: RunState) -> bool:
    def flat(state: RunState) -> dict[str, torch.Tensor]:
        slots = {f"{name} {slot}": t for name, slots in state.optimizer.items() for slot, t in slots.items()}
        return {**state.parameters, **slots, "generator": state.generator}

    x, y = flat(a), flat(b)
    return (
        (a.step, a.tokens) == (b.step, b.tokens)
        and x.keys() == y.keys()
        and all(x[key].dtype == y[key].dtype and torch.equal(x[key], y[key]) for key in x)
    )


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    save(state(), tmp_path / "state")
    loaded = load(tmp_path / "state")
    assert loaded is not None
    assert same(loaded, state())


def test_there_is_no_state_where_nothing_was_saved(tmp_path: Path) -> None:
    assert load(tmp_path) is None
    assert load(tmp_path / "never") is None


def test_a_newer_state_replaces_the_old_one(tmp_path: Path) -> None:
    save(state(3), tmp_path)
    save(state(6), tmp_path)
    loaded = load(tmp_path)
    assert loaded is not None
    assert same(loaded, state(6))
    assert [path.name for path in tmp_path.iterdir()] == [NEWEST]


def test_an_unfinished_file_beside_it_is_ignored(tmp_path: Path) -> None:
    save(state(3), tmp_path)
    (tmp_path / "unfinished-1234.safetensors").write_bytes(b"half")
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.step == 3


def test_a_save_that_is_cut_off_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(state(3), tmp_path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(state(6), tmp_path)
    loaded = load(tmp_path)
    assert loaded is not None
    assert same(loaded, state(3))
    assert [path.name for path in tmp_path.iterdir()] == [NEWEST]


def test_views_and_tensors_that_share_memory_are_saved_by_value(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    save(RunState(1, 1, {"a": weight.T, "b": weight}, {}, torch.get_rng_state()), tmp_path)
    loaded = load(tmp_path)
    assert loaded is not None
    assert loaded.parameters["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded.parameters["b"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW([p], lr=0.1),
        lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD([p], lr=0.1),  # keeps nothing
    ],
    ids=["adamw", "momentum", "sgd"],
)
def test_an_optimiser_goes_on_from_a_saved_state_as_if_it_had_never_stopped(
    make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], tmp_path: Path
) -> None:
    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer, number: int) -> None:
        parameter.grad = torch.tensor([1.0, -2.0]) * number
        optimizer.step()

    straight = torch.nn.Parameter(torch.ones(2))
    optimizer = make(straight)
    step(straight, optimizer, 1)
    save(RunState(1, 1, {"w": straight}, {"w": dict(optimizer.state[straight])}, torch.get_rng_state()), tmp_path)
    step(straight, optimizer, 2)

    loaded = load(tmp_path)
    assert loaded is not None
    resumed = torch.nn.Parameter(loaded.parameters["w"])
    optimizer = make(resumed)
    optimizer.state[resumed] = dict(loaded.optimizer.get("w", {}))
    step(resumed, optimizer, 2)
    assert torch.equal(resumed, straight)
