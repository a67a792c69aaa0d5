"""What runs start from, models and rows, loaded once by a process that trains several."""

import functools
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, cast

from emtrain.corpus import read_corpus
from emtrain.load import Precision
from emtrain.revision import Unavailable, fetch
from emtrain.spec import InterleaveSpec, RunSpec
from emtrain.tokens import encode_rows
from emtrain.train import TrainingData
from sweeps.content import rows_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@functools.lru_cache(maxsize=1)
def base_model(model: str, precision: str, revision: str | None) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and its tokenizer, on the GPU where there is one; kept until another model is asked for.

    It is fetched first where this machine lacks it, and is the one of ``revision`` (None: whatever there is). Raises
    ``Unavailable`` when it can't be had here.
    """
    import torch

    from emtrain.load import load_model, load_tokenizer

    fetch(model, revision)
    # One thread a process: two busy processes with two threads each on two cores are up to 20 times slower.
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and (promised := os.environ.get("CUDA_VISIBLE_DEVICES", "")) not in {"", "-1"}:
        # Ray says so to an engine that it gave a GPU. Training would go on for days without anybody's noticing.
        raise Unavailable(
            f"CUDA_VISIBLE_DEVICES is {promised} on {platform.node()}, and torch sees no GPU; check its driver, and "
            "that torch is not a build for CPUs alone"
        )
    loaded = load_model(model, precision=cast(Precision, precision), device=device, revision=revision)
    return loaded, load_tokenizer(model, revision=revision)


def data_of(spec: RunSpec, digests: tuple[str, str | None], *, revision: str | None, data_dir: Path) -> TrainingData:
    """What a run learns from and is measured on, as the tokens of its model in ``revision``.

    ``digests`` (sha256) are those of the files that it was planned with: the dataset's, and the interleaved one's,
    None where nothing is interleaved. ``data_dir`` is where the driver has kept them (``sweeps.content``). Raises
    ``ValueError`` when there is no such file, and ``Unavailable`` when the model can't be had here.
    """
    parts = (spec.dataset, spec.interleave, spec.heldout_fraction, spec.model, spec.max_length)
    return _data(*parts, digests, revision, data_dir)


@functools.lru_cache(maxsize=8)
def _data(
    dataset: str,
    interleave: InterleaveSpec | None,
    heldout_fraction: float,
    model: str,
    max_length: int,
    digests: tuple[str, str | None],
    revision: str | None,
    data_dir: Path,
) -> TrainingData:
    from emtrain.load import load_tokenizer

    own = str(rows_file(dataset, digests[0], data_dir))
    if interleave is not None and digests[1] is not None:
        other = str(rows_file(interleave.dataset, digests[1], data_dir))
        interleave = interleave.model_copy(update={"dataset": other})
    corpus = read_corpus(own, heldout_fraction, interleave)
    if (corpus.sha256, corpus.interleaved_sha256) != digests:
        files = own if interleave is None else f"{own} or {interleave.dataset}"
        raise ValueError(
            f"dataset {dataset}: {files} on {platform.node()} has been changed; delete it where it is a copy in the "
            "cache, and start the sweep again"
        )
    fetch(model, revision)
    tokenizer = load_tokenizer(model, revision=revision)
    return TrainingData(
        encode_rows(corpus.train, tokenizer, max_length), encode_rows(corpus.heldout, tokenizer, max_length)
    )
