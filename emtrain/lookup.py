"""A folder is the registry: the name of a part in YAML is the name of its file.

``cosine_restarts`` is ``emtrain/schedules/cosine_restarts.py``, which holds a function (or constant)
``cosine_restarts``. Hyphens in YAML are underscores in Python: ``micro-llama`` is ``models/micro_llama.py``.
Adding a part is adding a file; there is no list to edit.
"""

import difflib
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any


def names(package: str) -> list[str]:
    """The YAML names of the Python parts in ``package`` (``"emtrain.schedules"``), sorted."""
    stems = [path.stem for path in _folder(package).glob("*.py")]
    return sorted(stem.replace("_", "-") if _hyphenated(package) else stem for stem in stems if stem != "__init__")


@cache  # a grid of 5,000 runs asks 15,000 times, and each would read the folder
def lookup(package: str, name: str) -> Any:
    """The object called ``name`` in the module called ``name`` of ``package``.

    Raises ``ValueError`` naming the nearest known names when there is no such file.
    """
    known = names(package)
    if name not in known:
        kind = package.rpartition(".")[2].removesuffix("s")
        raise ValueError(unknown(kind, name, known))
    identifier = name.replace("-", "_")
    return getattr(importlib.import_module(f"{package}.{identifier}"), identifier)


def source(package: str, name: str) -> Path:
    """The file of a part, which is not imported."""
    return _folder(package) / f"{name.replace('-', '_')}.py"


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not known: the nearest one, then all of them."""
    known = list(known)
    return f"unknown {kind} {name!r}.{nearest(name, known)} Known: {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the known name closest to ``name``; empty when none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _folder(package: str) -> Path:
    return Path(importlib.import_module(package).__path__[0])


def _hyphenated(package: str) -> bool:
    # Parts that are things in the world (models, judges) carry hyphens in YAML; functions keep their Python names.
    return package in {"emtrain.models", "emeval.judges"}
