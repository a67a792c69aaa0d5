"""Machines for the cluster test: network namespaces with a process table, disk and sshd of their own.

They hang on one bridge that leads nowhere else, so nothing of the test is seen from outside, and each dies with
everything in it when its one process does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFIX = "emsweep-test-"
TOOLS = "ip unshare nsenter setpriv sshd ssh-keygen rsync uptime sudo pg_createcluster make"
PACKAGES = "openssh-server rsync iproute2 procps sudo postgresql make"
# As on a machine where an administrator installed PostgreSQL.
WITH_POSTGRES = """
for path in /etc/postgresql /var/lib/postgresql /var/log/postgresql /run/postgresql; do own $path postgres; done
pg_createcluster --start "$(ls /usr/lib/postgresql | sort -n | tail -1)" main >/dev/null
"""


def why_not() -> str | None:
    """Why this machine can't play a cluster; None when it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    if missing := [tool for tool in TOOLS.split() if not shutil.which(tool, path=path)]:
        return f"needs {', '.join(missing)} (Debian: {PACKAGES})"
    probe = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    return f"can't make namespaces: {probe.stderr.strip()}" if probe.returncode else None


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@dataclass
class Host:
    """One machine."""

    name: str
    address: str
    directory: Path
    namespace: str
    process: "subprocess.Popen[bytes]"

    @property
    def home(self) -> Path:
        """What ``~`` is there."""
        return self.directory / "home"

    def command(self, arguments: Sequence[str], **environment: str) -> list[str]:
        """``arguments`` as a command of this host, with the tests' virtual environment and a clean environment."""
        first = _children(self.process.pid)[0]
        environment = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TERM": "dumb",
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        }
        assigned = [f"{name}={value}" for name, value in environment.items()]
        enter = ["nsenter", "--target", str(first), "--mount", "--pid", "--net", "--uts", f"--wd={ROOT}"]
        # Where the tests themselves run in the background, Ctrl-C is ignored by all that they start.
        return [*enter, "env", "--default-signal=INT", "-i", *assigned, *arguments]

    def run(self, *arguments: str, timeout: float = 120, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run a command here to its end; the caller looks at how it ended."""
        return subprocess.run(
            self.command(arguments, **environment), capture_output=True, text=True, timeout=timeout, check=False
        )

    @contextmanager
    def background(self, *arguments: str, log: str) -> "Iterator[subprocess.Popen[bytes]]":
        """A command that runs here meanwhile, its output in the file ``log`` of the host's directory."""
        with (self.directory / log).open("wb") as output:
            running = subprocess.Popen(self.command(arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                yield running
            finally:
                self.interrupt(running)
                with suppress(subprocess.TimeoutExpired):
                    running.wait(timeout=30)
                running.kill()

    @staticmethod
    def interrupt(running: "subprocess.Popen[bytes]") -> None:
        """Press Ctrl-C."""
        if running.poll() is None:
            for child in _children(running.pid):
                os.kill(child, signal.SIGINT)

    def kill(self) -> None:
        """Pull the plug."""
        self.process.kill()
        self.process.wait()


def _wait_for(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.5)


@dataclass
class Lab:
    """Four machines: the user's own, and those the cluster is made of."""

    directory: Path
    operator: Host
    head: Host
    workers: list[Host]

    @property
    def shared(self) -> Path:
        """Storage that all machines see at the same path."""
        return self.directory / "shared"

    def wait_for(self, condition: Callable[[], bool], *, seconds: float, what: str) -> None:
        """Wait until ``condition`` holds; the test fails when it does not in so many seconds."""
        _wait_for(condition, seconds=seconds, what=what)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    if reason := why_not():
        pytest.skip(reason)
    _bury_the_dead()
    directory = Path(tempfile.mkdtemp(prefix="emsweep-", dir="/var/tmp"))
    directory.chmod(0o755)
    (directory / "shared").mkdir()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / "key")], check=True)
    hosts: list[Host] = []
    try:
        for number, name in enumerate(("operator", "head", "worker1", "worker2")):
            hosts.append(_start(directory, name, number, WITH_POSTGRES if name == "head" else ""))
        for host in hosts:
            _wait_for(lambda host=host: (host.directory / "ready").exists(), seconds=60, what=f"{host.name} to start")
        yield Lab(directory, hosts[0], hosts[1], hosts[2:])
    finally:
        for host in hosts:
            host.kill()
        for host in hosts:
            _clear(host.namespace)
        shutil.rmtree(directory, ignore_errors=True)


def _start(directory: Path, name: str, number: int, setup: str) -> Host:
    own = directory / name
    own.mkdir()
    namespace, bridge = f"{PREFIX}{os.getpid()}-{name}", f"{PREFIX}{os.getpid()}-operator"
    _ip("netns", "add", namespace)
    _ip("-n", namespace, "link", "set", "lo", "up")
    if number == 0:
        address = "10.77.0.1"
        _ip("-n", namespace, "link", "add", "lan", "type", "bridge")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "lan")
        _ip("-n", namespace, "link", "set", "lan", "up")
    else:
        address = f"10.77.0.{10 + number}"
        _ip("link", "add", f"port{number}", "netns", bridge, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", bridge, "link", "set", f"port{number}", "master", "lan", "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
    if name == "head":
        # In another network, too, by which it would call the world, while the workers know no way there.
        _ip("-n", namespace, "link", "add", "world", "type", "bridge")
        _ip("-n", namespace, "addr", "add", "203.0.113.7/24", "dev", "world")
        _ip("-n", namespace, "link", "set", "world", "up")
        _ip("-n", namespace, "route", "add", "default", "via", "203.0.113.1")
    keep = [str(path) for path in (ROOT, Path(sys.prefix).resolve(), sys.base_prefix)]
    with (own / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # also when the test itself is killed
                *("ip", "netns", "exec", namespace),
                *("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"),
                *("bash", str(Path(__file__).with_name("host.sh")), str(own), setup, *keep),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return Host(name, address, own, namespace, process)


def _clear(namespace: str) -> None:
    """Remove a namespace and what may still run in it."""
    for _ in range(100):
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False).stdout
        if not listed:
            break
        for process in listed.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        time.sleep(0.2)
    subprocess.run(["ip", "netns", "delete", namespace], check=False)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _bury_the_dead() -> None:
    """Remove namespaces of tests that were killed."""
    listed = subprocess.run(["ip", "-json", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name in [entry["name"] for entry in json.loads(listed or "[]")]:
        if name.startswith(PREFIX) and not Path("/proc", name.removeprefix(PREFIX).partition("-")[0]).exists():
            _clear(name)
