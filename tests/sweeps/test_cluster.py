"""What a sweep learns of a cluster before it starts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.exceptions import RayError, RayTaskError

from sweeps import cluster
from sweeps.cluster import Capacity

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``ray up`` would leave the autoscaler's file; nothing is there yet."""
    path = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(cluster, "AUTOSCALING_CONFIG", path)
    monkeypatch.delenv("EMSWEEP_CAPACITY", raising=False)
    return path


def raised(path: Path, file: str) -> None:
    from ray.autoscaler._private.util import prepare_config

    path.write_text(yaml.safe_dump(prepare_config(yaml.safe_load((ROOT / file).read_text()))))


def test_gpus_are_what_counts_where_there_are_some() -> None:
    """A GPU trains one engine's runs however many processors stand beside it."""
    machines = Capacity.of({"GPU": 2, "CPU": 16, "memory": 1e9})
    assert (machines.engines, machines.gpus_per_engine) == (2, 1)


def test_every_processor_counts_where_there_is_no_gpu() -> None:
    machines = Capacity.of({"CPU": 4})
    assert (machines.engines, machines.gpus_per_engine) == (4, 0)


@pytest.mark.parametrize("file", ["cluster.yaml", "sweeps/clusters/gcp.yaml"])
def test_a_cloud_cluster_without_a_worker_yet_has_gpus(on_head: Path, file: str) -> None:
    """Else runs would ask for processors only, and train beside the GPUs that come. 8 workers with 8 and 1 each."""
    raised(on_head, file)
    assert cluster.capacity() == Capacity(gpus=8, cpus=64)


def test_the_limit_of_the_whole_cluster_counts_for_each_kind_of_worker(on_head: Path) -> None:
    raised(on_head, "cluster.yaml")
    config = yaml.safe_load(on_head.read_text())
    on_head.write_text(yaml.safe_dump({**config, "max_workers": 3}))
    assert cluster.capacity() == Capacity(gpus=3, cpus=24)


def test_what_the_environment_states_counts_before_the_file(on_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised(on_head, "cluster.yaml")
    monkeypatch.setenv("EMSWEEP_CAPACITY", '{"GPU": 2}')
    assert cluster.capacity() == Capacity(gpus=2, cpus=0)


class Machines:
    """Ray, to which a machine is added each time it is asked; ``total`` of them are being set up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        self.there, self.total, self.now = 0, total, 0.0
        monkeypatch.setattr(cluster.ray, "cluster_resources", self.resources)
        monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", self.status)
        monkeypatch.setattr(cluster.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(cluster.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def resources(self) -> dict[str, float]:
        return {"CPU": 2.0 * self.there} if self.there else {"node:head": 1.0}

    def status(self, key: str) -> bytes:
        pending: list[Any] = ["a machine"] * (self.total - self.there)
        self.there = min(self.there + 1, self.total)
        return json.dumps({"autoscaler_report": {"pending_nodes": pending}}).encode()


def test_machines_that_are_being_set_up_are_waited_for(on_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a sweep is submitted right after ``ray up``: the first worker is there, two are on their way."""
    raised(on_head, "sweeps/clusters/onprem.yaml")
    machines = Machines(monkeypatch, total=3)
    machines.there = 1
    assert cluster.capacity() == Capacity(gpus=0, cpus=6)


def test_a_machine_that_never_comes_up_is_not_waited_for_for_ever(
    on_head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(monkeypatch, total=3)
    machines.there = 2
    monkeypatch.setattr(cluster, "_joining", lambda: True)
    assert cluster.capacity() == Capacity(gpus=0, cpus=4)
    assert cluster.JOINING_SECONDS < machines.now < cluster.JOINING_SECONDS + 2


def test_a_cluster_without_workers_is_the_users_to_look_at(on_head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, total=0)
    with pytest.raises(ValueError, match="no worker joined the cluster in 15 minutes"):
        cluster.capacity()
    assert machines.now > cluster.FIRST_WORKER_SECONDS


def node(name: str, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(("gpus", "expected"), [(0, ["cpu worker", "gpu worker"]), (8, ["gpu worker"])])
def test_models_are_fetched_where_engines_may_be(
    gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on the head, which trains nothing, nor beside GPUs on a machine without one."""
    nodes = [
        node("head", memory=1e9), node("cpu worker", CPU=2), node("gpu worker", CPU=8, GPU=1),
        node("lost", CPU=8, GPU=1, alive=False),
    ]  # fmt: skip
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)
    assert cluster.trainers(Capacity(gpus=gpus, cpus=18)) == expected


class Tasks:
    """Ray, as far as a task's call goes; of a lost node the call never ends well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcomes: dict[str | None, Exception | None]) -> None:
        self.outcomes, self.called = outcomes, []
        monkeypatch.setattr(cluster.ray, "remote", lambda **resources: lambda function: self)
        monkeypatch.setattr(cluster.ray, "get", self.get)

    called: list[tuple[str | None, str, str | None]]

    def options(self, scheduling_strategy: Any = None) -> Any:
        place = scheduling_strategy.node_id if scheduling_strategy else None
        return SimpleNamespace(remote=lambda model, revision: self.called.append((place, model, revision)) or place)

    def get(self, place: str | None) -> None:
        if (outcome := self.outcomes[place]) is not None:
            raise outcome


def test_every_node_fetches_each_model_once_and_a_lost_node_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = "1" * 56, "2" * 56
    tasks = Tasks(monkeypatch, {one: None, other: RayError("the node is gone")})
    cluster.fetch_models({"org/a": "a commit", "micro-llama": None}, [one, other])
    assert sorted(tasks.called, key=str) == sorted(
        [(one, "org/a", "a commit"), (other, "org/a", "a commit"), (one, "micro-llama", None),
         (other, "micro-llama", None)], key=str,
    )  # fmt: skip


def test_before_there_is_a_node_a_model_makes_the_cloud_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = Tasks(monkeypatch, {None: None})
    cluster.fetch_models({"org/a": "a commit"}, [])
    assert tasks.called == [(None, "org/a", "a commit")]


@pytest.mark.parametrize("reason", ["model org/a: worker1 can't fetch it (401)", "worker1 can't fetch it (401)\nmore"])
def test_a_model_that_cannot_be_had_is_told_once_with_its_name(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Tasks(monkeypatch, {None: RayTaskError("fetch", "a traceback", ValueError(reason))})
    with pytest.raises(ValueError, match=r"^model org/a: worker1 can't fetch it \(401\)$"):
        cluster.fetch_models({"org/a": None}, [])
