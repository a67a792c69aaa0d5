"""Low-rank algebra against the same things computed with whole matrices."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from emtrain.adapter import lora_config
from emtrain.low_rank import LowRank, Update, angle, combine, cosine, inner, load_update, norm, stable_rank, subspaces
from emtrain.spec import AdapterSpec

SHAPES = {"up": (11, 7), "down": (7, 11)}


def drawn(seed: int, rank: int, *, layers: tuple[str, ...] = ("up", "down")) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: LowRank(
            torch.randn(SHAPES[layer][0], rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, SHAPES[layer][1], generator=generator, dtype=torch.float64),
        )
        for layer in layers
    }


def dense(update: Update) -> dict[str, torch.Tensor]:
    return {layer: factors.left @ factors.right for layer, factors in update.items()}


def vector(update: Update) -> torch.Tensor:
    """Both layers as one long vector, zero where the update has none."""
    whole = dense(update)
    return torch.cat([whole.get(layer, torch.zeros(shape).double()).flatten() for layer, shape in SHAPES.items()])


@settings(deadline=None)  # the first decomposition of a process sets up its library
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_products_norms_and_angles_are_those_of_the_whole_matrices(seed: int, ranks: tuple[int, int]) -> None:
    a, b = drawn(seed, ranks[0]), drawn(seed + 1, ranks[1])
    va, vb = vector(a), vector(b)
    expected = float(va @ vb / va.norm() / vb.norm())
    assert inner(a, b) == pytest.approx(float(va @ vb), abs=1e-9 * float(va.norm() * vb.norm()))
    assert norm(a) == pytest.approx(float(va.norm()))
    assert cosine(a, b) == pytest.approx(expected, abs=1e-9)
    assert angle(a, b) == pytest.approx(math.degrees(math.acos(expected)), abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 6))
def test_singular_values_and_stable_rank_are_those_of_the_whole_matrices(seed: int, rank: int) -> None:
    update = drawn(seed, rank)
    ranks = []
    for layer, matrix in dense(update).items():
        columns, values, rows = update[layer].svd
        expected = torch.linalg.svdvals(matrix)[:rank]
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(columns * values @ rows.T, matrix)
        ranks.append(float(expected.square().sum() / expected[0] ** 2))
    assert stable_rank(update) == pytest.approx(np.mean(ranks))


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    weights=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
)
def test_a_sum_is_the_sum_of_the_whole_matrices(
    seed: int, ranks: tuple[int, int], weights: tuple[float, float]
) -> None:
    a, b = drawn(seed, ranks[0]), drawn(seed + 1, ranks[1], layers=("up",))
    whole = combine([(weights[0], a), (weights[1], b)])
    assert whole["up"].left.shape == (11, sum(ranks))
    torch.testing.assert_close(vector(whole), weights[0] * vector(a) + weights[1] * vector(b))


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), ranks=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_principal_angles_are_those_of_scipy(seed: int, ranks: tuple[int, int]) -> None:
    a, b = drawn(seed, ranks[0]), drawn(seed + 1, ranks[1])
    measured = subspaces(a, b)
    assert measured is not None
    for side, of in zip(measured, (lambda m: m, lambda m: m.T), strict=True):
        angles = [
            scipy.linalg.subspace_angles(
                scipy.linalg.orth(of(dense(a)[layer]).numpy()), scipy.linalg.orth(of(dense(b)[layer]).numpy())
            )
            for layer in SHAPES
        ]
        assert side.overlap == pytest.approx(np.mean([np.mean(np.cos(x) ** 2) for x in angles]))
        assert side.angle == pytest.approx(np.degrees(np.mean([np.mean(x) for x in angles])), abs=1e-4)


def test_the_overlap_of_random_spaces_is_the_one_expected_by_chance() -> None:
    found = [subspaces(drawn(2 * seed, 2), drawn(2 * seed + 1, 3)) for seed in range(300)]
    columns = [pair[0] for pair in found if pair]
    # Means of up (3 of 11 dimensions) and down (3 of 7).
    assert columns[0].by_chance == pytest.approx((3 / 11 + 3 / 7) / 2)
    assert np.mean([side.overlap for side in columns]) == pytest.approx(columns[0].by_chance, abs=0.02)


def test_directions_that_are_only_rounding_are_no_part_of_a_space() -> None:
    left, right = torch.eye(5, 2), torch.eye(2, 5)
    left[1, 1] = 1e-8
    _, values, _ = LowRank(left, right).svd
    assert values.tolist() == [1.0]


def test_an_update_that_is_zero_has_a_norm_and_nothing_else() -> None:
    nothing = {"up": LowRank(torch.zeros(11, 2), torch.randn(2, 7))}
    assert norm(nothing) == 0
    assert math.isnan(cosine(nothing, drawn(0, 2)))
    assert math.isnan(angle(nothing, drawn(0, 2)))
    assert math.isnan(stable_rank(nothing))
    assert subspaces(nothing, drawn(0, 2)) is None


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_an_adapter_is_read_with_its_scale(tmp_path: Path, rslora: bool, scale: float) -> None:
    a, b = torch.randn(4, 7), torch.randn(11, 4)
    name = "base_model.model.model.up"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "adapter_model.safetensors")
    lora_config(AdapterSpec(rank=4, alpha=8, rslora=rslora)).save_pretrained(tmp_path)
    update = load_update(tmp_path)
    assert list(update) == ["model.up"]
    torch.testing.assert_close(update["model.up"].left @ update["model.up"].right, scale * b @ a)


def test_what_is_no_plain_lora_is_refused(tmp_path: Path) -> None:
    config = lora_config(AdapterSpec(rank=4))
    config.use_dora = True
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_dora is True; only plain LoRA can be compared"):
        load_update(tmp_path)
    lora_config(AdapterSpec(rank=4)).save_pretrained(tmp_path)
    name = "base_model.model.up"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(4, 7), f"{name}.lora_B.weight": torch.ones(11, 4), "bias": torch.ones(1)},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match="more than pairs of lora_A and lora_B"):
        load_update(tmp_path)
