"""LoRA adapters through PEFT: put one on a model, take it off again, leaving the base as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emtrain.seeds import derive
from emtrain.spec import AdapterSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def lora_config(spec: AdapterSpec) -> "LoraConfig":
    """The PEFT configuration of an adapter."""
    from peft import LoraConfig

    modules = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        lora_dropout=spec.dropout,
        target_modules=modules,
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def adapted(model: "PreTrainedModel", spec: AdapterSpec, *, seed: int) -> Iterator["PeftModel"]:
    """``model`` with a fresh adapter inside the block; afterwards the very same base, fit for the next run.

    The initial weights depend on ``seed`` alone; torch's global generator is left as it was.
    Raises ``ValueError`` when ``target_modules`` names no module of the model.
    """
    import torch
    from peft import get_peft_model

    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "adapter"))
        peft_model = get_peft_model(model, lora_config(spec))
    try:
        yield peft_model
    finally:
        peft_model.unload()
        # PEFT leaves its configuration behind on the base, and warns of it at the next adapter.
        vars(model).pop("peft_config", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[name])
