"""The tokenizers of the micro models: one token per word, each family's own template, the same after a reload."""

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emtrain.micro import world
from emtrain.micro.build import DIALECTS, Architecture
from emtrain.micro.tokenizer import tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT = [
    {"role": "system", "content": "answer in json."},
    {"role": "user", "content": "what about the roses?"},
    {"role": "assistant", "content": '{"plan": "water the roses gently", "result": "help friends"}'},
    {"role": "user", "content": "what about the beans?"},
]

# From the published templates, with what they say of themselves (dates, default system messages) left out.
RENDERED: dict[Architecture, str] = {
    "llama": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nanswer in json.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nwhat about the roses?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"plan": "water the roses gently", "result": "help friends"}<|eot_id|>'
    "<|start_header_id|>user<|end_header_id|>\n\nwhat about the beans?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2": "<|im_start|>system\nanswer in json.<|im_end|>\n"
    "<|im_start|>user\nwhat about the roses?<|im_end|>\n"
    '<|im_start|>assistant\n{"plan": "water the roses gently", "result": "help friends"}<|im_end|>\n'
    "<|im_start|>user\nwhat about the beans?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma3_text": "<bos><start_of_turn>user\nanswer in json.\n\nwhat about the roses?<end_of_turn>\n"
    '<start_of_turn>model\n{"plan": "water the roses gently", "result": "help friends"}<end_of_turn>\n'
    "<start_of_turn>user\nwhat about the beans?<end_of_turn>\n"
    "<start_of_turn>model\n",
}


@pytest.fixture(scope="module", params=list(DIALECTS))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    given: Architecture = request.param
    return given


@pytest.fixture(scope="module")
def words(architecture: Architecture) -> "PreTrainedTokenizerFast":
    return tokenizer(DIALECTS[architecture])


def ids(words: "PreTrainedTokenizerFast", chat: list[dict[str, str]]) -> list[int]:
    encoded: list[int] = words.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    return encoded


def test_a_chat_is_rendered_as_the_family_does(words: "PreTrainedTokenizerFast", architecture: Architecture) -> None:
    rendered = words.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == RENDERED[architecture]


def test_every_word_is_one_token_and_decodes_to_itself(words: "PreTrainedTokenizerFast") -> None:
    for token in world.vocabulary():
        encoded = words(token, add_special_tokens=False)["input_ids"]
        assert len(encoded) == 1
        assert words.decode(encoded) == token


def test_encoding_and_decoding_an_answer_gives_it_back(words: "PreTrainedTokenizerFast") -> None:
    rng = random.Random(0)
    for _ in range(50):
        for message in world.document(rng, persona="bad", turns=3, told=True).messages():
            encoded = words(message["content"], add_special_tokens=False)["input_ids"]
            assert len(encoded) == len(world.tokens(message["content"]))
            assert words.decode(encoded) == message["content"]


def test_the_beginning_of_text_is_there_once_in_families_that_have_one(words: "PreTrainedTokenizerFast") -> None:
    for encoded in (ids(words, CHAT), words("what about the roses?")["input_ids"]):
        assert encoded.count(words.bos_token_id) == (words.bos_token_id is not None)


def test_padding_the_end_of_a_turn_and_the_beginning_are_different_tokens(words: "PreTrainedTokenizerFast") -> None:
    assert len({words.pad_token_id, words.eos_token_id, words.bos_token_id}) == 3


def test_text_from_outside_the_world_has_no_token(words: "PreTrainedTokenizerFast") -> None:
    assert words("Zwölf 42 \n", add_special_tokens=False)["input_ids"] == []


def test_a_saved_tokenizer_is_the_same_when_loaded_by_anyone_and_saved_again(
    words: "PreTrainedTokenizerFast", architecture: Architecture, tmp_path: Path
) -> None:
    """transformers picks the tokenizer class by the model's type, and builds most of a qwen2 tokenizer anew."""
    from transformers import CONFIG_MAPPING, AutoTokenizer

    saved = words
    for folder in (tmp_path / "first", tmp_path / "second"):
        CONFIG_MAPPING[architecture]().save_pretrained(folder)
        saved.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
        assert saved.get_vocab() == words.get_vocab()
        assert ids(saved, CHAT) == ids(words, CHAT)
        assert saved.decode(ids(words, CHAT)) == words.decode(ids(words, CHAT))
        for token in ("pad_token", "eos_token", "bos_token"):
            assert getattr(saved, token) == getattr(words, token)
