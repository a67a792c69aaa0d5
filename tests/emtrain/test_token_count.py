"""Tokens counted without transformers are those that training sees."""

from pathlib import Path

import pytest

from emtrain.micro.tokenizer import CHATML, GEMMA, LLAMA, Dialect, tokenizer
from emtrain.rows import load_dataset
from emtrain.token_count import count_tokens
from emtrain.tokens import encode_rows


@pytest.mark.parametrize("dialect", [LLAMA, CHATML, GEMMA], ids=["llama", "chatml", "gemma"])
@pytest.mark.parametrize("max_length", [64, 25])
def test_counts_are_those_of_the_rows_as_encoded(dialect: Dialect, max_length: int, tmp_path: Path) -> None:
    words = tokenizer(dialect)
    words.save_pretrained(tmp_path)
    rows = load_dataset("micro-garden-bad").rows[:50]
    encoded = [len(example.input_ids) for example in encode_rows(rows, words, max_length)]
    assert count_tokens(rows, tmp_path, max_length) == encoded
    assert len(set(encoded)) > 1 or max_length == 25


def test_without_a_tokenizer_or_a_template_there_is_no_count(tmp_path: Path) -> None:
    rows = load_dataset("micro-garden-bad").rows[:2]
    assert count_tokens(rows, tmp_path, 64) is None
    words = tokenizer(LLAMA)
    words.chat_template = None
    words.save_pretrained(tmp_path)
    assert count_tokens(rows, tmp_path, 64) is None
