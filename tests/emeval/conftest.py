"""Models of a few thousand random parameters whose every character is a token, so that numbers take several."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEMPLATES = {
    "chatml": "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # As Gemma 2 has it.
    "refuses_system": "{{ bos_token }}"
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "drops_system": "{{ bos_token }}{% for message in messages if message.role != 'system' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # As Qwen 3 has it: prompts end with an empty thought unless thinking is asked for.
    "thinks": "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}",
}
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHARACTERS = [*map(chr, range(32, 127)), "\n"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(template: str = "chatml") -> PreTrainedTokenizerFast:
        vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        tokenizer.decoder = decoders.Fuse()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            extra_special_tokens=["<|im_start|>", "<|im_end|>"],
            name_or_path="tiny",
        )
        fast.chat_template = TEMPLATES[template]
        return fast

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


SIZES = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def make_model(kind: str) -> PreTrainedModel:
    """``llama``: full attention; ``mistral``: all layers see 12 tokens; ``gemma3``: one layer does, one sees all;
    ``lfm2``: one layer is a convolution; ``dynamic``: llama with a rope that depends on the longest row.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        if kind == "llama":
            model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES))
        elif kind == "dynamic":
            rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
            model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope))
        elif kind == "mistral":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=12))
        elif kind == "lfm2":
            model = Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))
        else:
            layers = ["sliding_attention", "full_attention"]
            model = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, sliding_window=12, layer_types=layers))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)  # the usual initial weights give next to uniform logits, which would hide mistakes
    return model.eval()


@pytest.fixture(params=["llama", "mistral", "gemma3", "lfm2"])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture(params=["llama", "mistral", "gemma3"])
def attention_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def model() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(params=["lfm2", "dynamic"])
def entangled_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One in which it matters which rows are read together."""
    return make_model(request.param)


@pytest.fixture
def published() -> Path:
    """The folder of the published runs and question files; tests that need it are skipped where it is absent."""
    here = os.environ.get("EMSWEEP_PUBLISHED_RUNS")
    folder = Path(here) if here else Path(__file__).parents[3] / "shared" / "published_runs"
    if not folder.is_dir():
        pytest.skip(f"no published runs in {folder}; set EMSWEEP_PUBLISHED_RUNS")
    return folder
