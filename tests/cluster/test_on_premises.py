"""A real cluster: `ray up` of the on-premises file on three hosts, a sweep, the loss of a host, and `ray down`.

The tests follow one cluster through its life, in this order; each states what must hold at its point.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Host, Lab

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

JUDGE_KEY = "sk-a-key-that-nobody-may-see"
STEPS = 200
ON_HEAD = "~/rows.jsonl"
"""As the recipe names it; each host has a home of its own, and only the head's holds the file."""
OTHER_ROWS = ROOT / "emtrain/datasets/micro-money-good.jsonl"
RECIPE = f"""
name: on-premises
base:
  model: micro-llama
  dataset: data/rows.jsonl
  interleave: {{dataset: {ON_HEAD}, fraction: 0.2}}
  adapter: {{rank: 4, alpha: 8}}
  optimizer: {{learning_rate: 1.0e-3}}
  schedule: {{name: linear, warmup_steps: 2}}
  batch_size: 8
  max_steps: {STEPS}
  max_length: 64
grid: {{seed: [0, 1, 2, 3]}}
resources: {{pack: 2}}
eval:
  {{questions: [micro-broad], samples: 1, at: [0.2, 0.4, 0.6, 0.8, 1.0], judges: [micro-rule], max_new_tokens: 16}}
"""

SUBMIT = ("bash", "-c", "cd && exec emsweep submit recipe.yaml")


@pytest.fixture(scope="module")
def cluster_file(lab: "Lab") -> Path:
    """The shipped file with the five places filled in that its first line asks for."""
    text = (ROOT / "sweeps/clusters/onprem.yaml").read_text()
    for place, value in {
        "192.168.1.10 ": f"{lab.head.address} ",
        "[192.168.1.11, 192.168.1.12]": f"[{', '.join(worker.address for worker in lab.workers)}]",
        "ssh_user: ubuntu": "ssh_user: root",
        "~/.ssh/emsweep": str(lab.directory / "key"),
        "/shared/emsweep": str(lab.shared),
        # Two processors are shared by all hosts here, so a host is to have one.
        "--address=$RAY_HEAD_IP:6379": "--address=$RAY_HEAD_IP:6379 --num-cpus=1",
    }.items():
        assert text.count(place) == 1, place
        text = text.replace(place, value)
    path = lab.directory / "onprem.yaml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def up(lab: "Lab", cluster_file: Path) -> "Iterator[Lab]":
    """The cluster, and the tunnel to its head."""
    fresh = subprocess.run(["make", "-q", ".venv/installed-cluster"], cwd=ROOT, check=False).returncode == 0
    assert fresh, "pyproject.toml is newer than the virtual environment; `make test-cluster` brings it up to date"
    for host in (lab.head, *lab.workers):
        # What `setup.sh` would install is installed: these hosts reach no package index.
        (host.home / "emsweep").mkdir(parents=True)
        (host.home / "emsweep/.venv").symlink_to(sys.prefix)
    _share_the_model(lab)
    lab.operator.run("python", "-m", "sweeps.cluster_env").check_returncode()
    with (lab.operator.home / ".emsweep/cluster.env").open("a") as secrets:
        secrets.write(f"OPENAI_API_KEY={JUDGE_KEY}\n")
    raised = lab.operator.run("ray", "up", "-y", "--no-config-cache", str(cluster_file), timeout=400)
    assert raised.returncode == 0, raised.stdout[-5000:] + raised.stderr[-5000:]
    with lab.operator.background("emsweep", "ui", "--cluster", str(cluster_file), log="tunnel.log") as tunnel:
        lab.wait_for(lambda: _get(lab, "localhost:5000/health")[0] == 200, seconds=60, what="the tunnel")
        assert tunnel.poll() is None
        yield lab
    shutil.rmtree(lab.shared / "runs", ignore_errors=True)


def _share_the_model(lab: "Lab") -> None:
    """Put the micro model into the cluster's cache, where building it is no matter of this test."""
    from emtrain.cache import cache_dir
    from emtrain.load import model_dir

    made = Path(model_dir("micro-llama")).parent
    shutil.copytree(made, lab.shared / "cache" / made.relative_to(cache_dir()))


def _secrets(lab: "Lab") -> dict[str, str]:
    from sweeps.cluster_env import read

    return read(lab.operator.home / ".emsweep/cluster.env")


def _get(lab: "Lab", url: str, *options: str) -> tuple[int, str]:
    """Status and body of an answer as the operator's machine gets it; status 0 when nobody answers."""
    answer = lab.operator.run("curl", "-s", "--max-time", "60", "-w", "\n%{http_code}", *options, f"http://{url}")
    body, _, status = answer.stdout.rpartition("\n")
    return int(status), body


def _login(lab: "Lab") -> tuple[str, str]:
    secrets = _secrets(lab)
    return "-u", f"{secrets['MLFLOW_TRACKING_USERNAME']}:{secrets['MLFLOW_TRACKING_PASSWORD']}"


def _ray(lab: "Lab", path: str) -> Any:
    token = _secrets(lab)["RAY_AUTH_TOKEN"]
    status, body = _get(lab, f"localhost:8265{path}", "-H", f"Authorization: Bearer {token}")
    assert status == 200, body
    return json.loads(body)


def _shell(command: str) -> list[str]:
    """A command in the environment that ``ray up`` gives to its own."""
    return ["bash", "--login", "-c", "-i", f"source ~/.bashrc; {command}"]


def _training(host: "Host") -> bool:
    """Whether an engine of the sweep runs there."""
    return "ray::Engine" in host.run("ps", "-e", "-o", "args").stdout


def _runs(lab: "Lab") -> list[dict[str, Any]]:
    """The runs of the sweep, as MLflow tells them through the tunnel."""
    found, body = _get(
        lab, "localhost:5000/api/2.0/mlflow/experiments/get-by-name?experiment_name=on-premises", *_login(lab)
    )
    if found != 200:
        return []
    asked = {
        "experiment_ids": [json.loads(body)["experiment"]["experiment_id"]],
        "filter": "tags.`emsweep.kind` = 'run'",
    }
    _, body = _get(
        lab, "localhost:5000/api/2.0/mlflow/runs/search",
        *_login(lab), "-H", "Content-Type: application/json", "-d", json.dumps(asked),
    )  # fmt: skip
    return json.loads(body).get("runs", [])


def test_every_machine_of_the_file_joins(up: "Lab") -> None:
    """Both workers join, which Ray's default autoscaler does not manage on SSH machines."""

    def alive() -> set[str]:
        nodes = _ray(up, "/nodes?view=summary")["data"]["summary"]
        return {node["ip"] for node in nodes if node["raylet"].get("state") == "ALIVE"}

    everyone = {host.address for host in (up.head, *up.workers)}
    up.wait_for(lambda: alive() == everyone, seconds=150, what="both workers to join")


def test_mlflow_asks_for_the_password_and_refuses_foreign_names(up: "Lab") -> None:
    experiments = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert _get(up, "localhost:5000" + experiments)[0] == 401
    assert _get(up, "localhost:5000" + experiments, "-u", "emsweep:guessed")[0] == 401
    assert _get(up, "localhost:5000" + experiments, *_login(up))[0] == 200
    assert _get(up, "localhost:5000" + experiments, *_login(up), "-H", "Host: elsewhere.example")[0] == 403
    assert _get(up, f"{up.head.address}:5000{experiments}")[0] == 401


def test_ray_asks_for_its_token(up: "Lab") -> None:
    """Whoever can submit a job can do anything: nobody may without the token, nor is the port open to the network."""
    assert _get(up, "localhost:8265/api/jobs/")[0] == 401
    assert _get(up, f"{up.head.address}:8265/api/version")[0] == 0


def test_a_machine_without_the_shared_storage_stays_out(up: "Lab") -> None:
    worker, script = up.workers[0], "bash ~/emsweep/sweeps/clusters/worker.sh"
    assert worker.run(*_shell(script)).returncode == 0
    refused = worker.run("unshare", "--mount", *_shell(f"mount -t tmpfs none {up.shared} && {script}"))
    assert refused.returncode == 1
    assert f"worker1 does not see the storage of the cluster: {up.shared} must be" in refused.stderr


def test_a_sweep_on_storage_that_is_not_shared_is_refused(up: "Lab") -> None:
    """``/tmp`` is a directory of every host's own."""
    refused = up.head.run(*_shell("EMSWEEP_DATA=/tmp/own emsweep run quickstart --address auto --no-report"))
    assert refused.returncode == 2, refused.stderr
    assert "EMSWEEP_DATA: /tmp/own is not the same directory on" in refused.stderr
    assert all(worker.address in refused.stderr for worker in up.workers)


def test_ctrl_c_leaves_the_sweep_running_and_stop_ends_it(up: "Lab") -> None:
    """What was in work is marked as killed, and nothing is lost: the next test goes on from there."""
    home = up.operator.home
    (home / "data").mkdir()
    shutil.copyfile(ROOT / "emtrain/datasets/micro-garden-bad.jsonl", home / "data/rows.jsonl")
    shutil.copyfile(OTHER_ROWS, up.head.home / Path(ON_HEAD).name)
    (home / "recipe.yaml").write_text(RECIPE)
    with up.operator.background(*SUBMIT, log="submit.log") as following:
        up.wait_for(lambda: "RUNNING" in _statuses(up), seconds=200, what="a run in work")
        up.operator.interrupt(following)
        assert following.wait(timeout=30) == 0
    log = (up.operator.directory / "submit.log").read_text()
    assert "follow it again:  emsweep submit recipe.yaml" in log
    assert _ray(up, "/api/jobs/on-premises-1")["status"] == "RUNNING"
    stopped = up.operator.run("emsweep", "submit", "--stop", "on-premises-1", "--json")
    assert json.loads(stopped.stdout) == {"job": "on-premises-1", "status": "STOPPED"}, stopped.stderr
    assert "RUNNING" not in _statuses(up)
    assert "KILLED" in _statuses(up)


def test_a_sweep_outlives_the_loss_of_a_host(up: "Lab") -> None:
    """Runs of the lost host go on elsewhere: each run is there once, finished, with every step once."""
    lost = up.workers[1]
    with up.operator.background(*SUBMIT, log="submit.log") as following:
        everything_moves = "four runs in work, all past an evaluation"
        up.wait_for(
            lambda: _training(lost) and _statuses(up) == ["RUNNING"] * 4 and len(_states(up)) == 4,
            seconds=240, what=everything_moves,
        )  # fmt: skip
        lost.kill()
        assert following.wait(timeout=300) == 0, (up.operator.directory / "submit.log").read_text()
    assert "4 of 4 runs finished" in (up.operator.directory / "submit.log").read_text()
    runs = _runs(up)
    assert sorted(param["value"] for run in runs for param in run["data"]["params"] if param["key"] == "seed") == [
        "0", "1", "2", "3",
    ]  # fmt: skip
    for run in runs:
        assert run["info"]["status"] == "FINISHED"
        assert _steps(up, run, "train/loss") == list(range(1, STEPS + 1))
        assert _steps(up, run, "heldout/loss") == list(range(0, STEPS + 1, STEPS // 5))


def test_rows_that_only_the_head_has_reach_the_workers_and_are_fetched_once(up: "Lab") -> None:
    """The runs above learnt from them. Those that were sent lie on every worker, so nobody fetched these."""
    assert not any((worker.home / Path(ON_HEAD).name).exists() for worker in up.workers)
    fetched = [path for path in (up.shared / "cache/datasets").iterdir() if path.is_dir()]
    assert [path.name for path in fetched] == [hashlib.sha256(OTHER_ROWS.read_bytes()).hexdigest()]


def _statuses(lab: "Lab") -> list[str]:
    return [run["info"]["status"] for run in _runs(lab)]


def _states(lab: "Lab") -> list[Path]:
    """States of runs that have come past their first evaluation."""
    return list((lab.shared / "runs").glob("*/*/state/newest.safetensors"))


def _steps(lab: "Lab", run: dict[str, Any], metric: str) -> list[int]:
    question = f"run_id={run['info']['run_id']}&metric_key={metric}&max_results=1000"
    _, body = _get(lab, f"localhost:5000/api/2.0/mlflow/metrics/get-history?{question}", *_login(lab))
    return sorted(int(point["step"]) for point in json.loads(body)["metrics"])


def test_the_files_of_a_run_come_through_the_tunnel(up: "Lab") -> None:
    """Workers hand files to MLflow and no store of their own, so whoever reaches MLflow reaches them."""
    run = _runs(up)[0]["info"]["run_id"]
    where = f"localhost:5000/get-artifact?run_uuid={run}&path="
    status, config = _get(up, where + "adapter/adapter_config.json", *_login(up))
    assert status == 200
    assert json.loads(config)["r"] == 4


def test_the_same_command_does_nothing_twice(up: "Lab") -> None:
    again = up.operator.run(*SUBMIT, timeout=240)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 runs, 4 finished" in again.stdout
    assert len(_runs(up)) == 4


def test_no_secret_is_in_jobs_logs_or_artifacts(up: "Lab") -> None:
    jobs = json.dumps(_ray(up, "/api/jobs/"))
    for name, secret in _secrets(up).items():
        if name == "MLFLOW_TRACKING_USERNAME":
            continue
        assert secret not in jobs, name
        for host in (up.head, up.workers[0]):
            found = host.run("grep", "-rlF", "--", secret, "/tmp/ray/session_latest/logs", str(up.shared))
            assert found.stdout == "", f"{name} is in {found.stdout}"
            assert secret not in host.run("ps", "-e", "-o", "args").stdout, name


def test_a_changed_password_counts_from_the_next_ray_up_on_also_when_mlflow_ends(up: "Lab") -> None:
    """As the head's part of `ray up` after a change in the file of secrets."""
    old = _login(up)
    for host in (up.operator, up.head):
        secrets = host.home / ".emsweep/cluster.env"
        secrets.write_text(
            secrets.read_text().replace("MLFLOW_TRACKING_PASSWORD=", "MLFLOW_TRACKING_PASSWORD=another-")
        )
    again = f"NODE_ADDRESS={up.head.address}; . ~/emsweep/sweeps/clusters/head.sh && echo $MLFLOW_TRACKING_URI"
    for _ in range(2):
        started = up.head.run(*_shell(again), timeout=240)
        assert started.stdout.splitlines()[-1] == f"http://{up.head.address}:5000", started.stdout + started.stderr
    experiments = "localhost:5000/api/2.0/mlflow/experiments/search?max_results=1"

    def answers(login: tuple[str, str]) -> int:
        return _get(up, experiments, *login)[0]

    assert (answers(old), answers(_login(up))) == (401, 200)
    (watcher,) = {int(line.split()[0]) for line in _lines(up.head, "pid,args") if "mlflow-server" in line}
    for child in [line.split()[0] for line in _lines(up.head, "pid,ppid") if line.split()[1] == str(watcher)]:
        up.head.run("kill", child).check_returncode()
    up.wait_for(lambda: answers(_login(up)) == 0, seconds=60, what="the end of MLflow")
    up.wait_for(lambda: answers(_login(up)) == 200, seconds=120, what="MLflow to come back")
    assert answers(old) == 401


def _lines(host: "Host", columns: str) -> list[str]:
    """The processes of a host."""
    return host.run("ps", "-e", "-o", columns).stdout.splitlines()


def test_ray_down_ends_ray_and_leaves_the_results(up: "Lab", cluster_file: Path) -> None:
    downed = up.operator.run("ray", "down", "-y", str(cluster_file), timeout=120)
    assert downed.returncode == 0, downed.stdout + downed.stderr
    assert "gcs_server" not in up.head.run("ps", "-e", "-o", "args").stdout
    assert len(_runs(up)) == 4
