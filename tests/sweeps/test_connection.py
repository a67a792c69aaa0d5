"""A Ray of one's own: where it listens, and that it ends with the process that it was started for."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from sweeps.connection import Connection

pytestmark = pytest.mark.slow


def double(number: int) -> int:
    return 2 * number


def own_pid() -> int:
    return os.getpid()


def holder_of(connection: Connection) -> psutil.Process:
    assert connection._holder is not None
    return psutil.Process(connection._holder.pid)


def wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there after half a minute."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    return alive


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection(None) as connection:
        connection.open()
        yield connection


def test_all_of_it_listens_on_the_loopback_interface(connection: Connection) -> None:
    """A Ray runs whatever it is sent. This process has imported Ray before, which then makes for another interface."""
    assert ray.get(ray.remote(double).remote(2)) == 4  # so that there is a worker, too
    holder = holder_of(connection)
    listening = [
        port
        for process in [psutil.Process(), *holder.children(recursive=True)]
        for port in process.net_connections("inet")
        if port.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {port.laddr.ip.removeprefix("::ffff:") for port in listening} == {"127.0.0.1"}


def test_it_is_there_while_the_connection_is_and_gone_afterwards() -> None:
    with Connection(None) as connection:
        connection.open()
        assert connection.own
        worker = psutil.Process(ray.get(ray.remote(own_pid).remote()))
        processes = holder_of(connection).children(recursive=True)
        assert worker in processes
        connection.close()
        assert not ray.is_initialized()
        connection.wait()
        assert [process for process in processes if process.is_running()] == []


def test_one_that_is_not_needed_after_all_is_not_waited_for_and_ends_without_a_word() -> None:
    code = """
import psutil
from sweeps.connection import Connection
with Connection(None):
    pass
print(*(child.pid for child in psutil.Process().children()))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    holder = psutil.Process(int(ended.stdout))
    assert ended.stderr == ""
    assert wait_until_gone([holder]) == []


def test_it_does_not_outlive_a_process_that_is_killed(tmp_path: Path) -> None:
    code = """
import time
from sweeps.connection import Connection
with Connection(None) as connection:
    connection.open()
    print("open", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(below) > 5
    assert wait_until_gone(below) == []


def test_one_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with (
        Connection(None) as connection,
        pytest.raises(OSError, match=r"could not be started on this machine: .*nowhere"),
    ):
        connection.open()


def test_another_ray_is_left_and_goes_on(connection: Connection) -> None:
    assert connection.address is not None
    code = f"""
import ray
from sweeps.connection import Connection
with Connection({connection.address!r}) as other:
    other.open()
    assert not other.own
    print(len(ray.nodes()))
"""
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "1\n", ended.stderr
    assert ray.get(ray.remote(double).remote(2)) == 4


def test_processes_that_one_sweep_has_no_use_for_are_not_started(connection: Connection) -> None:
    holder = holder_of(connection)
    started = " ".join(" ".join(process.cmdline()) for process in holder.children(recursive=True))
    assert "raylet" in started
    assert not re.search(r"monitor\.py|log_monitor|dashboard/dashboard\.py", started)
