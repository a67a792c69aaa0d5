"""Which weights the name of a model stands for, so that all machines of a sweep start from the same ones.

A hub id and a directory say where weights are, not which: repositories move on, directories are written anew. A
*revision* does: of a hub id the commit, of a directory the digest of its files (``sha256:...``). Models that come with
the package have none; their directories in the cache are named after what they are made of.
"""

import hashlib
import logging
import platform
from pathlib import Path

from emtrain.cache import built, cache_dir
from emtrain.load import comes_along, model_dir, on_hub

log = logging.getLogger(__name__)

SHA256 = "sha256:"
READ = frozenset({".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"})
"""Endings of the files that a model and its tokenizer are loaded from."""
FETCHED = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What of a repository is fetched ahead. Some hold the same weights twice, under names that are not loaded
(``consolidated.safetensors``, ``original/``); a rarer file is fetched when it is asked for."""


class Unavailable(ValueError):
    """A model can't be had on this machine, which another machine may well have."""


def revision_of(name: str) -> str | None:
    """The revision that ``name`` stands for now.

    Of a hub id it is the commit that the hub names, else, where the hub can't be asked, the newest of this machine's
    cache. None for a shipped model, and for a hub id where neither is to be had.
    """
    if comes_along(name):
        return None
    return _commit(name) if on_hub(name) else digest(Path(name).expanduser())


def fetch(name: str, revision: str | None) -> None:
    """Make sure that the model is on this machine, and is the one of ``revision``; None is whatever there is.

    It is made, or fetched into the hub's own cache, by the first process that asks; others wait. Raises ``Unavailable``
    when it can't be, and when a directory is not there or holds other files.
    """
    if revision is not None and revision.startswith(SHA256):
        directory = Path(name).expanduser()
        found = digest(directory) if directory.is_dir() else "no directory"
        if found != revision:
            raise Unavailable(
                f"model {name}: not the same on {platform.node()} (found {found[:19]}, expected {revision[:19]}); make "
                "the directory the same on all machines, or put it on storage they share"
            )
    elif on_hub(name):
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(name, revision=revision, allow_patterns=list(FETCHED))
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            raise Unavailable(f"model {name}: {platform.node()} can't fetch it ({reason})") from error
    else:
        model_dir(name)


def digest(directory: Path) -> str:
    """``sha256:`` and the digest of a model's files, config and tokenizer included.

    It is that of the lines ``sha256sum`` prints of them, in the order of their names. Reading a large model takes half
    a minute, so it is kept in the cache until a file's size, time or place changes.
    """
    files = sorted(path for path in directory.iterdir() if path.suffix in READ and path.is_file())
    states = [(str(path.absolute()), (s := path.stat()).st_ino, s.st_mtime_ns, s.st_size) for path in files]

    def compute(place: Path) -> None:
        whole = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                whole.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
        (place / "sha256").write_text(whole.hexdigest())

    key = hashlib.sha256(repr(states).encode()).hexdigest()
    return SHA256 + (built(cache_dir() / "digests" / key, compute) / "sha256").read_text()


def _commit(name: str) -> str | None:
    from huggingface_hub import resolve_revision

    for local_files_only in (False, True):  # the cache counts also where the hub answers, but knows us not
        try:
            return resolve_revision(name, local_files_only=local_files_only).resolved
        except Exception as error:  # its HTTP client's own among them
            log.info("model %s: %s", name, error)
    return None
