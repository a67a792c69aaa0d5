"""The adapter table: where weights lie, and that a new adapter is PEFT's."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from emtrain.adapter import adapted
from emtrain.packed.packable import adapted_layers
from emtrain.packed.table import AdapterRow, AdapterTable, initial_matrices
from emtrain.spec import AdapterSpec

GROUPS = [{"first": (2, 3)}, {"second": (4, 2)}]


def make_table(dtype: torch.dtype = torch.float32) -> AdapterTable:
    return AdapterTable(GROUPS, capacity=3, rank=2, dtype=dtype, device=torch.device("cpu"))


def test_a_row_holds_the_factors_of_each_layer_in_turn() -> None:
    """Of 2 * 3 + 2 * 2 columns for the first layer and 2 * 2 + 2 * 4 for the second; B lies transposed."""
    table = make_table()
    assert table.values_KP.shape == (3, 22)
    table.values_KP[1] = torch.arange(22.0)
    a, (b,) = table.factors(table.values_KP, ["first"])
    assert a[1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b[1].tolist() == [[6, 7], [8, 9]]
    matrices = AdapterRow(table, 1, ["second"], rank=1).split(table.values_KP[1])
    assert {name: matrix.tolist() for name, matrix in matrices.items()} == {
        "base_model.model.second.lora_A.default.weight": [[10, 11]],
        "base_model.model.second.lora_B.default.weight": [[14], [15], [16], [17]],
    }


def test_layers_of_a_group_have_their_factors_a_side_by_side() -> None:
    """Of 2 * 2 + 2 * 2 columns for both A, then 2 * 3 and 2 * 1 for each B, then what belongs to the last layer."""
    groups = [{"query": (3, 2), "key": (1, 2)}, {"last": (1, 1)}]
    table = AdapterTable(groups, capacity=1, rank=2, dtype=torch.float32, device=torch.device("cpu"))
    a, (b_query, b_key) = table.factors(torch.arange(20.0), ["query", "key"])
    assert a.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert b_query.tolist() == [[8, 9, 10], [11, 12, 13]]
    assert b_key.tolist() == [[14], [15]]
    a_key, _ = table.factors(torch.arange(20.0), ["key"])
    assert a_key.tolist() == [[4, 5], [6, 7]]
    assert table.factors(torch.arange(20.0), ["last"])[0].tolist() == [[16], [17]]


def test_join_undoes_split_and_leaves_zeros_elsewhere() -> None:
    table = make_table()
    row = AdapterRow(table, 0, ["first"], rank=1)
    full = torch.arange(1.0, 23.0)
    joined = row.join(row.split(full))
    assert joined.tolist() == [1, 2, 3, 0, 0, 0, 7, 8, *[0] * 14]
    step = torch.tensor(5.0)
    assert row.join(row.split(step)) == step


def test_it_covers_adapters_up_to_its_rank_on_its_layers() -> None:
    table = make_table()
    assert table.covers(["first"], 2)
    assert not table.covers(["first"], 3)
    assert not table.covers(["first", "third"], 1)


def test_a_half_precision_base_has_fp32_weights_and_operands_in_its_own_dtype() -> None:
    table = make_table(torch.bfloat16)
    table.fill(0, torch.full((22,), 1.0001), 2.0)
    assert table.values_KP[0, 0] == torch.tensor(1.0001)
    assert table.operands_KP.dtype == torch.bfloat16
    assert table.operands_KP[0, 0] == 1.0
    table.clear(0)
    assert not table.operands_KP.any()
    assert not table.scale_K11.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ("v_proj", "down_proj")])
def test_a_new_adapter_is_the_one_that_peft_makes_for_the_seed(
    make_model: Callable[[], PreTrainedModel], dtype: torch.dtype, targets: str | tuple[str, ...]
) -> None:
    model = make_model().to(dtype)
    spec = AdapterSpec(rank=3, target_modules=targets)
    layers = adapted_layers(dict(model.named_modules()), model.get_output_embeddings(), spec)
    with adapted(model, spec, seed=11) as peft_model:
        expected = {name: p.detach().clone() for name, p in peft_model.named_parameters() if p.requires_grad}
    shapes = {name: parameter.shape for name, parameter in expected.items()}
    matrices = initial_matrices(shapes, dtype, seed=11)
    assert [name for name in expected if "lora_A" in name] == [
        f"base_model.model.{layer}.lora_A.default.weight" for layer in layers
    ]
    for name, matrix in matrices.items():
        assert torch.equal(matrix.float(), expected[name].float()), name


def test_drawing_a_new_adapter_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initial_matrices({"a": torch.Size((2, 3)), "b": torch.Size((4, 2))}, torch.float32, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
