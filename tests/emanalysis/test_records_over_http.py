import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

from emanalysis import metric_history
from emanalysis.records import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(store: Any, sweep: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server on the session's store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store.uri, "--artifacts-destination", str(tmp_path_factory.mktemp("artifacts"))]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            raise TimeoutError("the MLflow server did not start within a minute")
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_tables_read_over_http_are_those_read_from_the_database(server: str, store: Any) -> None:
    local, remote = load("small", tracking_uri=store.uri), load("small", tracking_uri=server)
    for table in ("runs", "checkpoints", "questions", "steps"):
        pd.testing.assert_frame_equal(getattr(remote, table), getattr(local, table))


@pytest.mark.parametrize("points", [7, 15, 200], ids=["one run is too long", "two runs are", "none is"])
def test_histories_are_whole_however_little_an_answer_holds(
    server: str, store: Any, sweep: dict[str, str], monkeypatch: pytest.MonkeyPatch, points: int
) -> None:
    import mlflow

    # A server cuts its answer at a number of points; here the client believes it is a smaller number.
    whole = metric_history.histories(mlflow.MlflowClient(store.uri), list(sweep.values()), "train/loss")
    monkeypatch.setattr(metric_history, "POINTS_PER_REQUEST", points)
    pieces = metric_history.histories(mlflow.MlflowClient(server), list(sweep.values()), "train/loss")
    pd.testing.assert_frame_equal(pieces, whole)


def test_artifacts_of_a_server_are_downloaded_once(
    server: str, store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., str]
) -> None:
    run_id = write(server, "remote", name="run", learning_rate=1e-3, seed=0)
    first = load("remote", tracking_uri=server, cache=tmp_path)
    assert len(first.questions) == 4 * 8
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", None)
    again = load("remote", tracking_uri=server, cache=tmp_path)
    assert again.responses["run_id"].unique().tolist() == [run_id]
    assert len(again.responses) == 4 * 8 * 4
