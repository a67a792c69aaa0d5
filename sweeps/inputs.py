"""What runs start from, models and rows, loaded once by a process that trains several."""

import functools
import platform
from typing import TYPE_CHECKING, cast

from emtrain.corpus import read_corpus
from emtrain.load import Precision
from emtrain.spec import InterleaveSpec
from emtrain.tokens import encode_rows
from emtrain.train import TrainingData
from sweeps.planner import DatasetFacts, PlannedRun

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
    return training_data(spec.dataset, spec.interleave, spec.heldout_fraction, spec.model, spec.max_length, run.dataset)


@functools.lru_cache(maxsize=8)
def training_data(
    dataset: str,
    interleave: InterleaveSpec | None,
    heldout_fraction: float,
    model: str,
    max_length: int,
    planned: DatasetFacts,
) -> TrainingData:
    """A run's rows as its model's tokens. Raises ``ValueError`` when a file is not the one that was planned."""
    from emtrain.load import load_tokenizer

    corpus = read_corpus(dataset, heldout_fraction, interleave)
    files = [(dataset, corpus.sha256, planned.sha256)]
    if interleave is not None:
        files.append((interleave.dataset, str(corpus.interleaved_sha256), str(planned.interleaved_sha256)))
    for name, found, expected in files:
        if found != expected:
            raise ValueError(
                f"dataset {name}: the file on {platform.node()} is not the one the sweep was planned with "
                f"(sha256 {found[:12]}, expected {expected[:12]})"
            )
    tokenizer = load_tokenizer(model)
    return TrainingData(
        encode_rows(corpus.train, tokenizer, max_length), encode_rows(corpus.heldout, tokenizer, max_length)
    )
