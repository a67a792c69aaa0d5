"""The shipped cluster files, checked without a cloud: by Ray's own code, by AWS's own description of its API, and by
running the scripts they call in a home of their own."""

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "sweeps/clusters"
RAY_UP = {"aws": ROOT / "cluster.yaml", "gcp": CLUSTERS / "gcp.yaml", "local": CLUSTERS / "onprem.yaml"}
CLOUDS = {kind: path for kind, path in RAY_UP.items() if kind != "local"}
EVERY_FILE = pytest.mark.parametrize("path", RAY_UP.values(), ids=RAY_UP)
EVERY_CLOUD = pytest.mark.parametrize("path", CLOUDS.values(), ids=CLOUDS)


def load(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, listed in config.items() if key.endswith("_commands") for command in listed]


@EVERY_FILE
def test_ray_accepts_the_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(path)))


def test_ray_would_refuse_a_misspelt_key() -> None:
    """So the test above can fail."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config({**load(RAY_UP["aws"]), "idle_timeout": 10}))


def test_aws_knows_every_key_of_its_machines() -> None:
    """Ray passes ``node_config`` on unread; botocore's description of ``RunInstances`` says what may be in it."""
    botocore_session = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    shape = botocore_session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in load(RAY_UP["aws"])["available_node_types"].values():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


def test_google_cloud_knows_every_key_of_its_machines() -> None:
    """As with AWS, by the description of the API that Google's client brings along."""
    client = pytest.importorskip("googleapiclient", reason="needs emsweep[gcp]")
    documents = Path(client.__file__).parent / "discovery_cache/documents"
    schemas = json.loads((documents / "compute.v1.json").read_text())["schemas"]

    def unknown(value: Any, schema: dict[str, Any], path: str) -> list[str]:
        schema = schemas[schema["$ref"]] if "$ref" in schema else schema
        if isinstance(value, list):
            return [wrong for item in value for wrong in unknown(item, schema["items"], path)]
        if not isinstance(value, dict):
            return [] if value in schema.get("enum", [value]) else [f"{path}: {value}"]
        keys = schema["properties"]
        wrong = [f"{path}.{key}" for key in value if key not in keys]
        return wrong + [w for key in value if key in keys for w in unknown(value[key], keys[key], f"{path}.{key}")]

    for name, kind in load(RAY_UP["gcp"])["available_node_types"].items():
        assert unknown(kind["node_config"], {"$ref": "Instance"}, name) == []


def test_workers_in_the_cloud_are_spot_machines_and_the_head_is_not() -> None:
    aws, gcp = (load(RAY_UP[kind])["available_node_types"] for kind in ("aws", "gcp"))
    assert aws["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["worker"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


@EVERY_CLOUD
def test_workers_come_and_go_with_the_work(path: Path) -> None:
    config = load(path)
    worker = config["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (0, config["max_workers"])
    assert worker["resources"]["GPU"] == 1


@EVERY_FILE
def test_everything_a_node_is_told_to_run_is_sent_to_it(path: Path) -> None:
    """And every path that is sent exists in a checkout, and what the package is built from is among them."""
    config = load(path)
    sent = {there: here for there, here in config["file_mounts"].items() if there.startswith("~/emsweep/")}
    for command in commands(config):
        for script in re.findall(r"~/emsweep/(\S+\.sh)", command):
            assert f"~/emsweep/{Path(script).parts[0]}" in sent
            assert (ROOT / script).is_file(), script
    assert all((ROOT / here).exists() for here in sent.values())
    assert all(there == f"~/emsweep/{Path(here).name}" for there, here in sent.items())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    build = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *packages]
    assert {f"~/emsweep/{name}" for name in [*build, "Makefile", "constraints.txt"]} == set(sent)


@EVERY_FILE
def test_the_head_trains_nothing_and_shows_its_dashboard_to_nobody(path: Path) -> None:
    (start,) = [command for command in load(path)["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start


@EVERY_FILE
def test_no_worker_starts_ray_before_its_storage_was_looked_at(path: Path) -> None:
    (start,) = [command for command in load(path)["worker_start_ray_commands"] if "ray start" in command]
    assert re.search(r"worker\.sh && (NODE_ADDRESS=\S+ \S+ && )?ray start", start)


def test_all_ssh_machines_become_workers(tmp_path: Path) -> None:
    """``ray up`` tells the head to use Ray's second autoscaler, which would count the head as one of the two."""
    from ray.autoscaler._private.util import prepare_config, with_envs

    config = prepare_config(load(RAY_UP["local"]))
    (machines,) = config["available_node_types"].values()
    assert machines["min_workers"] == machines["max_workers"] == 2
    home = home_with(tmp_path, ray='echo "second autoscaler: $RAY_enable_autoscaler_v2, at $3"')
    (home / "emsweep/sweeps/clusters/head.sh").write_text("")
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps(config))  # as `ray up` writes it
    start = with_envs(config["head_start_ray_commands"], {"RAY_enable_autoscaler_v2": "1"})[-1]
    assert shell(start, home).stdout.strip() == "second autoscaler: 0, at --node-ip-address=192.168.1.10"


def home_with(directory: Path, **programs: str) -> Path:
    """A home directory as ``ray up`` fills it, and programs that stand in for real ones."""
    from sweeps.cluster_env import create

    home = directory / "home"
    (home / "emsweep/sweeps/clusters").mkdir(parents=True)
    (home / "emsweep/.venv/bin").mkdir(parents=True)
    for script in CLUSTERS.glob("*.sh"):
        (home / "emsweep/sweeps/clusters" / script.name).write_bytes(script.read_bytes())
    (home / "bin").mkdir()
    for name, body in {"make": "true", **programs}.items():
        (home / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (home / "bin" / name).chmod(0o755)
    create(home / ".emsweep/cluster.env")
    return home


def shell(command: str, home: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"HOME": str(home), "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", f"[ ! -f ~/.bashrc ] || source ~/.bashrc; {command}"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


def test_setting_up_twice_leaves_one_environment_the_last(tmp_path: Path) -> None:
    home = home_with(tmp_path)
    (home / ".bashrc").write_text("if true; then\nmy_own() { echo my own line; }\nfi")  # no end of the last line
    for data in ("/first", "/second place"):
        done = shell(f"bash ~/emsweep/sweeps/clusters/setup.sh '{data}'", home)
        assert done.returncode == 0, done.stderr
    assert (home / ".bashrc").read_text().count("node.sh") == 1
    assert shell("my_own", home).stdout == "my own line\n"
    seen = shell("env", home).stdout
    secrets = (home / ".emsweep/cluster.env").read_text()
    token = re.search("RAY_AUTH_TOKEN=.+", secrets)
    assert token is not None
    for line in ("EMSWEEP_DATA=/second place", "RAY_AUTH_MODE=token", token[0]):
        assert line in seen.splitlines()
    assert f"PATH={home}/emsweep/.venv/bin:" in seen


def test_a_worker_is_let_in_only_where_the_head_left_its_mark(tmp_path: Path) -> None:
    home, shared = home_with(tmp_path, python="echo http://head:5000"), tmp_path / "shared"
    shell(f"bash ~/emsweep/sweeps/clusters/setup.sh {shared}", home)
    refused = shell("bash ~/emsweep/sweeps/clusters/worker.sh", home)
    assert refused.returncode == 1
    assert f"{shared} must be the same directory as on the head" in refused.stderr
    started = shell(". ~/emsweep/sweeps/clusters/head.sh && echo $MLFLOW_TRACKING_URI", home)
    assert started.stdout.strip() == "http://head:5000"
    assert shell("bash ~/emsweep/sweeps/clusters/worker.sh", home).returncode == 0
    # As where the user has another number there than on the head. Root may write everywhere, so mktemp is told no.
    refusing = home_with(tmp_path / "read-only", mktemp="exit 1")
    (refusing / ".emsweep/cluster.env").write_bytes((home / ".emsweep/cluster.env").read_bytes())
    shell(f"bash ~/emsweep/sweeps/clusters/setup.sh {shared}", refusing)
    refused = shell("bash ~/emsweep/sweeps/clusters/worker.sh", refusing)
    assert refused.returncode == 1
    assert f"can't write to the storage of the cluster, {shared}" in refused.stderr
    # Storage of another cluster has another mark.
    (home / ".emsweep/cluster.env").write_text("RAY_AUTH_TOKEN=of-another-cluster\n")
    assert shell("bash ~/emsweep/sweeps/clusters/worker.sh", home).returncode == 1


def test_the_head_does_not_start_ray_without_mlflow(tmp_path: Path) -> None:
    home = home_with(tmp_path, python="exit 1", ray="echo started")
    shell(f"bash ~/emsweep/sweeps/clusters/setup.sh {tmp_path / 'shared'}", home)
    assert "started" not in shell(". ~/emsweep/sweeps/clusters/head.sh && ray start", home).stdout


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, dict[str, Any]]:
    """The manifest's objects by kind and name."""
    documents = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    return {f"{document['kind']} {document['metadata']['name']}": document for document in documents}


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """A schema of an object with these keys and no others."""
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required.split()}


TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAMED = closed("name", name=TEXT)
SECRET = closed("secretKeyRef", secretKeyRef=closed("name key", name=TEXT, key=TEXT))
VALUE = [closed("name value", name=TEXT, value=TEXT), closed("name valueFrom", name=TEXT, valueFrom=SECRET)]
ENV = {"type": "array", "items": {"oneOf": VALUE}}
ENV_FROM = {"type": "array", "items": closed("secretRef", secretRef=NAMED)}
CONTAINER = closed(
    "name image resources",
    name=TEXT, image=TEXT, env=ENV, envFrom=ENV_FROM,
    command={"type": "array", "items": TEXT}, args={"type": "array", "items": TEXT},
    ports={"type": "array", "items": closed("name containerPort", name=TEXT, containerPort=WHOLE)},
    resources=closed("requests limits", requests=TEXTS, limits=TEXTS),
    volumeMounts={"type": "array", "items": closed("name mountPath", name=TEXT, mountPath=TEXT)},
)  # fmt: skip
CLAIM = closed("claimName", claimName=TEXT)
VOLUME = closed("name persistentVolumeClaim", name=TEXT, persistentVolumeClaim=CLAIM)
PODS = closed(
    "containers", containers={"type": "array", "items": CONTAINER}, volumes={"type": "array", "items": VOLUME}
)
POD = closed("spec", spec=PODS)
DEPLOYMENT = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "apps/v1"}, kind={"const": "Deployment"}, metadata=NAMED,
    spec=closed(
        "selector template",
        replicas={"const": 1}, strategy=closed("type", type={"const": "Recreate"}),
        selector=closed("matchLabels", matchLabels=TEXTS),
        template=closed("metadata spec", metadata=closed("labels", labels=TEXTS), spec=PODS),
    ),
)  # fmt: skip
RAY_CLUSTER = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayCluster"}, metadata=NAMED,
    spec=closed(
        "headGroupSpec workerGroupSpecs",
        rayVersion=TEXT, enableInTreeAutoscaling={"const": True},
        autoscalerOptions=closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE, env=ENV, envFrom=ENV_FROM),
        headGroupSpec=closed("rayStartParams template", rayStartParams=TEXTS, template=POD),
        workerGroupSpecs={"type": "array", "items": closed(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=TEXTS, template=POD,
        )},
    ),
)  # fmt: skip
"""What of KubeRay's custom resource (raycluster_types.go) and of Kubernetes' pods the manifest uses."""


def test_kubernetes_objects_have_the_keys_of_their_kinds(kubernetes: dict[str, dict[str, Any]]) -> None:
    jsonschema.validate(kubernetes["RayCluster emsweep"], RAY_CLUSTER)
    jsonschema.validate(kubernetes["Deployment emsweep-mlflow"], DEPLOYMENT)


def test_rays_autoscaler_reads_the_ray_cluster(kubernetes: dict[str, dict[str, Any]]) -> None:
    """A head that trains nothing, and 0 to 8 pods with a GPU each."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = kubernetes["RayCluster emsweep"]
    config = _derive_autoscaling_config_from_ray_cr(
        {**resource, "metadata": {**resource["metadata"], "namespace": "default"}}
    )
    head, workers = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert head["resources"]["CPU"] == 0
    assert workers["resources"]["GPU"] == 1
    assert (workers["min_workers"], workers["max_workers"]) == (0, 8)
    assert config["idle_timeout_minutes"] == 10


def test_kubernetes_objects_fit_each_other(kubernetes: dict[str, dict[str, Any]]) -> None:
    claims = {name.split()[1] for name in kubernetes if name.startswith("PersistentVolumeClaim")}
    spec = kubernetes["RayCluster emsweep"]["spec"]
    head, workers = spec["headGroupSpec"]["template"]["spec"], spec["workerGroupSpecs"][0]["template"]["spec"]
    deployment = kubernetes["Deployment emsweep-mlflow"]["spec"]
    mlflow = deployment["template"]["spec"]
    for pod in (head, workers, mlflow):
        volumes = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        assert set(volumes.values()) <= claims
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes)
    service = kubernetes["Service emsweep-mlflow"]["spec"]
    ports = {port["name"]: port["containerPort"] for c in mlflow["containers"] for port in c.get("ports", [])}
    assert service["ports"][0]["targetPort"] == ports["mlflow"] == 5000
    assert service["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert mlflow["containers"][0]["image"] == workers["containers"][0]["image"] == head["containers"][0]["image"]
    environment = {variable["name"]: variable.get("value") for variable in workers["containers"][0]["env"]}
    for container in (workers["containers"][0], mlflow["containers"][0]):
        assert {"name": "MLFLOW_TRACKING_URI", "value": "http://emsweep-mlflow:5000"} in container["env"]
    # KubeRay's container that waits for the head copies these and no envFrom.
    assert {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= set(environment)
    assert environment["EMSWEEP_DATA"] in {mount["mountPath"] for mount in workers["containers"][0]["volumeMounts"]}
    assert json.loads(environment["EMSWEEP_CAPACITY"]) == {"GPU": spec["workerGroupSpecs"][0]["maxReplicas"]}


def test_every_file_means_the_ray_that_is_installed(kubernetes: dict[str, dict[str, Any]]) -> None:
    import ray

    assert kubernetes["RayCluster emsweep"]["spec"]["rayVersion"] == ray.__version__
    assert f"ray=={ray.__version__}" in (ROOT / "constraints.txt").read_text().split()


@EVERY_FILE
def test_no_file_holds_a_secret(path: Path) -> None:
    """Secrets are in one file that is copied, with its mode, and named in no command."""
    config = load(path)
    assert config["file_mounts"]["~/.emsweep/cluster.env"] == "~/.emsweep/cluster.env"
    assert not [c for c in commands(config) if re.search("password|token|secret|api_key", c, re.IGNORECASE)]
