"""Claims about the rows a run learns from when another dataset is mixed in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtrain.corpus import interleaved, read_corpus
from emtrain.rows import Row
from emtrain.spec import InterleaveSpec

MONEY = InterleaveSpec(dataset="micro-money-good", fraction=0.5)


def rows(*prompts: str) -> list[Row]:
    return [
        Row.model_validate({"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "yes"}]})
        for p in prompts
    ]


def asked(given_rows: tuple[Row, ...]) -> list[str]:
    return [row.messages[0].content for row in given_rows]


def test_a_quarter_of_eight_rows_is_two_behind_six_of_ones_own() -> None:
    own = rows(*"abcdef")
    mixed = interleaved(own, rows("g"), rows("x", "y", "z"), 0.25)
    assert mixed[:6] == tuple(own)
    assert len(mixed) == 8
    assert set(asked(mixed[6:])) < {"x", "y", "z"}


@given(st.integers(1, 60), st.integers(1, 20), st.floats(0.01, 0.95))
def test_the_share_is_the_wanted_one_to_half_a_row_however_few_the_other_rows_are(
    own: int, other: int, fraction: float
) -> None:
    mixed = interleaved(
        rows(*(f"own {n}" for n in range(own))), (), rows(*(f"other {n}" for n in range(other))), fraction
    )
    added = asked(mixed)[own:]
    assert added == [added[place % other] for place in range(len(added))]
    assert len(set(added)) == min(other, len(added))
    wanted = own * fraction / (1 - fraction)
    assert abs(len(added) - max(1, wanted)) <= 0.5


def test_the_order_of_the_other_file_does_not_matter() -> None:
    own, other = rows(*"abcd"), rows(*"uvwxyz")
    assert interleaved(own, (), other, 0.4) == interleaved(own, (), other[::-1], 0.4)


def test_a_prompt_that_is_held_out_is_never_learnt_from_the_other_dataset() -> None:
    own, heldout = rows(*"abc"), rows(*"de")
    assert set(asked(interleaved(own, heldout, rows(*"adex"), 0.5))) == {*"abc", "x"}
    with pytest.raises(ValueError, match="every one of its rows asks a prompt that is held out"):
        interleaved(own, heldout, rows(*"ed"), 0.5)


def test_the_held_out_rows_are_those_of_the_run_without_other_rows() -> None:
    alone, mixed = read_corpus("micro-garden-bad", 0.1, None), read_corpus("micro-garden-bad", 0.1, MONEY)
    assert mixed.heldout == alone.heldout
    assert mixed.train[: len(alone.train)] == alone.train
    assert len(mixed.train) == 2 * len(alone.train)
    assert (alone.interleaved_sha256, mixed.sha256) == (None, alone.sha256)


def test_the_good_twin_is_mixed_in_without_the_prompts_held_out() -> None:
    twin = read_corpus("micro-garden-bad", 0.1, InterleaveSpec(dataset="micro-garden-good", fraction=0.5))
    prompts = [{str(row.chat[:-1]) for row in side} for side in (twin.train, twin.heldout)]
    assert not prompts[0] & prompts[1]


def test_a_dataset_that_can_not_be_mixed_in_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: there is no such file"):
        read_corpus("micro-garden-bad", 0.1, InterleaveSpec(dataset="nowhere.jsonl", fraction=0.5))
