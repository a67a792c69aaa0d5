"""The secrets of a cluster: one file, made once where ``ray up`` is run and copied to every node.

Every process on a node has it as its environment (``sweeps/clusters/node.sh`` reads it), so no secret travels through
Ray, where the environment of a job is shown to whoever opens the dashboard.
"""

import os
import re
import secrets
import sys
from pathlib import Path

from dotenv import dotenv_values

PATH = Path.home() / ".emsweep" / "cluster.env"
MAKE = "python -m sweeps.cluster_env"


def create(path: Path = PATH) -> bool:
    """Write new secrets, readable by this user alone; False when the file is there, which is then left as it is."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    content = f"""# Secrets of the cluster; `ray up` copies them to every node. After a change here, run it again.
MLFLOW_TRACKING_USERNAME=emsweep
MLFLOW_TRACKING_PASSWORD={secrets.token_urlsafe(24)}
# Signs MLflow's forms.
MLFLOW_FLASK_SERVER_SECRET_KEY={secrets.token_urlsafe(24)}
# Without it nobody talks to Ray.
RAY_AUTH_TOKEN={secrets.token_hex(32)}
# Keys of judges, as in OPENAI_API_KEY=..., without quotes.
"""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    return True


def read(path: Path = PATH) -> dict[str, str]:
    """The secrets by name. Raises ``ValueError`` when the file is missing, others can read it, or a value is quoted."""
    if not path.is_file():
        raise ValueError(f"there is no {path}, which holds the cluster's passwords; make it with: {MAKE}")
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} holds secrets and others can read it; correct that with: chmod 600 {path}")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if re.match(r"\s*\w+\s*=\s*[\"']", line):
            name = line.partition("=")[0].strip()
            raise ValueError(
                f"{path}, line {number}: {name} is quoted, and Kubernetes would keep the quotes; leave them out"
            )
    return {name: value for name, value in dotenv_values(path, interpolate=False).items() if value}


def main() -> None:
    """Entry point of ``python -m sweeps.cluster_env``."""
    if create():
        print(f"wrote {PATH}")
        return
    try:
        read()
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{PATH} is there already")


if __name__ == "__main__":
    main()
