"""Sends a sweep to a Ray cluster as a job, and follows it.

What travels is the recipe, the files it names, and the code of these packages. Secrets do not: they are in the
environment of the cluster's nodes (``sweeps/cluster_env.py``), because the environment of a job is no secret.
"""

import hashlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from emtrain import names
from sweeps import cluster_env
from sweeps.recipe import Recipe, expand

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

PACKAGES = ("emtrain", "emeval", "emanalysis", "sweeps")
FILES = (".jsonl", ".yaml", ".yml")
"""A recipe names its own files by paths that end so; whatever else it names comes with the package."""
UPLOAD_LIMIT = 95 * 2**20
"""Bytes. Ray's dashboard takes 100 MiB in one request (``DASHBOARD_CLIENT_MAX_SIZE``), and does not compress them."""
STOP_SECONDS = 60
"""How long a stopped sweep may take to say in MLflow which runs it left off."""
SWEEP, CONTENT = "emsweep.sweep", "emsweep.content"  # in a job's metadata: the sweep's name, a digest of what was sent


@dataclass(frozen=True)
class Parcel:
    """Everything of a sweep that lies on this machine and that its job needs."""

    sweep: str
    recipe_text: str
    overrides: tuple[str, ...]
    files: tuple[str, ...]
    """Paths as the recipe gives them, relative to the working directory here and there."""
    on_head: tuple[str, ...]
    """Absolute paths that the recipe gives and that are not here; the head is to have them."""

    @classmethod
    def pack(cls, recipe: Recipe, recipe_text: str, overrides: Sequence[str]) -> "Parcel":
        """Collect a recipe's files; one given by absolute path is on the head already, which gives it to the workers.

        Raises ``ValueError`` for a file that can't be sent and for a tracking store the cluster can't reach.
        """
        uri = recipe.tracking.uri
        if uri is not None and not uri.startswith(("http://", "https://")):
            raise ValueError(
                f"tracking.uri: {uri} is a store of one machine; a submitted sweep is recorded in the MLflow of the "
                "cluster, so leave the key out"
            )
        models = dict.fromkeys(spec.model for spec in expand(recipe))
        for model in models:
            if Path(model).is_dir() and not Path(model).is_absolute():
                raise ValueError(
                    f"model {model}: a directory of this machine, too large to send; put it on the cluster's shared "
                    "storage and give its absolute path"
                )
        named = dict.fromkeys(text for text in _texts(recipe.model_dump(mode="json")) if text.endswith(FILES))
        files = tuple(name for name in named if not name.startswith(("/", "~")))
        for name in files:
            if not Path(name).is_file():
                raise ValueError(f"{name}: there is no such file here to send to the cluster")
            if not Path(name).resolve().is_relative_to(Path.cwd().resolve()):
                raise ValueError(
                    f"{name}: only files below the working directory are sent; copy it here, or put it on the head of "
                    "the cluster and give the absolute path it has there"
                )
        size = sum(Path(name).stat().st_size for name in files)
        if size > UPLOAD_LIMIT:
            raise ValueError(
                f"the recipe's files are {size / 2**20:.0f} MiB and {UPLOAD_LIMIT / 2**20:.0f} can be sent; put them "
                "on the head of the cluster and give the absolute paths they have there"
            )
        absent = (name for name in (*named, *models) if name.startswith(("/", "~")))
        on_head = tuple(name for name in absent if not Path(name).expanduser().exists())
        return cls(recipe.name, recipe_text, tuple(overrides), files, on_head)

    @property
    def digest(self) -> str:
        """Of the recipe and the files: two parcels with the same digest are the same sweep."""
        digest = hashlib.sha256("\0".join([self.recipe_text, *self.overrides]).encode())
        for name in self.files:
            digest.update(hashlib.sha256(Path(name).read_bytes()).digest())
        return digest.hexdigest()[:20]

    def write(self, directory: Path) -> None:
        """Lay the parcel out in ``directory``, the future working directory of the job."""
        (directory / "recipe.yaml").write_text(self.recipe_text, encoding="utf-8")
        for name in self.files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(name, directory / name)

    @property
    def command(self) -> str:
        """What the job runs, on the head."""
        overrides = [argument for override in self.overrides for argument in ("--set", override)]
        return shlex.join(["emsweep", "run", "recipe.yaml", "--address", "auto", *overrides])


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, their keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def connect(address: str) -> "JobSubmissionClient":
    """A client of the Ray at ``address``. Raises ``ValueError`` when it can't be reached or refuses us."""
    if cluster_env.PATH.exists() and "RAY_AUTH_MODE" not in os.environ:
        # Before Ray is imported, which reads them once.
        os.environ.setdefault("RAY_AUTH_TOKEN", cluster_env.read()["RAY_AUTH_TOKEN"])
        os.environ["RAY_AUTH_MODE"] = "token"
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"submitting needs Ray's job client: pip install 'emsweep[cluster]' ({error})") from error
    try:
        client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(
            f"--address: the Ray at {address} does not know us; RAY_AUTH_TOKEN in {cluster_env.PATH} must be the one "
            "the cluster was started with"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(
            f"--address: no Ray answers at {address}. Is the cluster up, and the tunnel open "
            "(emsweep ui --cluster cluster.yaml)?"
        ) from error
    for chatty in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(chatty).setLevel(logging.WARNING)  # else each package is told of twice
    return client


def submit(client: "JobSubmissionClient", parcel: Parcel) -> tuple[str, bool]:
    """The id of the job that runs the parcel's sweep, and whether it was started now.

    A sweep that is running already is not started a second time. Raises ``ValueError`` when it is running with
    another recipe.
    """
    former = [job for job in client.list_jobs() if (job.metadata or {}).get(SWEEP) == parcel.sweep]
    for job in former:
        if not job.status.is_terminal():
            if (job.metadata or {}).get(CONTENT) != parcel.digest:
                raise ValueError(
                    f"the sweep {parcel.sweep} is running with another recipe, as job {job.submission_id}; wait for "
                    f"it, stop it (--stop {job.submission_id}), or give this one another name"
                )
            return str(job.submission_id), False
    # The number makes the id unique, and of two who submit the same sweep at the same moment Ray refuses one.
    job_id = f"{parcel.sweep}-{len(former) + 1}"
    with TemporaryDirectory(prefix="emsweep-submit-") as directory:
        parcel.write(Path(directory))
        environment = {
            "working_dir": directory,
            "py_modules": [str(Path(__file__).parents[1] / package) for package in PACKAGES],
            "excludes": ["__pycache__"],
            "env_vars": {
                **_commit(),
                "RAY_JOB_STOP_SIGNAL": "SIGINT",
                "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
            },
        }
        metadata = {SWEEP: parcel.sweep, CONTENT: parcel.digest}
        try:
            client.submit_job(
                entrypoint=parcel.command, submission_id=job_id, metadata=metadata, runtime_env=environment
            )
        except RuntimeError as error:
            raise ValueError(f"Ray did not take the job {job_id}: {error}") from error
    return job_id, True


def _commit() -> dict[str, str]:
    """The commit this sweep is sent from, which a job can't find out: no repository travels with it."""
    from emtrain.tracking import SENT_FROM, environment_tags

    commit = environment_tags().get(names.GIT_COMMIT)
    return {SENT_FROM: commit} if commit else {}


async def follow(client: "JobSubmissionClient", job_id: str) -> AsyncIterator[str]:
    """What the job prints, from its beginning, until it ends. Raises ``ConnectionError`` when it is lost from sight."""
    from aiohttp import ClientError

    try:
        async for text in client.tail_job_logs(job_id):
            yield text
    except (OSError, RuntimeError, ClientError) as error:
        raise ConnectionError(str(error)) from error


def ending(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    """The job once it has ended, which is a moment after its last line."""
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(0.5)
    return job


def stop(client: "JobSubmissionClient", job_id: str) -> Any:
    """Stop a job as Ctrl-C stops a sweep; returns its status once it has ended.

    Raises ``ValueError`` when there is no such job.
    """
    try:
        client.stop_job(job_id)
    except RuntimeError as error:
        known = [job.submission_id for job in client.list_jobs() if SWEEP in (job.metadata or {})]
        raise ValueError(f"--stop: there is no job {job_id}; sweeps sent here: {', '.join(known) or 'none'}") from error
    return ending(client, job_id).status
