"""One SSH tunnel to the head of a cluster: its MLflow, and the Ray that takes sweeps."""

import socket
from pathlib import Path

from sweeps import mlflow_server

RAY_PORT = 8265
"""Of Ray's dashboard and job server, at both ends."""


def open_to(cluster: Path, *, port: int) -> None:
    """Hold the tunnel open until it is closed from either end: local ``port`` is MLflow, ``RAY_PORT`` is Ray.

    ``cluster`` is the file given to ``ray up``; Ray knows from it which host, user and key are meant.
    Raises ``ValueError`` when a local port is taken.
    """
    for wanted, remedy in ((port, "choose another with --port"), (RAY_PORT, "end the Ray or the tunnel that has it")):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError as error:
                raise ValueError(f"port {wanted} of this machine is in use; {remedy}") from error
    from ray.autoscaler.sdk import run_on_cluster

    run_on_cluster(str(cluster), port_forward=[(port, mlflow_server.PORT), (RAY_PORT, RAY_PORT)])
