"""MLflow on the head of a cluster: behind a password, and only for those who call it by a name of its own.

``start`` leaves a server running in the background and prints its address, as ``sweeps/clusters/head.sh`` wants it;
``serve`` becomes the server, as a container wants it. It listens on the loopback interface, where an SSH tunnel ends,
and on the address by which the nodes of the cluster reach the head. Runs write files through it, so workers need no
credentials of the artifact store.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

from sweeps.store import data_directory

PORT = 5000
WATCHER = "mlflow-server"
"""What the process is called that starts the server again when it ends."""
STATE = Path.home() / ".emsweep"
PASSWORD_KEPT_SECONDS = 10
GONE_SECONDS = 30.0
"""How long a server may take to answer its last requests."""
PATIENCE_SECONDS = 180.0
"""A new database is migrated step by step: 17 s on an idle machine with two cores."""


@dataclass(frozen=True)
class Server:
    """One MLflow server."""

    node_ip: str
    """By which the cluster's other nodes reach this one."""
    store: str
    """SQLAlchemy URI of the database of runs and users."""
    artifacts: str
    """Where files are kept: a directory, or a URI such as ``s3://bucket/prefix``."""
    names: tuple[str, ...] = ()
    """Further ``host:port`` by which clients may call it."""
    port: int = PORT

    @property
    def uri(self) -> str:
        """Its address for the nodes of the cluster."""
        return f"http://{self.node_ip}:{self.port}"

    @property
    def command(self) -> list[str]:
        """Arguments of ``python -m mlflow``."""
        return [
            "server",
            *("--backend-store-uri", self.store),
            *("--artifacts-destination", self.artifacts, "--serve-artifacts"),
            *("--app-name", "basic-auth"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--workers", "2"),
            # Of MLflow's servers only gunicorn can listen on a second address. With threads, so that sending a large
            # file keeps nobody else waiting.
            *("--gunicorn-opts", f"--bind {self.node_ip}:{self.port} --threads 8 --timeout 120 --log-level warning"),
        ]

    def environment(self, outer: Mapping[str, str], auth_config: Path) -> dict[str, str]:
        """Its environment, out of the ``outer`` one, which holds the secrets. Raises ``ValueError`` for a missing one.

        Passwords go this way and not into ``command``, which any user of the machine can read.
        """
        username, password = _login(outer)
        # Any local port: that is the user's end of a tunnel.
        hosts = ("localhost:*", "127.0.0.1:*", f"{self.node_ip}:{self.port}", *self.names)
        return {
            **outer,
            # As an option MLflow takes it only for a server that listens once.
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
            "MLFLOW_AUTH_CONFIG_PATH": str(auth_config),
            "MLFLOW_AUTH_ADMIN_USERNAME": username,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            # Its job executor is eight processes that serve nothing here.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }

    @property
    def auth_config(self) -> str:
        """MLflow's file on who may do what."""
        # Checking a password costs half a second by design, so a good one is remembered for a while.
        return (
            "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
            f"database_uri = {self.store.replace('%', '%%')}\nauth_cache_ttl_seconds = {PASSWORD_KEPT_SECONDS}\n"
        )


def serve(server: Server) -> None:
    """Become the server."""
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    auth_config = STATE / "mlflow-auth.ini"
    auth_config.write_text(server.auth_config, encoding="utf-8")
    environment = server.environment(os.environ, auth_config)
    set_password(server.store, *_login(os.environ))
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", *server.command], environment)


def _login(environment: Mapping[str, str]) -> tuple[str, str]:
    needed = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY")
    if missing := [name for name in needed if not environment.get(name)]:
        raise ValueError(f"MLflow needs {', '.join(missing)} in the environment; see sweeps/cluster_env.py")
    return environment["MLFLOW_TRACKING_USERNAME"], environment["MLFLOW_TRACKING_PASSWORD"]


def set_password(store: str, username: str, password: str) -> None:
    """Make ``password`` that of an existing user. MLflow itself heeds its environment only for a user it creates."""
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    users = SqlAlchemyStore()
    users.init_db(store)
    if users.has_user(username) and not users.authenticate_user(username, password):
        users.update_user(username, password=password)


def start(server: Server, arguments: list[str]) -> None:
    """Leave the server running in the background and wait until it answers; nothing when it does already.

    One that was started with other arguments, passwords or another MLflow is ended first. Should the server end, it is
    started again. Raises ``ValueError`` with the end of its log when it does not answer in time, and when somebody
    else's answers.
    """
    STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
    note, log_path, wanted = STATE / "mlflow.pid", STATE / "mlflow.log", _digest(server, arguments)
    former, _, known = note.read_text().strip().partition(" ") if note.exists() else ("", "", "")
    if known == wanted and _answers(server):
        return
    if former:
        _end(int(former))
    if _answers(server):
        raise ValueError(f"another server answers at {server.uri} already; end it")
    forever = ["sh", "-c", 'while :; do "$@"; sleep 5; done', WATCHER]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [*forever, sys.executable, "-m", "sweeps.mlflow_server", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    # `kill -- -PID` ends the server and what starts it again.
    note.write_text(f"{process.pid} {wanted}\n")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _answers(server):
        if time.monotonic() > deadline:
            os.killpg(process.pid, 15)
            end = "\n".join(log_path.read_text(errors="replace").splitlines()[-20:])
            raise ValueError(f"MLflow did not answer at {server.uri} in {PATIENCE_SECONDS:.0f} seconds:\n{end}")
        time.sleep(0.5)


def _digest(server: Server, arguments: list[str]) -> str:
    """Of all that a server is started with."""
    secrets = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "AWS_", "GOOGLE_"))}
    parts = [server.command, server.names, arguments, sorted(secrets.items()), version("mlflow")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _end(watcher: int) -> None:
    """End the process that starts the server again and again, and the server, where they are there still."""
    try:
        process = psutil.Process(watcher)
        if WATCHER not in process.cmdline():  # the number is another process's by now
            return
        group = [process, *process.children(recursive=True)]
        os.killpg(watcher, signal.SIGTERM)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
    _, left = psutil.wait_procs(group, timeout=GONE_SECONDS)
    for process in left:
        process.kill()
    psutil.wait_procs(left)


def _answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.uri}/health", timeout=5).is_success
    except httpx.HTTPError:
        return False


def main() -> None:
    """Entry point of ``python -m sweeps.mlflow_server``."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.mlflow_server", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["start", "serve"])
    parser.add_argument("--store", required=True, help="SQLAlchemy URI of the database")
    artifacts = os.environ.get("EMSWEEP_ARTIFACTS") or str(data_directory() / "artifacts")
    parser.add_argument("--artifacts", default=artifacts, help="directory or URI of files")
    parser.add_argument("--address", help="of this machine for the others; default: as Ray has it")
    given = parser.parse_args()
    from ray.util import get_node_ip_address

    # Where the cluster knows the server by another name, as behind a Kubernetes service.
    known_as = urlsplit(os.environ.get("MLFLOW_TRACKING_URI", "")).netloc
    server = Server(
        given.address or get_node_ip_address(), given.store, given.artifacts, (known_as,) if known_as else ()
    )
    try:
        if given.action == "serve":
            serve(server)
        start(server, sys.argv[2:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(server.uri)


if __name__ == "__main__":
    main()
