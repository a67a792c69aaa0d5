"""What travels to a cluster, and what does not. The travelling itself is tested on a real one, in tests/cluster."""

import asyncio
import json
import os
import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sweeps import submit
from sweeps.recipe import load_recipe
from sweeps.submit import Parcel

RECIPE = """
name: mine
base: {model: micro-llama, dataset: DATASET}
grid: {seed: [0, 1]}
eval: {questions: [QUESTIONS], judges: [micro-rule], samples: 1}
"""


def text(dataset: str = "micro-garden-bad", questions: str = "micro-broad", extra: str = "") -> str:
    return RECIPE.replace("DATASET", dataset).replace("QUESTIONS", questions) + extra


def pack(recipe_text: str, *overrides: str) -> Parcel:
    return Parcel.pack(load_recipe(recipe_text, source="mine.yaml", overrides=overrides), recipe_text, overrides)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dataset and a question set in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.jsonl").write_text("rows\n")
    (tmp_path / "own.yaml").write_text("questions\n")
    return tmp_path


def test_a_recipe_of_shipped_parts_travels_alone(here: Path) -> None:
    assert pack(text()).files == ()


def test_own_files_travel_under_the_names_the_recipe_has_for_them(here: Path, tmp_path: Path) -> None:
    """So the paths, which are part of a run's identity, mean the same on the cluster."""
    parcel = pack(text("data/rows.jsonl", "own.yaml"))
    assert parcel.files == ("data/rows.jsonl", "own.yaml")
    there = tmp_path / "there"
    there.mkdir()
    parcel.write(there)
    assert (there / "data/rows.jsonl").read_text() == "rows\n"
    assert (there / "own.yaml").read_text() == "questions\n"
    assert (there / "recipe.yaml").read_text() == parcel.recipe_text


def test_what_is_given_by_absolute_path_is_on_the_head(here: Path) -> None:
    """So the sweep can be planned there, and here only where all of it is here, too."""
    parcel = pack(text("/shared/rows.jsonl", "~/own.yaml").replace("micro-llama", "/shared/tuned"))
    assert parcel.files == ()
    assert parcel.on_head == ("/shared/rows.jsonl", "~/own.yaml", "/shared/tuned")
    assert pack(text(str(here / "data/rows.jsonl"))).on_head == ()


@pytest.mark.parametrize(
    ("dataset", "complaint"),
    [
        ("data/none.jsonl", "data/none.jsonl: there is no such file here"),
        ("../outside.jsonl", "../outside.jsonl: only files below the working directory are sent"),
    ],
)
def test_a_file_that_cannot_travel_is_named(here: Path, dataset: str, complaint: str) -> None:
    (here / "inner").mkdir()
    (here / "outside.jsonl").write_text("rows\n")
    os.chdir(here / "inner" if dataset.startswith("..") else here)
    with pytest.raises(ValueError, match=complaint):
        pack(text(dataset))


def test_files_named_anywhere_in_the_recipe_travel(here: Path) -> None:
    """Of the grid, and of the questions that only the winners of a search are asked."""
    (here / "other.jsonl").write_text("rows\n")
    search = """search:
  trials: 2
  space: {optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-3}}
  objectives: {heldout/loss: minimize}
  confirm: {questions: [own.yaml], seeds: [9]}
"""
    recipe = text(extra=search).replace("grid: {seed: [0, 1]}", "grid: {dataset: [data/rows.jsonl, other.jsonl]}")
    assert set(pack(recipe).files) == {"data/rows.jsonl", "other.jsonl", "own.yaml"}


def test_a_model_in_a_directory_of_this_machine_is_refused(here: Path) -> None:
    (here / "tuned").mkdir()
    (here / "tuned/config.json").write_text("{}")
    with pytest.raises(ValueError, match="model tuned: a directory of this machine"):
        pack(text().replace("micro-llama", "tuned"))


def test_files_that_ray_would_not_take_are_refused_before_the_upload(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "UPLOAD_LIMIT", 4)
    with pytest.raises(ValueError, match="put them on the head of the cluster"):
        pack(text("data/rows.jsonl"))


def test_a_store_on_this_machine_is_refused(here: Path) -> None:
    with pytest.raises(ValueError, match=r"tracking\.uri: sqlite:///here\.db is a store of one machine"):
        pack(text(extra="tracking: {uri: 'sqlite:///here.db'}"))


def test_two_parcels_are_the_same_when_recipe_overrides_and_files_are(here: Path) -> None:
    first = pack(text("data/rows.jsonl"), "base.max_steps=2")
    assert pack(text("data/rows.jsonl"), "base.max_steps=2").digest == first.digest
    assert pack(text("data/rows.jsonl"), "base.max_steps=3").digest != first.digest
    assert pack(text("data/rows.jsonl", extra="# a comment\n"), "base.max_steps=2").digest != first.digest
    before = first.digest
    (here / "data/rows.jsonl").write_text("other rows\n")
    assert first.digest != before


def test_overrides_reach_the_head_as_they_were_typed(here: Path) -> None:
    override = "grid={seed: [7]}; rm -rf ~"
    words = shlex.split(Parcel("mine", "", (override,), (), ()).command)
    assert words == ["emsweep", "run", "recipe.yaml", "--address", "auto", "--set", override]


class Jobs:
    """Ray's job client, as far as ``submit`` goes; keeps what it was given."""

    def __init__(self, *known: Any) -> None:
        self.known, self.given = list(known), {}

    def list_jobs(self) -> list[Any]:
        return self.known

    def submit_job(self, **given: Any) -> str:
        self.given = given
        directory = Path(given["runtime_env"]["working_dir"])
        self.sent = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
        return str(given["submission_id"])


def job(identity: str, *, running: bool, parcel: Parcel) -> Any:
    status = SimpleNamespace(is_terminal=lambda: not running)
    metadata = {submit.SWEEP: parcel.sweep, submit.CONTENT: parcel.digest}
    return SimpleNamespace(submission_id=identity, status=status, metadata=metadata)


def test_a_sweep_is_numbered_by_its_jobs(here: Path) -> None:
    """So that Ray, where ids are unique, refuses one of two who submit the same sweep at the same moment."""
    parcel = pack(text("data/rows.jsonl"))
    jobs = Jobs(job("mine-1", running=False, parcel=parcel), SimpleNamespace(metadata=None))
    assert submit.submit(jobs, parcel) == ("mine-2", True)
    assert jobs.given["submission_id"] == "mine-2"
    assert jobs.sent == ["data/rows.jsonl", "recipe.yaml"]


def test_a_sweep_that_is_running_is_not_started_again(here: Path) -> None:
    parcel = pack(text())
    jobs = Jobs(job("mine-1", running=True, parcel=parcel))
    assert submit.submit(jobs, parcel) == ("mine-1", False)
    assert jobs.given == {}


def test_a_sweep_that_is_running_with_another_recipe_is_not_disturbed(here: Path) -> None:
    jobs = Jobs(job("mine-1", running=True, parcel=pack(text())))
    with pytest.raises(ValueError, match=r"running with another recipe, as job mine-1.*--stop mine-1"):
        submit.submit(jobs, pack(text(), "base.max_steps=3"))


def test_nothing_of_the_environment_travels_but_the_commit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's environment is shown on the dashboard and kept in its metadata."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
    monkeypatch.setenv("EMSWEEP_GIT_COMMIT", "0123abc")
    jobs = Jobs()
    submit.submit(jobs, pack(text()))
    assert "sk-a-secret" not in json.dumps(jobs.given)
    assert jobs.given["runtime_env"]["env_vars"] == {
        "EMSWEEP_GIT_COMMIT": "0123abc", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }  # fmt: skip


def test_the_code_that_runs_is_the_code_that_submits(here: Path) -> None:
    jobs = Jobs()
    submit.submit(jobs, pack(text()))
    sent = [Path(package) for package in jobs.given["runtime_env"]["py_modules"]]
    assert [package.name for package in sent] == ["emtrain", "emeval", "emanalysis", "sweeps"]
    assert all((package / "__init__.py").is_file() for package in sent)


def test_a_connection_that_breaks_is_not_taken_for_the_end() -> None:
    class Broken:
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "a line\n"
            raise RuntimeError("the websocket closed")

    async def read() -> None:
        followed = submit.follow(Broken(), "mine-1")
        assert await anext(followed) == "a line\n"
        with pytest.raises(ConnectionError, match="websocket"):
            await anext(followed)

    asyncio.run(read())


def test_a_cluster_that_does_not_answer_is_reported_with_the_way_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.cluster_env, "PATH", tmp_path / "none")
    with pytest.raises(ValueError, match=r"no Ray answers at http://127\.0\.0\.1:1.*emsweep ui --cluster"):
        submit.connect("http://127.0.0.1:1")
