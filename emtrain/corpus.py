"""The rows of a run: those it learns from, other datasets' mixed in, and those it is measured on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from emtrain.rows import Row, load_dataset, prompt_digest, rows_digest, split
from emtrain.spec import InterleaveSpec


@dataclass(frozen=True)
class Corpus:
    """The rows of a run."""

    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    """Of the run's own dataset, whatever is interleaved."""
    sha256: str
    """Of the dataset's file."""
    interleaved_sha256: str | None
    """Of the interleaved dataset's file; None where nothing is."""


def read_corpus(dataset: str, heldout_fraction: float, interleave: InterleaveSpec | None) -> Corpus:
    """Read, split and mix. Raises ``ValueError`` when a dataset can't be read, split or mixed in."""
    own = load_dataset(dataset)
    try:
        train, heldout = split(own.rows, heldout_fraction)
    except ValueError as error:
        raise ValueError(f"dataset {dataset}: {error}") from error
    if interleave is None:
        return Corpus(train, heldout, own.sha256, None)
    other = load_dataset(interleave.dataset)
    try:
        mixed = interleaved(train, heldout, other.rows, interleave.fraction)
    except ValueError as error:
        raise ValueError(f"interleave.dataset {interleave.dataset}: {error}") from error
    return Corpus(mixed, heldout, own.sha256, other.sha256)


def interleaved(train: Sequence[Row], heldout: Sequence[Row], other: Sequence[Row], fraction: float) -> tuple[Row, ...]:
    """``train`` and as many rows of ``other`` as make up ``fraction`` of the whole, at least one.

    Rows of ``other`` are taken in the order of their digests, and from the first one again when all are used up, so
    that neither a seed nor the order of the file has a part in the choice. Those that ask a prompt of ``heldout`` are
    left out: whatever they answer, the held-out loss would no longer be of unseen prompts. Own and other rows are
    shuffled together in each epoch (``emtrain.order``).

    Raises ``ValueError`` when no row of ``other`` is left.
    """
    held = {prompt_digest(row) for row in heldout}
    usable = sorted((row for row in other if prompt_digest(row) not in held), key=lambda row: rows_digest([row]))
    if not usable:
        raise ValueError("every one of its rows asks a prompt that is held out")
    added = max(1, round(len(train) * fraction / (1 - fraction)))
    return (*train, *itertools.islice(itertools.cycle(usable), added))
