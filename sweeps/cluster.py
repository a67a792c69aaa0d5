"""A Ray cluster that a sweep did not start: whether somebody is there, with what, on which disk; bringing models."""

import json
import os
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from emtrain.mistakes import gist
from emtrain.revision import fetch

AUTOSCALING_CONFIG = Path.home() / "ray_bootstrap_config.yaml"
FIRST_WORKER_SECONDS = 900.0
"""How long to wait for one: a cloud takes minutes to start it and to install what it needs."""
JOINING_SECONDS = 120.0
"""How long to wait for machines that are being set up while others are ready: 40 s on an idle network of three."""


@dataclass(frozen=True)
class Capacity:
    """How runs fit on the machines."""

    gpus: int
    cpus: int

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> "Capacity":
        """For ``resources`` as Ray counts them."""
        return cls(int(resources.get("GPU", 0)), int(resources.get("CPU", 0)))

    @property
    def engines(self) -> int:
        """Processes that may train at once: one per GPU, or one per processor where there is none."""
        return self.gpus or self.cpus

    @property
    def gpus_per_engine(self) -> int:
        """1 where there are GPUs, else 0."""
        return min(self.gpus, 1)


def capacity() -> Capacity:
    """What the cluster holds once all nodes are there that it may start. Waits until that is known.

    Raises ``ValueError`` when no node joins that could train anything.
    """
    if (promised := _promised()).engines:
        return promised
    begin, first = time.monotonic(), None
    while True:
        there, now = Capacity.of(ray.cluster_resources()), time.monotonic()
        if there.engines:
            first = now if first is None else first
            if not _joining() or now - first > JOINING_SECONDS:
                return there
        elif now - begin > FIRST_WORKER_SECONDS:
            raise ValueError(
                f"no worker joined the cluster in {FIRST_WORKER_SECONDS / 60:.0f} minutes; "
                "`ray monitor CLUSTER.yaml` says why"
            )
        time.sleep(1)


def _promised() -> Capacity:
    """What an autoscaler may start; nothing where there is none, or all machines are there from the beginning.

    Ray does not tell. ``EMSWEEP_CAPACITY`` (JSON, as in ``{"GPU": 8}``) says it, else the file that ``ray up`` left on
    the head for the autoscaler.
    """
    if stated := os.environ.get("EMSWEEP_CAPACITY"):
        return Capacity.of(json.loads(stated))
    if not AUTOSCALING_CONFIG.is_file():
        return Capacity(0, 0)
    config = yaml.safe_load(AUTOSCALING_CONFIG.read_text(encoding="utf-8"))
    total: Counter[str] = Counter()
    for name, kind in config["available_node_types"].items():
        if name != config["head_node_type"]:
            machines = min(kind.get("max_workers", 0), config["max_workers"])
            total.update({resource: machines * amount for resource, amount in kind["resources"].items()})
    return Capacity.of(total)


def _joining() -> bool:
    """Whether ``ray up`` is still setting up machines of a cluster of fixed size."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return bool(status.get("autoscaler_report", {}).get("pending_nodes"))


def check_address(address: str) -> None:
    """Raise ``ValueError`` when nobody listens at ``address`` (``HOST:PORT``, ``ray://HOST:PORT``).

    Ray itself would try for a minute or more, and write into the terminal meanwhile.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto": Ray looks for one on this machine, and says so when there is none
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--address {address}: nobody answers there ({error}). Is it what `ray start` printed, "
            "and does it let this machine in? To send a sweep to a cluster from outside, use `emsweep submit`"
        ) from error


def check_shared(data_dir: Path) -> None:
    """Raise ``ValueError`` naming the nodes on which ``data_dir`` is not the same directory, or is read-only.

    What is shared is the state of runs in work: without it a run that loses its worker starts over on another.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    look = ray.remote(num_cpus=0)(_shares)
    with tempfile.NamedTemporaryFile(dir=data_dir, prefix=".seen-by-all-nodes-") as marker:
        answers = [
            (node["NodeManagerAddress"], look.options(scheduling_strategy=_on(node["NodeID"])).remote(marker.name))
            for node in ray.nodes()
            if node["Alive"]
        ]
        blind = [address for address, answer in answers if not _seen(answer)]
    if blind:
        raise ValueError(
            f"EMSWEEP_DATA: {data_dir} is not the same directory on {', '.join(blind)}, or nobody may write there. "
            "Mount storage that all nodes share at one path, and set EMSWEEP_DATA to it on every node before Ray "
            "starts there"
        )


def trainers(capacity: Capacity) -> list[str]:
    """Ids of the nodes that are there and may hold an engine."""
    needed = {"CPU": 1, "GPU": capacity.gpus_per_engine}
    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(what, 0) >= count for what, count in needed.items())
    ]


def fetch_models(revisions: Mapping[str, str | None], nodes: Sequence[str]) -> None:
    """Have the models (name -> revision) on each of these nodes, or on any one, side by side.

    Nodes that join later have them when their first engine asks. Raises ``ValueError`` when one can't be had.
    """
    places = [{"scheduling_strategy": _on(node)} for node in nodes] or [{}]
    get = ray.remote(num_cpus=1)(fetch)
    calls = [
        (model, get.options(**place).remote(model, revision))
        for model, revision in revisions.items()
        for place in places
    ]
    for model, call in calls:
        try:
            ray.get(call)
        except RayTaskError as error:
            reason = gist(error.cause)
            raise ValueError(f"model {model}: {reason.removeprefix(f'model {model}: ')}") from error
        except RayError:
            continue  # the node left meanwhile, and whoever takes its place asks for itself


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _shares(path: str) -> bool:
    """Whether the file is there, and another can be written beside it."""
    try:
        with tempfile.NamedTemporaryFile(dir=Path(path).parent):
            return Path(path).exists()
    except OSError:
        return False


def _seen(answer: "ray.ObjectRef[bool]") -> bool:
    try:
        return bool(ray.get(answer))
    except RayError:  # the node left meanwhile, and whoever takes its place is asked before it joins
        return True
