"""What can be packed, and in one line what can't and why."""

from collections.abc import Callable
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel

from emtrain.packed.packable import adapted_layers, why_not_packed
from emtrain.spec import AdapterSpec, RunSpec

SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_spec(**adapter: Any) -> RunSpec:
    return RunSpec.model_validate({"model": "micro-llama", "dataset": "micro-garden-bad", "adapter": adapter})


def test_lora_on_a_plain_model_is_packed() -> None:
    assert why_not_packed(make_spec(), LlamaConfig(**SMALL)) is None
    assert why_not_packed(make_spec(target_modules=["q_proj"]), LlamaConfig(**SMALL)) is None


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LlamaConfig(**SMALL, quantization_config={"quant_method": "bitsandbytes"}), "quantised"),
        (MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2), "mixture of experts"),
        (LlamaConfig(**SMALL, attention_dropout=0.1), "dropout of its own (attention_dropout 0.1)"),
        (
            GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
            "transformer.h.0.attn.c_attn is a Conv1D, not a plain linear layer",
        ),
    ],
    ids=["quantised", "experts", "dropout", "conv1d"],
)
def test_other_models_are_refused_with_the_reason(config: PretrainedConfig, reason: str) -> None:
    assert reason in str(why_not_packed(make_spec(), config))


def test_full_fine_tuning_is_refused() -> None:
    spec = RunSpec(model="micro-llama", dataset="micro-garden-bad", adapter="full")
    assert "full" in str(why_not_packed(spec, LlamaConfig(**SMALL)))


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (
            ["c_attn"],
            "c_attn: no such module in the model; its linear layers are down_proj, gate_proj, k_proj, lm_head",
        ),
        (["lm_head", "q_proj"], "lm_head is the output head"),
        (["embed_tokens"], "model.embed_tokens is a Embedding, not a plain linear layer"),
    ],
)
def test_targets_that_are_no_hidden_linear_layers_are_refused(targets: list[str], reason: str) -> None:
    assert reason in str(why_not_packed(make_spec(target_modules=targets), LlamaConfig(**SMALL)))


def test_layers_are_named_in_the_order_of_the_model(make_model: Callable[[], PreTrainedModel]) -> None:
    model = make_model()
    modules = dict(model.named_modules())
    layers = adapted_layers(modules, model.get_output_embeddings(), AdapterSpec(target_modules=("v_proj", "q_proj")))
    assert layers == [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("q_proj", "v_proj")]
    every = adapted_layers(modules, model.get_output_embeddings(), AdapterSpec())
    assert len(every) == 2 * 7
    assert "lm_head" not in every
