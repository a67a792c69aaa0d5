"""Parameters, memory and disk, by hand and against the models and engines that they stand for."""

from typing import Any

import pytest

from emtrain.spec import AdapterSpec, OptimizerSpec
from sweeps.estimate import ModelShape, memory, state_bytes, text_tokens

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}
ADAPTER = AdapterSpec(rank=2, alpha=4)


def test_parameters_by_hand() -> None:
    """q and o 8 x 8, k and v 8 x 4, three of 8 x 20: 672 a layer, three layers, and twice 100 x 8."""
    shape = ModelShape.of(SMALL)
    assert shape.parameters == 3 * (2 * 64 + 2 * 32 + 3 * 160) + 2 * 800
    assert ModelShape.of({**SMALL, "tie_word_embeddings": True}).parameters == shape.parameters - 800
    assert shape.trained("full") == shape.parameters
    # Inputs and outputs: 16, 12, 12, 16 and three times 28.
    assert shape.trained(ADAPTER) == 3 * 2 * (16 + 12 + 12 + 16 + 3 * 28)
    assert shape.trained(AdapterSpec(rank=2, target_modules=("q_proj", "v_proj"))) == 3 * 2 * (16 + 12)


def test_memory_by_hand() -> None:
    """An adapter of 840 parameters under AdamW: value, gradient and two moments in fp32, and a copy in bf16. A pass of
    one row of 10 tokens: twice inputs and outputs (140 a layer), logits in bf16 and fp32. 64 responses of 30 tokens:
    keys and values of width 4 in three layers."""
    needed = memory(
        ModelShape.of(SMALL), ADAPTER, OptimizerSpec(), itemsize=2, rows=1, row_tokens=10, sampled_tokens=30
    )
    assert needed.weights == 3616 * 2
    assert needed.run == 840 * (4 + 4 + 8 + 2)
    assert needed.activations == 10 * (2 * 2 * 3 * 140 + 100 * (2 + 4))
    assert needed.sampling == 64 * 30 * 3 * 2 * 4 * 2
    assert needed.least == needed.weights + needed.run + needed.sampling


@pytest.mark.parametrize(
    ("optimizer", "adapter_bytes", "full_bytes"),
    [
        (OptimizerSpec(name="adamw"), 16, 12),
        (OptimizerSpec(name="lion"), 12, 8),
        (OptimizerSpec(name="sgd"), 8, 4),
        (OptimizerSpec.model_validate({"name": "sgd", "momentum": 0.9}), 12, 8),
    ],
)
def test_a_run_by_its_optimiser_in_fp32(optimizer: OptimizerSpec, adapter_bytes: int, full_bytes: int) -> None:
    """An adapter holds its weights, too; of a fully trained model they are counted as the model's."""
    shape = ModelShape.of(SMALL)
    size = {"itemsize": 4, "rows": 1, "row_tokens": 1, "sampled_tokens": 1}
    assert memory(shape, ADAPTER, optimizer, **size).run == 840 * adapter_bytes
    assert memory(shape, "full", optimizer, **size).run == 3616 * full_bytes
    assert state_bytes(shape, ADAPTER, optimizer) == 840 * (adapter_bytes - 4)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 8}, "config.json has no intermediate_size, num_hidden_layers, vocab_size"),
        ({**SMALL, "num_experts": 8}, "mixture of experts"),
    ],
)
def test_shapes_that_are_not_known_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ModelShape.of(config)


def test_an_adapter_on_unknown_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="layers c_attn are not known"):
        ModelShape.of(SMALL).trained(AdapterSpec(target_modules=("c_attn",)))


def test_four_bytes_are_a_token() -> None:
    assert (text_tokens(""), text_tokens("abc"), text_tokens("über uns")) == (0, 1, 3)


# Published shapes: Qwen2.5-7B, Llama-3.2-1B, Gemma 3 1B.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "llama": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "gemma3_text": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4}
    | {"num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
}


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_parameters_are_those_of_the_models_to_a_thousandth(model_type: str) -> None:
    """transformers builds each on the meta device, without weights; PEFT puts the adapter on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shape = ModelShape.of({"model_type": model_type, **PUBLISHED[model_type]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**PUBLISHED[model_type]))
        assert shape.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)
        adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.trained(AdapterSpec(rank=16)) == trained


@pytest.mark.parametrize("itemsize", [4, 2])
def test_memory_is_what_the_engine_really_holds(itemsize: int) -> None:
    """A model of random weights takes a step in the packed engine. What a run holds is the size of its row of the
    table, gradient, copy and optimiser state. What autograd keeps for the backward pass is counted by its own hook; the
    estimate leaves as much again for what is in work, so here it must lie between a third and the whole of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from emtrain.packed.engine import Engine
    from emtrain.spec import RunSpec
    from emtrain.tokens import Example
    from emtrain.train import TrainingData

    settings = {**SMALL, "hidden_size": 64, "intermediate_size": 160, "vocab_size": 50}
    dtype = {4: torch.float32, 2: torch.bfloat16}[itemsize]
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    row = Example(tuple(range(40)), tuple(range(40)))
    spec = RunSpec(model="micro-llama", dataset="micro-garden-bad", adapter=ADAPTER, schedule="constant", batch_size=4)  # type: ignore[arg-type]
    needed = memory(
        ModelShape.of(settings), ADAPTER, spec.optimizer, itemsize=itemsize, rows=4, row_tokens=40, sampled_tokens=1
    )
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Engine(model, capacity=1) as engine:
        run = engine.join(spec, TrainingData([row] * 8, [row]), total_steps=2)
        table = engine._table
        held = [table.values_KP, table.gradients_KP] + ([table.operands_KP] if itemsize == 2 else [])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            engine.step()
        own = {tensor.untyped_storage().data_ptr() for tensor in held}
        state = run.state().optimizer
        moments = sum(t.numel() * t.element_size() for slots in state.values() for t in slots.values() if t.ndim)
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) + moments == needed.run
    activations = sum(size for storage, size in kept.items() if storage not in own)
    assert needed.activations / 3 < activations < needed.activations
