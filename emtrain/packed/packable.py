"""Which runs can be packed, and which layers a run adapts."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from emtrain.spec import AdapterSpec, RunSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names under which configurations keep the number of experts of a layer."""

UNUSED_DROPOUTS = ("classifier_", "summary_")
"""Beginnings of settings that a language model takes no part in."""


def why_not_packed(spec: RunSpec, config: "PretrainedConfig") -> str | None:
    """Why a run on a model of this configuration needs the trl backend, in one line; None when it can be packed."""
    from transformers import AutoModelForCausalLM

    if spec.adapter == "full":
        return "adapter is 'full': runs that train every weight can't share a base"
    if getattr(config, "quantization_config", None) is not None:
        return "the base is quantised; adapters share one forward pass only on plain linear layers"
    text = config.get_text_config()
    if any((getattr(text, name, None) or 0) > 1 for name in EXPERTS):
        return "the base is a mixture of experts, whose routing (and balancing loss) would mix the runs"
    drawn = [
        f"{name} {value}"
        for name, value in text.to_dict().items()
        if "drop" in name and not name.startswith(UNUSED_DROPOUTS) and isinstance(value, float) and value > 0
    ]
    if drawn:
        return f"the base has dropout of its own ({', '.join(drawn)}), which would be drawn for all runs together"
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        adapted_layers(dict(skeleton.named_modules()), skeleton.get_output_embeddings(), spec.adapter)
    except ValueError as error:
        return str(error)
    return None


def adapted_layers(modules: Mapping[str, nn.Module], head: nn.Module | None, adapter: AdapterSpec) -> list[str]:
    """The names of the layers that PEFT would adapt, in the order of the model.

    ``modules``: all modules of the model by name; ``head``: its output head. Raises ``ValueError`` when there are none,
    or when one of them is not a plain linear layer or is the head.
    """
    from transformers.pytorch_utils import Conv1D

    targets = adapter.target_modules
    if targets == "all-linear":
        layers = [
            name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D) and module is not head
        ]
    else:
        layers = [name for name in modules if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not layers:
        known = sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})
        raise ValueError(
            f"adapter.target_modules {targets if isinstance(targets, str) else ', '.join(targets)}: "
            f"no such module in the model; its linear layers are {', '.join(known)}"
        )
    for name in layers:
        if type(modules[name]) is not nn.Linear:  # a quantised one, say, multiplies in its own way
            raise ValueError(f"the adapted module {name} is a {type(modules[name]).__name__}, not a plain linear layer")
        if modules[name] is head:
            raise ValueError(f"the adapted module {name} is the output head, which sees only the response tokens")
    return layers
