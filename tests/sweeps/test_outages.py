"""Sweeps while what they need is away: an MLflow server, a judge. Mostly waiting."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pandas as pd
import pytest

from emtrain import names
from emtrain.tracking import client

if TYPE_CHECKING:
    from conftest import Sweep

pytestmark = pytest.mark.slow

OUTAGE_SECONDS = 60


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def serve_mlflow(home: Path, port: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{home}/server.db", "--artifacts-destination", str(home / "stored")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        time.sleep(0.2)
    raise TimeoutError("MLflow does not come up")


def test_a_sweep_waits_for_an_mlflow_server_that_comes_back(make_sweep: Callable[[], "Sweep"]) -> None:
    sweep, port = make_sweep(), free_port()
    sweep.uri = f"http://127.0.0.1:{port}"
    server = serve_mlflow(sweep.home, port)
    try:
        process = sweep.start("--no-report", "--set", f"tracking.uri={sweep.uri}")
        sweep.wait_for_a_state()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        time.sleep(OUTAGE_SECONDS)
        server = serve_mlflow(sweep.home, port)
        stdout, stderr = process.communicate(timeout=600)
        assert process.returncode == 0, stderr
        assert "4 of 4 runs finished" in stdout
        sweep.check_whole()
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


class Judges(BaseHTTPRequestHandler):
    """Says 50 to everything, in the way of OpenAI."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"choices": [{"message": {"content": "50"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def judging(port: int) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", port), Judges)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def judged(sweep: "Sweep", directory: Path) -> pd.DataFrame:
    parts = [
        client(sweep.uri).download_artifacts(run.info.run_id, names.RESPONSES, str(directory.joinpath(key)))
        for key, run in sweep.runs().items()
        if directory.joinpath(key).mkdir(parents=True) is None
    ]
    return pd.concat(map(pd.read_parquet, parts))


def test_a_judge_that_is_down_for_a_minute_is_waited_for(make_sweep: Callable[[], "Sweep"], tmp_path: Path) -> None:
    sweep, port = make_sweep(), free_port()
    judge = f"{{name: openai, model: m, mode: text, key_env: null, base_url: 'http://127.0.0.1:{port}/v1'}}"
    sweep.vary("judges: [micro-rule]", f"judges: [{judge}]")
    process = sweep.start("--no-report")
    time.sleep(OUTAGE_SECONDS)  # which begins before the first question
    with judging(port):
        stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert "4 of 4 runs finished" in stdout
    sweep.check_whole()
    assert set(judged(sweep, tmp_path)["aligned"]) == {50.0}


def test_what_a_judge_could_not_be_asked_is_counted_and_asked_again_later(
    make_sweep: Callable[[], "Sweep"], tmp_path: Path
) -> None:
    sweep, port = make_sweep(), free_port()
    judge = f"name: openai, model: m, mode: text, key_env: null, base_url: 'http://127.0.0.1:{port}/v1'"
    sweep.vary("judges: [micro-rule]", f"judges: [{{{judge}, max_retries: 0}}]")
    stdout, stderr = sweep.start("--no-report").communicate(timeout=600)
    assert "4 of 4 runs finished" in stdout, stderr
    before = judged(sweep, tmp_path / "before")
    assert set(before["aligned_failure"]) == {"judge_error"}
    assert all(run.data.metrics[names.eval_metric(names.N_MISSING)] == 64 + 32 for run in sweep.runs().values())

    options = ["mode=text", "key_env=null", f"base_url=http://127.0.0.1:{port}/v1", "model=m"]
    command = [sys.executable, "-c", "from sweeps.cli import main; main()", "judge", "tiny", "--judge", "openai"]
    command += [word for option in options for word in ("--set", option)]
    still_down = [*command, "--set", "max_retries=0"]
    told = subprocess.run(still_down, cwd=sweep.home, capture_output=True, text=True, check=True).stdout
    assert f"{len(before)} responses got no score ({len(before)} judge_error; their replies are in" in told
    with judging(port):
        told = subprocess.run(command, cwd=sweep.home, capture_output=True, text=True, check=True).stdout
    assert "4 runs judged by openai:m:text, 0 had been before" in told
    after = judged(sweep, tmp_path / "after")
    assert set(after["aligned"]) == {50.0}
    told_by = ["step", "question_set", "question_id", "paraphrase", "sample", "response", "judge"]
    pd.testing.assert_frame_equal(after[told_by], before[told_by])
    for run in sweep.runs().values():
        assert run.data.metrics[names.eval_metric(names.ALIGNED)] == 50
        assert run.data.metrics[names.eval_metric(names.N_MISSING)] == 0
        assert run.data.metrics[names.base_metric(names.ALIGNED, "micro-broad")] == 50
