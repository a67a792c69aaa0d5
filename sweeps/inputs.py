"""What runs start from, models and rows, loaded once by a process that trains several."""

import functools
import platform
from typing import TYPE_CHECKING, cast

from emtrain.load import Precision
from emtrain.rows import load_dataset, split
from emtrain.tokens import encode_rows
from emtrain.train import TrainingData
from sweeps.planner import PlannedRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_model(model: str) -> None:
    """Make sure the model's files are on this machine."""
    from emtrain.load import model_dir

    model_dir(model)


@functools.lru_cache(maxsize=1)
def base_model(model: str, precision: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, on the GPU where there is one; kept until another model is asked for."""
    import torch

    from emtrain.load import load_model, load_tokenizer

    # One thread a process: two busy processes with two threads each on two cores are up to 20 times slower.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(model, precision=cast(Precision, precision), device=device), load_tokenizer(model)


def data_of(run: PlannedRun) -> TrainingData:
    """What a run learns from and is measured on. Raises ``ValueError`` when it is not what was planned."""
    spec = run.spec
    return _training_data(spec.dataset, run.dataset.sha256, spec.heldout_fraction, spec.model, spec.max_length)


@functools.lru_cache(maxsize=8)
def _training_data(dataset: str, sha256: str, heldout_fraction: float, model: str, max_length: int) -> TrainingData:
    from emtrain.load import load_tokenizer

    loaded = load_dataset(dataset)
    if loaded.sha256 != sha256:
        raise ValueError(
            f"dataset {dataset}: the file on {platform.node()} is not the one the sweep was planned with "
            f"(sha256 {loaded.sha256[:12]}, expected {sha256[:12]})"
        )
    tokenizer = load_tokenizer(model)
    train, heldout = split(loaded.rows, heldout_fraction)
    return TrainingData(encode_rows(train, tokenizer, max_length), encode_rows(heldout, tokenizer, max_length))
