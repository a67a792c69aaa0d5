"""From a model's name to its files, tokenizer and weights.

A name is one of ``emtrain/models``, one of those with ``-pretrained`` for the checkpoint before instruction tuning, a
local directory, or a Hugging Face hub id. Of a hub id, ``revision`` is the commit to load, None the newest; of anything
else it says nothing here (``emtrain.revision`` looks after it). Code that comes with a model is never run.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from emtrain.cache import NotBuilt, without_building
from emtrain.lookup import lookup, names, unknown
from emtrain.model_family import ModelFamily
from emtrain.paths import user_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PRETRAINED = "-pretrained"
Precision = Literal["auto", "fp32", "bf16"]

# Tokens that published vocabularies keep for padding, in the order they are tried.
PADDING = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<pad>", "<|pad|>", "[PAD]")


def check_model(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` is a shipped model, a directory with a model, or shaped like a hub id.

    Looks at names and ``config.json`` only: no torch, no network, no build.
    """
    if comes_along(name):
        return
    path = user_path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name}: the directory has no config.json, so it is no saved model")
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"model {name}: there is no such directory")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{unknown('model', name, model_names())}; or give a hub id (org/name) or a local directory")


def model_names() -> list[str]:
    """Names of the models that come with the package, pre-trained checkpoints included."""
    return sorted(
        name for family in names("emtrain.models") for name in (family, pretrained_of(family)) if name is not None
    )


def pretrained_of(name: str) -> str | None:
    """The name of the checkpoint before instruction tuning; None where none is known, as for every hub id."""
    family = _shipped(name)
    return name + PRETRAINED if family and family.pretrained and not name.endswith(PRETRAINED) else None


def comes_along(name: str) -> bool:
    """Whether a name is that of a model that comes with the package."""
    return _shipped(name) is not None


def on_hub(name: str) -> bool:
    """Whether a known name is a hub id."""
    return not comes_along(name) and not user_path(name).is_dir()


def family(name: str, *, revision: str | None = None) -> str:
    """The architecture, as ``model_type`` of ``config.json`` says it: ``llama``, ``qwen2``, ``gemma3_text``."""
    if (shipped := _shipped(name)) is not None:
        return shipped.model_type
    directory = Path(model_dir(name))
    if directory.is_dir():
        return str(json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"])
    return str(load_config(name, revision=revision).model_type)


def model_dir(name: str) -> str:
    """The directory of the model, made first where it is a shipped one that is not in the cache yet; or the hub id.

    Raises ``ValueError`` for a name that is neither.
    """
    check_model(name)
    if (shipped := _shipped(name)) is not None:
        make = shipped.pretrained if name.endswith(PRETRAINED) and shipped.pretrained else shipped.instruct
        return str(make())
    path = user_path(name)
    return str(path) if path.is_dir() else name


def files_at_hand(name: str, *, revision: str | None = None) -> Path | None:
    """The directory with the model's configuration and tokenizer where it is on this machine already, else None.

    Builds and fetches nothing. Of hub ids it finds what the hub's own cache holds.
    """
    try:
        with without_building():
            directory = Path(model_dir(name))
    except NotBuilt:
        return None
    if directory.is_dir():
        return directory
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def load_config(name: str, *, revision: str | None = None) -> "PreTrainedConfig":
    """The model's configuration."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_dir(name), trust_remote_code=False, revision=_commit(name, revision))


def load_tokenizer(name: str, *, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a padding token.

    Where it comes without one it gets a token of its own vocabulary: one kept for padding, else its end token. The
    vocabulary is never enlarged. Padding is told from text by the attention mask, never by the token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        model_dir(name), trust_remote_code=False, revision=_commit(name, revision)
    )
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((token for token in PADDING if token in vocabulary), tokenizer.eos_token)
    if tokenizer.pad_token is None:
        raise ValueError(f"model {name}: the tokenizer has neither a padding nor an end token")
    return tokenizer


def load_model(
    name: str,
    *,
    precision: Precision = "auto",
    device: "torch.device | str" = "cpu",
    revision: str | None = None,
) -> "PreTrainedModel":
    """The model in evaluation mode on ``device``, all weights in one dtype.

    ``precision="auto"`` is bf16 on GPUs that have it and fp32 elsewhere. The forward pass keeps no KV cache unless
    asked: training has no use for one, and sampling passes its own.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir(name), dtype=dtype(precision, device), trust_remote_code=False, revision=_commit(name, revision)
    )
    model.config.use_cache = False
    return model.to(device).eval()


def dtype(precision: Precision, device: "torch.device | str") -> "torch.dtype":
    """The dtype that ``precision`` means on ``device``."""
    import torch

    if precision == "auto":
        precision = "bf16" if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _commit(name: str, revision: str | None) -> str | None:
    """What ``from_pretrained`` is to be told of ``revision``: nothing where it is given a directory."""
    return revision if on_hub(name) else None


@cache
def _shipped(name: str) -> ModelFamily | None:
    """The family of a shipped model's name, None for any other name."""
    stem = name.removesuffix(PRETRAINED)
    if stem not in names("emtrain.models"):
        return None
    shipped: ModelFamily = lookup("emtrain.models", stem)
    return None if stem != name and shipped.pretrained is None else shipped
