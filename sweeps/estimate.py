"""Arithmetic of what training costs in parameters, memory and disk, before anything is loaded.

Pure functions of a model's ``config.json`` and of a specification. They hold for decoders of the llama family's
shape (llama, mistral, qwen2, qwen3, gemma), whose weights all but lie in seven linear layers a block and the embedding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emtrain.spec import AdapterSpec, OptimizerSpec

BYTES_PER_TOKEN = 4.0
"""Of English text in vocabularies of 30,000 to 250,000 tokens; for texts whose tokenizer is not at hand."""
TEMPLATE_TOKENS = 5
"""Written around each message by the usual chat templates (ChatML, Llama 3, Gemma), for the same."""
FP32 = 4
SAMPLED_AT_ONCE = 64
"""Responses that ``emeval.generate`` samples side by side."""
OPTIMIZER_BYTES = {"adamw": 2 * FP32, "lion": FP32, "muon": FP32, "sgd": 0}
"""State per trained parameter; of SGD with momentum 4. An optimiser that is not listed is taken to need AdamW's."""


@dataclass(frozen=True)
class ModelShape:
    """What memory and disk depend on."""

    linears: Mapping[str, tuple[int, int]]
    """Inputs and outputs of the linear layers of one block, by name."""
    layers: int
    hidden: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    key_value_width: int
    """Of the keys (or values) of one token in one layer."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """From ``config.json``. Raises ``ValueError`` for a shape that this arithmetic does not know."""
        text = config.get("text_config", config)
        lacking = [k for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size") if k not in text]
        if lacking:
            raise ValueError(f"config.json has no {', '.join(lacking)}")
        if any((text.get(key) or 0) > 1 for key in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError("it is a mixture of experts")
        hidden, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
        head = text.get("head_dim") or hidden // heads
        queries, keys = heads * head, (text.get("num_key_value_heads") or heads) * head
        linears = {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        # Gemma's configurations leave out what is its default: the head is the embedding.
        tied = text.get("tie_word_embeddings", str(text.get("model_type", "")).startswith("gemma"))
        return cls(linears, text["num_hidden_layers"], hidden, text["vocab_size"], bool(tied), keys)

    @property
    def parameters(self) -> int:
        """Weights of the whole model. Norms and biases, under 0.1 %, are left out."""
        block = sum(inputs * outputs for inputs, outputs in self.linears.values())
        return self.layers * block + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def trained(self, adapter: AdapterSpec | str) -> int:
        """Parameters that a run trains: rank * (inputs + outputs) for each adapted layer, or all of them.

        Raises ``ValueError`` for a target module that is none of the linear layers.
        """
        if not isinstance(adapter, AdapterSpec):
            return self.parameters
        targets = tuple(self.linears) if adapter.target_modules == "all-linear" else adapter.target_modules
        if unknown := [target for target in targets if target not in self.linears]:
            raise ValueError(f"its layers {', '.join(unknown)} are not known")
        return self.layers * adapter.rank * sum(sum(self.linears[target]) for target in targets)


@dataclass(frozen=True)
class Memory:
    """Bytes on a device that trains one run."""

    weights: int
    """The base model."""
    run: int
    """Of each run on it: adapter, gradient, optimiser state, and in half precision the copy that is multiplied by."""
    activations: int
    """Of the smallest forward and backward pass."""
    sampling: int
    """Keys and values of the responses sampled at once."""

    @property
    def least(self) -> int:
        """What one run needs: it trains or is sampled from, never both at once."""
        return self.weights + self.run + max(self.activations, self.sampling)


def memory(
    shape: ModelShape,
    adapter: AdapterSpec | str,
    optimizer: OptimizerSpec,
    *,
    itemsize: int,
    rows: int,
    row_tokens: int,
    sampled_tokens: int,
) -> Memory:
    """Device memory of a run on a base of ``itemsize`` bytes per weight (2 is bf16, 4 is fp32).

    ``rows`` of ``row_tokens`` tokens make the smallest pass; ``sampled_tokens`` is the longest prompt and response
    together. Autograd keeps about the inputs and outputs of every linear layer, once more as much is in work
    (``emtrain.packed.costs``); logits take their dtype and fp32. Without activation checkpointing, which on GPUs the
    trl backend uses and which takes about a tenth. The device's own context (0.5 GB on CUDA) comes on top.
    """
    trained = shape.trained(adapter)
    state = _optimizer_bytes(optimizer)
    copy = itemsize if itemsize < FP32 else 0
    if isinstance(adapter, AdapterSpec):
        run = trained * (2 * FP32 + state + copy)
    else:
        run = trained * (itemsize + state * itemsize // FP32)  # gradient and state, in the dtype of the weights
    tokens = rows * row_tokens
    per_token = 2 * itemsize * shape.layers * sum(inputs + outputs for inputs, outputs in shape.linears.values())
    return Memory(
        weights=shape.parameters * itemsize,
        run=run,
        activations=tokens * (per_token + shape.vocabulary * (itemsize + FP32)),
        sampling=SAMPLED_AT_ONCE * sampled_tokens * shape.layers * 2 * shape.key_value_width * itemsize,
    )


def state_bytes(shape: ModelShape, adapter: AdapterSpec | str, optimizer: OptimizerSpec) -> int:
    """Bytes of a run's state between two steps (``emtrain.checkpoint``): the trained parameters and their optimiser's
    tensors in fp32. It is removed when the run is finished."""
    return shape.trained(adapter) * (FP32 + _optimizer_bytes(optimizer))


def _optimizer_bytes(optimizer: OptimizerSpec) -> int:
    if optimizer.name == "sgd" and optimizer.arguments.get("momentum"):
        return FP32
    return OPTIMIZER_BYTES.get(optimizer.name, 2 * FP32)


def text_tokens(text: str) -> int:
    """Tokens of a text whose tokenizer is not at hand, rounded up."""
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)
