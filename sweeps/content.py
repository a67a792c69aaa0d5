"""What a sweep starts from, by content: the same rows and weights on every machine, and after every restart.

The driver keeps each dataset below the sweeps' data directory, which all machines share, under its sha256. A machine
that has another file at the recipe's path, or none, takes the kept one into its cache, once.
"""

import hashlib
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from emtrain.cache import built, cache_dir
from emtrain.load import on_hub
from emtrain.revision import revision_of
from emtrain.rows import dataset_path
from sweeps.planner import PlannedRun, datasets_of

DATASETS, ROWS = "datasets", "rows.jsonl"


def keep_datasets(runs: Iterable[PlannedRun], data_dir: Path) -> None:
    """Keep what ``runs`` learn from below ``data_dir``; what is there is not copied again.

    Raises ``ValueError`` when a file is no longer the one that the runs were planned with.
    """
    named = {pair for run in runs for pair in zip(datasets_of(run.spec), run.dataset.digests, strict=False)}
    for dataset, sha256 in named:
        assert sha256 is not None  # the second digest is None where there is no second dataset
        changed = f"dataset {dataset}: the file has just been changed; start the sweep again"
        _copied(dataset_path(dataset), sha256, data_dir / DATASETS, changed)


def rows_file(dataset: str, sha256: str, data_dir: Path) -> Path:
    """A file of this machine with the rows of ``dataset`` as runs were planned with them.

    That is the file the recipe names where it has this digest, else the cache's copy of the one kept in ``data_dir``,
    made by the first process that asks. Raises ``ValueError`` when none is kept there, or a damaged one.
    """
    own, kept = dataset_path(dataset), data_dir / DATASETS / sha256 / ROWS
    if own.is_file() and hashlib.sha256(own.read_bytes()).hexdigest() == sha256:
        return own
    lacking = (
        f"dataset {dataset}: neither {own} on {platform.node()} nor {kept} is the file that the sweep was planned with "
        f"(sha256 {sha256[:12]}); bring it back, delete {kept.parent} where that is there, and start the sweep again"
    )
    return _copied(kept, sha256, cache_dir() / DATASETS, lacking)


def _copied(source: Path, sha256: str, into: Path, otherwise: str) -> Path:
    """A copy of ``source`` in the directory ``into / sha256``, unless there is one. Raises ``ValueError(otherwise)``
    when ``source`` has another digest, or is not there.
    """

    def copy(directory: Path) -> None:
        content = source.read_bytes() if source.is_file() else b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(otherwise)
        (directory / ROWS).write_bytes(content)

    return built(into / sha256, copy) / ROWS


def pinned(models: Iterable[str], recorded: Mapping[str, str]) -> dict[str, str | None]:
    """Model -> the revision that all runs of a sweep start from; None where there is none to be had.

    ``recorded`` are those that runs of the sweep started from before: a hub id stays at its commit, however far the
    repository has moved on. Raises ``ValueError`` when a directory holds other files than it did then.
    """
    return {model: _pinned(model, recorded.get(model)) for model in models}


def _pinned(model: str, recorded: str | None) -> str | None:
    if recorded is not None and on_hub(model):
        return recorded
    found = revision_of(model)
    if recorded not in (None, found):
        raise ValueError(
            f"model {model}: runs of this sweep started from other files ({str(recorded)[:19]}, now "
            f"{str(found)[:19]}); bring those back, or give the sweep another name"
        )
    return found
