"""One SSH tunnel to the head of a cluster: its MLflow, and the Ray that takes sweeps."""

import contextlib
import io
import logging
import socket
from pathlib import Path

import yaml

from emtrain.mistakes import named
from sweeps import mlflow_server

RAY_PORT = 8265
"""Of Ray's dashboard and job server, at both ends."""


def command(cluster: Path, *, port: int) -> list[str]:
    """The SSH command that holds the tunnel open: local ``port`` is MLflow, ``RAY_PORT`` is Ray.

    ``cluster`` is the file given to ``ray up``; Ray knows from it which host, user and key are meant.
    Raises ``ValueError`` when a local port is taken or the cluster is not up.
    """
    for wanted, remedy in ((port, "choose another with --port"), (RAY_PORT, "end the Ray or the tunnel that has it")):
        if taken(wanted):
            raise ValueError(f"port {wanted} of this machine is in use; {remedy}")
    host, auth = _head(cluster)
    from ray.autoscaler._private.command_runner import SSHOptions

    # Ray's own: it knows no host by its key, as a cloud gives the same address to one machine after the other.
    options = SSHOptions(auth.get("ssh_private_key"), ProxyCommand=auth.get("ssh_proxy_command"), LogLevel="ERROR")
    forwarded = ((port, mlflow_server.PORT), (RAY_PORT, RAY_PORT))
    ends = [f"127.0.0.1:{here}:127.0.0.1:{there}" for here, there in forwarded]
    return [
        "ssh", "-N", *(word for end in ends for word in ("-L", end)),
        *options.to_ssh_options_list(), f"{auth['ssh_user']}@{host}",
    ]  # fmt: skip


def taken(port: int, host: str = "127.0.0.1") -> str | None:
    """Why nothing can listen on ``port`` of ``host``; None where something can."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place, family=family).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _head(cluster: Path) -> tuple[str, dict[str, str]]:
    """Address of the head and how to log in there."""
    from ray.autoscaler import sdk

    logging.getLogger("ray").setLevel(logging.WARNING)
    aside = io.StringIO()  # Ray tells at length what it does
    try:
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            config = sdk.bootstrap_config(yaml.safe_load(cluster.read_text(encoding="utf-8")))
            return sdk.get_head_node_ip(str(cluster)), config["auth"]
    except Exception as error:  # those of YAML, of Ray, and of each cloud's client
        raise ValueError(f"{cluster}: no cluster is up that this file describes ({named(error)})") from error
