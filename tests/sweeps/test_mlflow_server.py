"""MLflow as the head of a cluster runs it."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from sweeps import mlflow_server
from sweeps.mlflow_server import Server

SECRETS = {
    "MLFLOW_TRACKING_USERNAME": "emsweep",
    "MLFLOW_TRACKING_PASSWORD": "a-password-of-length",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "signs-forms",
}
SERVER = Server("10.0.0.5", "postgresql+psycopg2:///mlflow", "/srv/artifacts", names=("mlflow.lab:5000",))


def test_no_secret_is_on_the_command_line() -> None:
    """Any user of a machine can read the arguments of any process."""
    words = " ".join(SERVER.command)
    assert not [secret for name, secret in SECRETS.items() if name != "MLFLOW_TRACKING_USERNAME" and secret in words]


def test_it_listens_to_the_tunnel_and_to_the_cluster_and_nowhere_else() -> None:
    command = SERVER.command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--bind 10.0.0.5:5000" in command[command.index("--gunicorn-opts") + 1]


def test_it_answers_to_its_own_names_only() -> None:
    environment = SERVER.environment(SECRETS, Path("auth.ini"))
    assert environment["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",") == [
        "localhost:*", "127.0.0.1:*", "10.0.0.5:5000", "mlflow.lab:5000",
    ]  # fmt: skip


@pytest.mark.parametrize("missing", SECRETS)
def test_it_does_not_start_without_its_secrets(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        SERVER.environment({**SECRETS, missing: ""}, Path("auth.ini"))


def test_a_percent_sign_in_the_uri_of_the_store_survives_the_ini_file() -> None:
    import configparser

    server = dataclasses.replace(SERVER, store="postgresql+psycopg2://me:p%40ss@db/mlflow")
    parser = configparser.ConfigParser()
    parser.read_string(server.auth_config)
    assert parser["mlflow"]["database_uri"] == server.store
    assert parser["mlflow"]["default_permission"] == "NO_PERMISSIONS"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on two addresses of the loopback interface."""
    directory = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server("127.0.0.2", f"sqlite:///{directory / 'mlflow.db'}", str(directory / "artifacts"), port=port)
    code = (
        "from pathlib import Path; from sweeps import mlflow_server; "
        f"mlflow_server.STATE = Path({str(directory)!r}); mlflow_server.serve(mlflow_server.{server!r})"
    )
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **SECRETS}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not mlflow_server._answers(server):
            assert process.poll() is None, (directory / "log").read_text()
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.5)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def ask(server: Server, *, at: str = "127.0.0.1", password: str | None = None, host: str | None = None) -> int:
    auth = None if password is None else (SECRETS["MLFLOW_TRACKING_USERNAME"], password)
    headers = {} if host is None else {"Host": host}
    url = f"http://{at}:{server.port}/api/2.0/mlflow/experiments/search?max_results=1"
    return httpx.get(url, auth=auth, headers=headers, timeout=30).status_code


@pytest.mark.slow
def test_the_password_opens_it_at_both_addresses(running: Server) -> None:
    for at in ("127.0.0.1", "127.0.0.2"):
        assert ask(running, at=at) == 401
        assert ask(running, at=at, password="guessed") == 401
        assert ask(running, at=at, password=SECRETS["MLFLOW_TRACKING_PASSWORD"]) == 200


@pytest.mark.slow
def test_a_foreign_name_is_refused_even_with_the_password(running: Server) -> None:
    """So that a page in the user's browser can't reach it by a name that resolves to the tunnel."""
    assert ask(running, password=SECRETS["MLFLOW_TRACKING_PASSWORD"], host="elsewhere.example") == 403


@pytest.mark.slow
def test_a_changed_password_counts_and_the_old_one_does_not(running: Server) -> None:
    """As when the file of secrets was lost and made anew. Last, for the others use the first password."""
    mlflow_server.set_password(running.store, SECRETS["MLFLOW_TRACKING_USERNAME"], "another-password-now")
    assert ask(running, password="another-password-now") == 200
    deadline = time.monotonic() + 2 * mlflow_server.PASSWORD_KEPT_SECONDS
    while ask(running, password=SECRETS["MLFLOW_TRACKING_PASSWORD"]) != 401:
        assert time.monotonic() < deadline
        time.sleep(1)
