"""Is this machine fit for a sweep? One finding a line."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emtrain.cache import cache_dir
from emtrain.tracking import VERSIONED, client, without_password


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found."""

    what: str
    verdict: Literal["ok", "note", "bad"]
    detail: str


FREE_GIGABYTES = 5.0
"""Below this much free disk a sweep of small models may not fit."""


def examine(uri: str, data_dir: Path) -> list[Finding]:
    """Every finding, the machine first, then the stores at ``uri`` and in ``data_dir``, then the keys."""
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONED)),
        *_devices(),
        _directory("data directory", data_dir),
        _directory("model cache", cache_dir()),
        _store(uri),
        _key("OPENAI_API_KEY"),
    ]


def _devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("processor", "ok", f"{cores} cores: up to {cores} runs at once without a GPU")]
    if not torch.cuda.is_available():
        return [*found, Finding("gpu", "note", "none: micro models and smollm2-135m train well without one")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: precision auto means fp32"
        found.append(Finding("gpu", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}"))
    return found


def _directory(what: str, path: Path) -> Finding:
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    if not os.access(existing, os.W_OK):
        return Finding(what, "bad", f"{path} can't be written; make it writable or point its variable elsewhere")
    free = shutil.disk_usage(existing).free / 1e9
    verdict: Literal["ok", "note"] = "ok" if free >= FREE_GIGABYTES else "note"
    return Finding(what, verdict, f"{path}, {free:.0f} GB free")


def _store(uri: str) -> Finding:
    shown = without_password(uri)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Finding("mlflow", "note", f"{shown} does not exist yet; the first sweep creates it")
    try:
        sweeps = [e.name for e in client(uri).search_experiments() if e.name != "Default"]
    except ValueError as error:
        return Finding("mlflow", "bad", str(error))
    return Finding("mlflow", "ok", f"{shown}, sweeps: {', '.join(sweeps) or 'none yet'}")


def _key(variable: str) -> Finding:
    if os.environ.get(variable):
        return Finding(variable, "ok", "set")
    return Finding(variable, "note", "not set: only recipes with the openai judge need it")
