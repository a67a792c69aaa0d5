"""The same weights on every machine: a commit of the hub, and a digest of a directory's files."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emtrain.load import load_config, load_model, load_tokenizer
from emtrain.revision import Unavailable, digest, fetch, revision_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NAME, FIRST, SECOND = "org/model", "1" * 40, "2" * 40


@dataclass
class Hub:
    """A hub with one repository, as far as fetching goes. Each commit holds three files that name it."""

    commit: str = FIRST
    sent: Counter[str] = field(default_factory=Counter)
    """Path -> how often its content was asked for."""

    @staticmethod
    def files(commit: str) -> dict[str, bytes]:
        return {
            "config.json": json.dumps({"commit": commit}).encode(),
            "model.safetensors": f"weights of {commit}".encode(),
            "consolidated.safetensors": f"again the weights of {commit}".encode(),
        }

    def answer(self, path: str) -> tuple[dict[str, str], bytes] | None:
        """Headers and body; None is 404."""
        match path.strip("/").split("/"):
            case ["api", "models", "org", "model", *rest] if rest in ([], ["revision", "main"]):
                return {}, json.dumps({"id": NAME, "sha": self.commit}).encode()
            case ["api", "models", "org", "model", "tree", commit]:
                files = self.files(commit).items()
                listed = [
                    {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files
                ]
                return {}, json.dumps(listed).encode()
            case ["org", "model", "resolve", commit, file] if file in self.files(commit):
                content = self.files(commit)[file]
                return {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content
        return None


@pytest.fixture
def hub() -> Iterator[tuple[Hub, str]]:
    """The hub and its address."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            found = hub.answer(path)
            headers, body = found or ({"X-Error-Code": "RepoNotFound"}, b"")
            self.send_response(200 if found else 404)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                hub.sent[path] += 1
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def on_node(home: Path, hub: str | None, expression: str, processes: int = 1) -> list[str]:
    """What each of so many processes of a machine with this home prints, which all start at once; ``hub`` None: it has
    no network.
    """
    reaches = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub}
    environment = {**os.environ, "HF_HOME": str(home), "EMSWEEP_CACHE": str(home / "emsweep"), **reaches}
    program = f"from emtrain.revision import fetch, revision_of; print({expression})"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    return [(stdout.strip() or stderr.strip().splitlines()[-1]) for stdout, stderr in ended]


def snapshot(home: Path, commit: str) -> dict[str, bytes]:
    folder = home / "hub/models--org--model/snapshots" / commit
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_machine_has_the_commit_that_the_first_saw_and_fetches_it_once(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """The repository moves on after the sweep began; two engines of each of two machines ask at once."""
    repository, address = hub
    assert on_node(tmp_path / "head", address, f"revision_of({NAME!r})") == [FIRST]
    repository.commit = SECOND
    for node in ("one", "two"):
        assert on_node(tmp_path / node, address, f"fetch({NAME!r}, {FIRST!r})", processes=2) == ["None"] * 2
        loaded = {name: Hub.files(FIRST)[name] for name in ("config.json", "model.safetensors")}
        assert snapshot(tmp_path / node, FIRST) == loaded  # and not the same weights under another name
    weights = {path: times for path, times in repository.sent.items() if path.endswith(".safetensors")}
    assert weights == {f"/{NAME}/resolve/{FIRST}/model.safetensors": 2}
    assert on_node(tmp_path / "head", address, f"revision_of({NAME!r})") == [SECOND]


def test_without_the_hub_the_cache_tells_the_commit_and_without_both_nobody_does(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    _, address = hub
    assert on_node(tmp_path, None, f"revision_of({NAME!r})") == ["None"]
    on_node(tmp_path, address, f"fetch({NAME!r}, None)")
    assert on_node(tmp_path, None, f"revision_of({NAME!r})") == [FIRST]
    assert on_node(tmp_path, None, f"fetch({NAME!r}, {FIRST!r})") == ["None"]


@pytest.mark.parametrize("name", ["org/model", "org/other"])
def test_what_cannot_be_fetched_is_told_with_the_model_and_the_machine(
    name: str, hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """Without a network, and by a hub that has no such repository."""
    address = hub[1] if name == "org/other" else None
    (said,) = on_node(tmp_path, address, f"fetch({name!r}, {FIRST!r})")
    assert said.startswith(f"emtrain.revision.Unavailable: model {name}: {os.uname().nodename} can't fetch it (")


@pytest.fixture
def saved(make_model: "Callable[[], PreTrainedModel]", words: "PreTrainedTokenizerFast", tmp_path: Path) -> Path:
    """A small llama and its tokenizer, as Hugging Face saves them."""
    make_model().save_pretrained(tmp_path / "saved")
    words.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_pinned_commit_is_what_is_loaded_though_a_newer_one_is_there(
    saved: Path, make_model: "Callable[[], PreTrainedModel]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configuration, tokenizer and weights; the hub does not answer, as on a machine without a network."""
    import torch

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / FIRST)
    newer = make_model()
    newer.config.attention_dropout = 0.5
    with torch.no_grad():
        newer.lm_head.weight.zero_()
    newer.save_pretrained(repository / "snapshots" / SECOND)
    for path in (repository / "snapshots" / FIRST).glob("token*"):
        (repository / "snapshots" / SECOND / path.name).write_text(path.read_text().replace("<|eot_id|>", "<|new|>"))
    (repository / "refs" / "main").write_text(SECOND)

    def loaded(revision: str | None) -> tuple[bool, bool]:
        head = load_model(NAME, revision=revision).lm_head.weight
        return bool(head.any()), "<|eot_id|>" in load_tokenizer(NAME, revision=revision).get_vocab()

    assert revision_of(NAME) == SECOND
    assert loaded(FIRST) == (True, True)
    assert loaded(SECOND) == loaded(None) == (False, False)
    assert [load_config(NAME, revision=commit).attention_dropout for commit in (FIRST, SECOND)] == [0, 0.5]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "tuned"
    directory.mkdir()
    for name, text in {"config.json": "{}", "model.safetensors": "weights", "optimizer.pt": "state"}.items():
        (directory / name).write_text(text)
    return directory


def test_the_revision_of_a_directory_is_the_digest_that_sha256sum_gives(directory: Path) -> None:
    command = f"cd {directory} && LC_ALL=C sha256sum config.json model.safetensors | sha256sum"
    printed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert revision_of(str(directory)) == "sha256:" + printed.split()[0]


def test_what_is_not_loaded_has_no_part_in_the_digest_and_what_is_loaded_has(directory: Path) -> None:
    before = digest(directory)
    (directory / "optimizer.pt").write_text("another state")
    assert digest(directory) == before
    (directory / "tokenizer.json").write_text("{}")
    assert digest(directory) != before


def test_a_directory_is_read_once_and_again_when_a_file_is_newer(directory: Path) -> None:
    """The times a file of the same size was written at tell the two apart, as they do for make and rsync."""
    before, weights = digest(directory), directory / "model.safetensors"
    written = weights.stat().st_mtime_ns
    weights.write_text("WEIGHTS")
    os.utime(weights, ns=(written, written))
    assert digest(directory) == before
    os.utime(weights, ns=(written, written + 1))
    assert digest(directory) != before


def test_a_machine_with_other_files_in_the_directory_or_none_is_named(directory: Path, tmp_path: Path) -> None:
    revision = revision_of(str(directory))
    fetch(str(directory), revision)
    (directory / "model.safetensors").write_text("other weights")
    with pytest.raises(Unavailable, match=rf"model .*tuned: not the same on {os.uname().nodename} \(found sha256:"):
        fetch(str(directory), revision)
    with pytest.raises(
        Unavailable, match=r"model .*nowhere: not the same on .* \(found no directory, expected sha256:"
    ):
        fetch(str(tmp_path / "nowhere"), revision)


def test_a_shipped_model_has_no_revision_even_beside_a_directory_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "notes.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert revision_of("smollm2-135m") is None
    assert revision_of("micro-llama-pretrained") is None
