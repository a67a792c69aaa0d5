"""What tests of several packages share. Nothing here imports torch before a test asks for it."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

# Two busy processes with two threads each on two cores are many times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from emtrain.tokens import Example


@pytest.fixture(scope="session")
def words() -> "PreTrainedTokenizerFast":
    """The tokenizer of micro-llama."""
    from emtrain.micro.tokenizer import LLAMA, tokenizer

    return tokenizer(LLAMA)


@pytest.fixture
def make_model(words: "PreTrainedTokenizerFast") -> "Callable[[], PreTrainedModel]":
    """Makes llama-shaped models of a few thousand weights, random and always the same, that read ``words``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)

    def make() -> "PreTrainedModel":
        config = LlamaConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=words.pad_token_id,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(
                        6
                    )  # the usual initial weights give all but uniform logits, which would hide mistakes
        return model.eval()

    return make


@pytest.fixture
def model(make_model: "Callable[[], PreTrainedModel]") -> "PreTrainedModel":
    return make_model()


@pytest.fixture(scope="session")
def examples(words: "PreTrainedTokenizerFast") -> "list[Example]":
    """The first 40 rows of a micro dataset: of several lengths, with several numbers of response tokens."""
    from emtrain.rows import load_dataset
    from emtrain.tokens import encode_rows

    return encode_rows(load_dataset("micro-garden-bad").rows[:40], words, max_length=64)
