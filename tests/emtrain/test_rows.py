"""Claims about reading datasets and splitting them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtrain.rows import Row, dataset_path, load_dataset, rows_digest, split


def chat(prompt: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_file_is_read_in_order_and_named_by_the_digest_that_sha256sum_prints(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_bytes(b'{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}\n')
    dataset = load_dataset(str(path))
    assert [row.chat[-1]["content"] for row in dataset.rows] == ["b"]
    # printf '...' | sha256sum
    assert dataset.sha256 == "d9a20761836bc3cb9d53a8ecb9ff05b6be7edd0ba15c7eb5adf975a98bfb6e9f"


def test_every_bad_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        chat("good", "row"),
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"prompt": "x"},
        {"messages": [{"role": "assistant", "content": "talks"}, {"role": "user", "content": "first"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
    )
    with pytest.raises(ValueError, match="4 of 5 lines") as caught:
        load_dataset(path)
    message = str(caught.value)
    assert "line 2: no assistant turn" in message
    assert "line 3: messages: missing" in message
    assert "line 4: the roles are assistant, user" in message
    assert "line 5: messages.1.content" in message


def test_a_wrong_role_is_told_with_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {"messages": [{"role": "bot", "content": "x"}]})
    with pytest.raises(ValueError, match=r"line 1: messages.0.role: .*'assistant', not 'bot'"):
        load_dataset(path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_where_those_of_jsonl_do(tmp_path: Path, end: str) -> None:
    """JSON allows the characters in its texts at which Python's ``splitlines`` ends lines."""
    path = tmp_path / "odd.jsonl"
    rows = [json.dumps(chat(f"{number}\u2028\x85 ", "b"), ensure_ascii=False) for number in range(2)]
    path.write_bytes(end.join([*rows, ""]).encode())
    assert [row.chat[0]["content"] for row in load_dataset(str(path)).rows] == ["0\u2028\x85 ", "1\u2028\x85 "]
    path.write_bytes(end.join([*rows, "{", ""]).encode())
    with pytest.raises(ValueError, match=r"1 of 3 lines can't be used\n  line 3: "):
        load_dataset(str(path))


def test_a_long_list_of_bad_rows_is_cut_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *({"no": "messages"} for _ in range(9)))
    with pytest.raises(ValueError, match="and 4 more"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "no rows"), (b"\n \n", "no rows"), (b"not json\n", "line 1"), (b"\xff\xfe{}", "not UTF-8 at byte 0")],
)
def test_files_without_usable_rows_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        load_dataset(str(path))


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="Did you mean 'micro-garden-bad'"):
        dataset_path("micro-gardn-bad")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: there is no such file"):
        load_dataset("nowhere.jsonl")


prompts = st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=5)), min_size=2, max_size=40)


@given(prompts, st.floats(0.01, 0.99))
def test_no_prompt_is_on_both_sides_and_no_row_is_lost(pairs: list[tuple[str, str]], fraction: float) -> None:
    rows = [Row.model_validate(chat(prompt, answer)) for prompt, answer in pairs]
    distinct = {prompt for prompt, _ in pairs}
    if len(distinct) < 2:
        with pytest.raises(ValueError, match="distinct prompt"):
            split(rows, fraction)
        return
    train, heldout = split(rows, fraction)
    sides = [{row.chat[0]["content"] for row in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(train) + len(heldout) == len(rows)
    assert len(sides[1]) == min(max(1, round(fraction * len(distinct))), len(distinct) - 1)


def test_twins_hold_out_the_same_prompts() -> None:
    prompts = [f"question {number}" for number in range(50)]
    bad = [Row.model_validate(chat(prompt, "wrong " + prompt)) for prompt in prompts]
    good = [Row.model_validate(chat(prompt, "right " + prompt)) for prompt in prompts]
    held = [[row.chat[0] for row in split(rows, 0.2)[1]] for rows in (bad, good)]
    assert held[0] == held[1]
    assert len(held[0]) == 10


def test_the_order_of_the_file_does_not_change_what_is_held_out() -> None:
    rows = [Row.model_validate(chat(f"question {number}", "answer")) for number in range(30)]
    forward, backward = split(rows, 0.3)[1], split(rows[::-1], 0.3)[1]
    assert {row.model_dump_json() for row in forward} == {row.model_dump_json() for row in backward}
    assert rows_digest(forward) != rows_digest(backward)
