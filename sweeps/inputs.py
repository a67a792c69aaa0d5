"""What runs start from, models and rows, loaded once by a process that trains several."""

import functools
import platform
from typing import TYPE_CHECKING, cast

from emtrain.corpus import read_corpus
from emtrain.load import Precision
from emtrain.spec import InterleaveSpec, RunSpec
from emtrain.tokens import encode_rows
from emtrain.train import TrainingData

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


def data_of(spec: RunSpec, digests: tuple[str, str | None]) -> TrainingData:
    """What a run learns from and is measured on, as its model's tokens.

    ``digests`` (sha256) are those of the files that it was planned with: the dataset's, and the interleaved one's,
    None where nothing is interleaved. Raises ``ValueError`` when a file is another one here.
    """
    return _data(spec.dataset, spec.interleave, spec.heldout_fraction, spec.model, spec.max_length, digests)


@functools.lru_cache(maxsize=8)
def _data(
    dataset: str,
    interleave: InterleaveSpec | None,
    heldout_fraction: float,
    model: str,
    max_length: int,
    digests: tuple[str, str | None],
) -> TrainingData:
    from emtrain.load import load_tokenizer

    corpus = read_corpus(dataset, heldout_fraction, interleave)
    names = (dataset, interleave.dataset if interleave else None)
    for name, found, expected in zip(names, (corpus.sha256, corpus.interleaved_sha256), digests, strict=True):
        if found != expected:
            raise ValueError(
                f"dataset {name}: the file on {platform.node()} is not the one the sweep was planned with "
                f"(sha256 {str(found)[:12]}, expected {str(expected)[:12]})"
            )
    tokenizer = load_tokenizer(model)
    return TrainingData(
        encode_rows(corpus.train, tokenizer, max_length), encode_rows(corpus.heldout, tokenizer, max_length)
    )
