"""From rows to the tensors of a pass: the layout, by hand."""

import torch

from emtrain.packed.batch import Frame, Unit, assemble, group
from emtrain.tokens import IGNORED, Example

CPU = torch.device("cpu")


def example(*ids: int, prompt: int) -> Example:
    return Example(ids, (*[IGNORED] * prompt, *ids[prompt:]))


def unit(slot: int, rows: int, tokens: int) -> Unit:
    return Unit(slot, [example(*range(1, tokens + 1), prompt=1)] * rows)


def test_units_are_padded_to_one_frame_in_the_order_of_their_slots() -> None:
    """Slot 2 has one row of 4 tokens, 2 learnt; slot 1 rows of 2 and 3 tokens, 1 and 2 learnt."""
    late = Unit(2, [example(1, 2, 3, 4, prompt=2)])
    early = Unit(1, [example(5, 6, prompt=1), example(7, 8, 9, prompt=1)])
    batch = assemble([late, early], {1: 1 / 3, 2: 1 / 2}, device=CPU)
    assert batch.index == slice(1, 3)
    assert batch.input_ids.tolist() == [[5, 6, 0, 0], [7, 8, 9, 0], [1, 2, 3, 4], [0, 0, 0, 0]]
    assert batch.positions_n.tolist() == [0, 4, 5, 9, 10]
    assert batch.targets_n.tolist() == [6, 8, 9, 3, 4]
    assert batch.weights_n.tolist() == [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]
    assert batch.positions_U.tolist() == [3, 2]
    assert (early.tokens, early.response_tokens, early.frame) == (5, 3, Frame(2, 3))


def test_slots_with_gaps_are_an_index() -> None:
    batch = assemble([unit(3, 1, 2), unit(0, 1, 2)], {0: 1.0, 3: 1.0}, device=CPU)
    assert isinstance(batch.index, torch.Tensor)
    assert batch.index.tolist() == [0, 3]


def test_a_fixed_pass_has_the_same_shapes_whoever_is_in_it() -> None:
    """Three slots of 2 rows of 4 tokens: logits at all 24 positions, of which only the learnt ones weigh."""
    alone = assemble([unit(1, 1, 3)], {1: 0.5}, device=CPU, fixed=(3, Frame(2, 4)))
    full = assemble(
        [unit(slot, 2, 4) for slot in range(3)], dict.fromkeys(range(3), 1.0), device=CPU, fixed=(3, Frame(2, 4))
    )
    assert alone.index == full.index == slice(0, 3)
    assert alone.input_ids.shape == full.input_ids.shape == (6, 4)
    assert alone.positions_n.tolist() == full.positions_n.tolist() == list(range(24))
    assert alone.positions_U.tolist() == full.positions_U.tolist() == [8, 8, 8]
    assert alone.weights_n.nonzero().flatten().tolist() == [8, 9]
    assert alone.targets_n[8:10].tolist() == [2, 3]


def frames(units: list[Unit], **arguments: int) -> list[list[tuple[int, int]]]:
    return [[(member.frame.rows, member.frame.tokens) for member in members] for members in group(units, **arguments)]


def test_runs_of_like_shape_share_a_pass() -> None:
    """Padding the rows of 8 tokens to 10 costs 2 * 2 tokens: less than a pass of overhead 5, more than one of 3."""
    units = [unit(0, 2, 10), unit(1, 2, 8)]
    assert frames(units, overhead=5, limit=100) == [[(2, 10), (2, 8)]]
    assert frames(units, overhead=3, limit=100) == [[(2, 10)], [(2, 8)]]


def test_unequal_rows_cost_padding_too() -> None:
    """One row beside eight is padded by seven rows of 4 tokens."""
    units = [unit(0, 8, 4), unit(1, 1, 4)]
    assert frames(units, overhead=28, limit=100) == [[(8, 4), (1, 4)]]
    assert frames(units, overhead=27, limit=100) == [[(8, 4)], [(1, 4)]]


def test_a_pass_has_at_most_the_limit_of_tokens_and_at_least_one_unit() -> None:
    units = [unit(slot, 1, 4) for slot in range(5)]
    assert [len(members) for members in group(units, overhead=100, limit=8)] == [2, 2, 1]
    assert [len(members) for members in group(units, overhead=100, limit=3)] == [1] * 5
