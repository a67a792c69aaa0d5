"""The only writer to MLflow: one experiment per sweep, one parent run, one child run per run.

Everything is written in batches and off the training loop, and nothing is written twice: a run that is trained again
from a checkpoint (or from its beginning) skips the points that are already there, metric by metric.
"""

import importlib.metadata
import json
import logging
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before mlflow is imported: it would phone home, and warn about what is no concern of the user's.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

import httpx
import mlflow
import pandas as pd
import pyarrow as pa
import sqlalchemy
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.store.db.db_types import DATABASE_ENGINES

from emtrain import names
from emtrain.lookup import nearest
from emtrain.mistakes import gist

log = logging.getLogger(__name__)

# It logs the traceback of an error of the database that it raises, too.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]

BATCH = 500
"""Metrics per request. MLflow takes 1,000; on SQLite 1,000 in one batch cost 0.25 s, one at a time 20 s."""
BATCHES_AT_ONCE = threading.BoundedSemaphore(4)
"""Of one process. For a batch MLflow takes a second connection to its database while it holds a first, of the 15 that a
process has: with 15 batches at once each waits for the others, and fails after 30 s. The server of a cluster has eight
threads a process (``sweeps.mlflow_server``)."""
SEND_EVERY_SECONDS = 5.0
PARAM_LIMIT = 6000
"""Characters MLflow stores of a param's value."""
SENT_FROM = "EMSWEEP_GIT_COMMIT"
"""Environment variable: the commit that a sweep on a cluster was sent from, where no repository is."""
VERSIONED = ("emsweep", "torch", "transformers", "trl", "peft", "ray", "optuna", "mlflow")


def tracking_uri(uri: str | None, data_dir: Path) -> str:
    """``uri``, else ``MLFLOW_TRACKING_URI``, else a SQLite file in ``data_dir``.

    Raises ``ValueError`` for that file where the path is none that an address can hold.
    """
    if given := uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return given
    database = data_dir.resolve() / "mlflow.db"
    if end := re.search("[?#]", str(database)):
        raise ValueError(
            f"EMSWEEP_DATA: the store would be {database}, and the address of a SQLite file ends at {end[0]!r}; set "
            "EMSWEEP_DATA to a directory without it (unset, it is ./emsweep-data)"
        )
    return f"sqlite:///{database}"


def client(uri: str) -> mlflow.MlflowClient:
    """A client for ``uri``. Raises ``ValueError`` when nothing answers there that is an MLflow store."""
    scheme = uri.partition("://")[0].partition("+")[0]
    try:
        if (database := _database(uri)) is not None:
            if not database.exists():
                _make(database)
        # The MLflow client itself would try for two minutes before it says that nobody is there.
        elif scheme in {"http", "https"}:
            answer = httpx.get(f"{uri.rstrip('/')}/health", timeout=10)
            if answer.is_server_error:
                answer.raise_for_status()
        elif scheme in DATABASE_ENGINES:
            sqlalchemy.create_engine(uri).connect().close()
        opened = mlflow.MlflowClient(uri)
        opened.search_experiments(max_results=1)
    except Exception as error:
        # The MLflow client wraps what went wrong in many types, by kind of store; all mean the same here.
        reason = without_password(gist(error))[:200]
        raise ValueError(
            f"tracking.uri: no MLflow store answers at {without_password(uri)} ({reason}). Start the server, or leave "
            "tracking.uri and MLFLOW_TRACKING_URI unset to use a local file"
        ) from error
    return opened


def without_password(text: str) -> str:
    """``text`` with the user and password of any URL in it starred out, and all values of its query."""
    text = re.sub(r"(?<=://)[^/\s]*(?=@)|(?<=password=)[^&\s'\"]*", "***", text)
    return re.sub(r"([?&][^=&\s'\"]+=)[^&\s'\"]*", r"\1***", text)


def made(uri: str) -> bool:
    """Whether there may be a store: False for a SQLite file that nobody has made yet."""
    database = _database(uri)
    return database is None or database.is_file()


def _database(uri: str) -> Path | None:
    """The file of a SQLite store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _make(database: Path) -> None:
    """Make a SQLite store, whole or not at all: with half of its tables MLflow could never open it."""
    from mlflow.store.tracking import DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".unfinished-") as scratch:
        unfinished = Path(scratch) / database.name
        SqlAlchemyStore(f"sqlite:///{unfinished}", DEFAULT_LOCAL_FILE_AND_ARTIFACT_PATH).engine.dispose()
        try:
            os.link(unfinished, database)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # there are no links on this file system
            unfinished.replace(database)


@dataclass(frozen=True)
class SweepLog:
    """A sweep in MLflow."""

    uri: str
    experiment_id: str
    parent_run_id: str

    @classmethod
    def open(cls, name: str, *, uri: str, artifacts: Path | None = None) -> "SweepLog":
        """The sweep called ``name``, created when it is not there yet.

        ``artifacts`` is where a new experiment on a local store keeps its files; None leaves that to the server.
        """
        store = client(uri)
        location = (artifacts / name).resolve().as_uri() if artifacts and not uri.startswith("http") else None
        try:
            experiment_id = store.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
            experiment = store.get_experiment_by_name(name)
            if experiment.lifecycle_stage != "active":
                raise ValueError(
                    f"name: the sweep {name!r} was deleted in MLflow; restore it there or choose another name"
                ) from error
            experiment_id = experiment.experiment_id
        parent = _parent(store, experiment_id) or store.create_run(
            experiment_id, tags={names.KIND: "sweep", names.RUN_NAME: name}
        )
        return cls(uri, experiment_id, parent.info.run_id)

    @classmethod
    def find(cls, name: str, *, uri: str) -> "SweepLog":
        """The existing sweep called ``name``. Raises ``ValueError`` naming the sweeps there are."""
        if not made(uri):
            raise ValueError(f"there is no sweep {name!r}: there is no store at {uri} yet")
        store = client(uri)
        experiment = store.get_experiment_by_name(name)
        parent = _parent(store, experiment.experiment_id) if experiment else None
        if parent is None:
            known = sorted(e.name for e in store.search_experiments() if e.name != "Default")
            raise ValueError(
                f"there is no sweep {name!r} at {without_password(uri)}.{nearest(name, known)} "
                f"Sweeps there: {', '.join(known) or 'none'}"
            )
        return cls(uri, experiment.experiment_id, parent.info.run_id)

    def runs(self) -> dict[str, Run]:
        """Every run of the sweep by its run key."""
        store, token = client(self.uri), None
        found: dict[str, Run] = {}
        while True:
            page = store.search_runs(
                [self.experiment_id],
                f"tags.`{names.KIND}` = 'run'",
                ViewType.ACTIVE_ONLY,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            # Oldest first and the first kept: should two drivers ever have planned the same run, all agree on one.
            for run in page:
                found.setdefault(run.data.tags[names.RUN_KEY], run)
            token = page.token
            if not token:
                return found

    def finished(self, tags: Mapping[str, str]) -> list[Run]:
        """Every finished run that emsweep trained and that has these ``tags``."""
        return [
            run
            for run in self.runs().values()
            if run.info.status == "FINISHED"
            and names.IMPORTED_FROM not in run.data.tags
            and tags.items() <= run.data.tags.items()
        ]

    def spec(self, run: Run) -> dict[str, Any]:
        """The specification that a run of emsweep was trained by."""
        with tempfile.TemporaryDirectory() as scratch:
            path = client(self.uri).download_artifacts(run.info.run_id, names.SPEC, scratch)
            spec: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return spec

    def plan(
        self,
        run_key: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        entered: Run | None = None,
    ) -> str:
        """Enter a run as SCHEDULED; returns its MLflow run id.

        ``entered`` is the run where a former call entered it: it gets what that call left out.
        """
        store = client(self.uri)
        run = entered or store.create_run(
            self.experiment_id,
            tags={
                names.KIND: "run",
                names.RUN_KEY: run_key,
                names.PARENT: self.parent_run_id,
                names.RUN_NAME: name,
                **tags,
            },
        )
        run_id = run.info.run_id
        lacking = [Param(k, str(v)[:PARAM_LIMIT]) for k, v in params.items() if k not in run.data.params]
        untagged = [RunTag(k, v) for k, v in tags.items() if k not in run.data.tags]
        if lacking or untagged:
            store.log_batch(run_id, params=lacking, tags=untagged)
        store.update_run(run_id, status="SCHEDULED")
        return run_id

    def set_status(self, run_id: str, status: Status) -> None:
        """Set the status of one of the sweep's runs, or of its parent run."""
        store = client(self.uri)
        if RunStatus.is_terminated(RunStatus.from_string(status)):
            store.set_terminated(run_id, status)
        else:
            store.update_run(run_id, status=status)

    def fail(self, run_id: str, failure: str) -> None:
        """Mark a run FAILED for a reason its own process could not record."""
        client(self.uri).set_tag(run_id, names.FAILURE, failure)
        self.set_status(run_id, "FAILED")

    def stop_early(self, run_id: str, rule: str) -> None:
        """Mark a run that was stopped before its end by ``rule``; it is KILLED, and over."""
        client(self.uri).set_tag(run_id, names.STOPPED, rule)
        self.set_status(run_id, "KILLED")

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Step -> value of a metric of a run; of a step logged twice the first."""
        points = client(self.uri).get_metric_history(run_id, metric)
        return {point.step: point.value for point in reversed(points)}

    def download(self, run_id: str, name: str, into: Path) -> Path | None:
        """A copy of one artifact of a run, a file or a folder; None when the run has none of that name."""
        folder, _, _ = name.rpartition("/")
        if not any(artifact.path == name for artifact in client(self.uri).list_artifacts(run_id, folder or None)):
            return None
        return Path(client(self.uri).download_artifacts(run_id, name, str(into)))

    def tables(self, folder: str) -> dict[str, pd.DataFrame]:
        """The Parquet tables in an artifact folder of the sweep's parent run, by name.

        One that can't be read is left out, with a warning: it is half there while it is written anew, and stays so
        where that is cut off.
        """
        found = {}
        with tempfile.TemporaryDirectory() as scratch:
            copied = self.download(self.parent_run_id, folder, Path(scratch))
            for path in sorted(copied.glob("*.parquet")) if copied else ():
                try:
                    found[path.stem] = pd.read_parquet(path)
                except pa.ArrowInvalid as error:
                    log.warning("%s/%s can't be read and was left out: %s", folder, path.name, error)
        return found

    def upload(self, run_id: str, path: Path, directory: str | None = None) -> None:
        """Store a file or folder with a run, below ``directory`` (None is the top), in the place of one so called."""
        client(self.uri).log_artifact(run_id, str(path), directory)

    def rescored(self, run: Run, scores: Mapping[int, Mapping[str, float]]) -> None:
        """Log scores of a finished run anew: step -> metric -> value, NaN for those that are missing.

        The later value of a step counts. The run's end is moved to now, by which those who keep its numbers see that
        they have changed.
        """
        store, now = client(self.uri), int(time.time() * 1000)
        metrics = [
            Metric(metric, value, now, step)
            for step, values in scores.items()
            for metric, value in values.items()
            if not math.isnan(value)
        ]
        for start in range(0, len(metrics), BATCH):
            store.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])
        store.set_terminated(run.info.run_id, run.info.status)

    def write_text(self, name: str, text: str) -> None:
        """Keep a text with the sweep's parent run."""
        client(self.uri).log_text(self.parent_run_id, text, name)

    def write_directory(self, directory: Path, name: str) -> None:
        """Keep a directory with the sweep's parent run."""
        client(self.uri).log_artifacts(self.parent_run_id, str(directory), name)


def metrics_at(run: Run, step: int) -> dict[str, float]:
    """The metrics of a run that were last recorded at ``step``; at its last step the ones that describe its end.

    ``run.data.metrics`` holds the newest value of each, which is an earlier step's where the last one has none.
    """
    return {metric.key: metric.value for metric in run.data.to_proto().metrics if metric.step == step}


def _parent(store: mlflow.MlflowClient, experiment_id: str) -> Run | None:
    """The sweep's parent run; the oldest, should two processes ever have made one at the same moment."""
    found = store.search_runs(
        [experiment_id],
        f"tags.`{names.KIND}` = 'sweep'",
        ViewType.ACTIVE_ONLY,
        max_results=1,
        order_by=["attributes.start_time ASC"],
    )
    return found[0] if found else None


class RunLog:
    """Writes one run, from the process that trains it."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.run_id = run_id
        self._store = client(uri)
        self._pending: list[Metric] = []
        self._sent_at = time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._writes: list[Future[Any]] = []
        self._gap: Exception | None = None
        """Why a batch of metrics could not be stored. None is stored after it."""
        self._logged = self._last_steps()
        # Steps come from the training thread, evaluations from those that judge.
        self._lock = threading.Lock()

    def _last_steps(self) -> dict[str, int]:
        logged = self._store.get_run(self.run_id).data.metrics
        return {key: max(m.step for m in self._store.get_metric_history(self.run_id, key)) for key in logged}

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Queue the values of a step; those a former attempt already logged are left out."""
        now = int(time.time() * 1000)
        with self._lock:
            fresh = {key: value for key, value in values.items() if step > self._logged.get(key, -1)}
            self._logged.update(dict.fromkeys(fresh, step))
            self._pending += [Metric(key, value, now, step) for key, value in fresh.items()]
            if len(self._pending) >= BATCH or time.monotonic() - self._sent_at > SEND_EVERY_SECONDS:
                self._send()

    def _send(self) -> None:
        for start in range(0, len(self._pending), BATCH):
            batch = self._pending[start : start + BATCH]
            self._writes.append(self._writer.submit(self._write, batch))
        self._pending = []
        self._sent_at = time.monotonic()

    def _write(self, batch: list[Metric]) -> None:
        # The next attempt goes on after the last step that is stored, and would never fill a gap before it.
        if self._gap is not None:
            raise self._gap
        try:
            self._log_batch(metrics=batch)
        except Exception as error:
            self._gap = error
            raise

    def flush(self) -> None:
        """Wait until everything queued is stored. Raises what went wrong on the way; nothing queued later is stored
        then."""
        with self._lock:
            self._send()
            writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def params(self, values: Mapping[str, Any]) -> None:
        """Set params at once; one that is set already keeps its value, which MLflow never changes."""
        there = self._store.get_run(self.run_id).data.params
        lacking = [Param(key, str(value)) for key, value in values.items() if key not in there]
        self._log_batch(params=lacking)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags at once."""
        self._log_batch(tags=[RunTag(key, value) for key, value in values.items()])

    def _log_batch(self, **content: Any) -> None:
        with BATCHES_AT_ONCE:
            self._store.log_batch(self.run_id, **content)

    def artifact(self, path: Path, directory: str | None = None) -> None:
        """Store a file, or all files of a directory, below ``directory`` (None is the top)."""
        if path.is_dir():
            self._store.log_artifacts(self.run_id, str(path), directory)
        else:
            self._store.log_artifact(self.run_id, str(path), directory)

    def text(self, name: str, content: str) -> None:
        """Store ``content`` as the text file ``name``."""
        self._store.log_text(self.run_id, content, name)

    def start(self) -> None:
        """The run is being trained; what a former attempt failed of is forgotten."""
        self._store.update_run(self.run_id, status="RUNNING")
        if names.FAILURE in self._store.get_run(self.run_id).data.tags:
            self._store.delete_tag(self.run_id, names.FAILURE)

    def history(self, metric: str) -> list[float]:
        """All stored values of a metric in order of their steps, those of former attempts included."""
        points = self._store.get_metric_history(self.run_id, metric)
        return [point.value for point in sorted(points, key=lambda point: point.step)]

    def metrics_at(self, step: int) -> dict[str, float]:
        """Those of ``step``, as far as none of a later one is stored."""
        return metrics_at(self._store.get_run(self.run_id), step)

    def finish(self, status: Status, *, failure: str | None = None) -> None:
        """Store what is queued, then set the final status; ``failure`` says in a line why a run failed.

        Metrics of a FAILED run that can't be stored are left to its next attempt; of any other that is raised.
        """
        try:
            self.flush()
        except Exception:
            if status != "FAILED":
                raise
        if failure is not None:
            self.tags({names.FAILURE: failure[:PARAM_LIMIT]})
        self._store.set_terminated(self.run_id, status)
        self._writer.shutdown()


def environment_tags() -> dict[str, str]:
    """Tags that say with what a sweep was made: package versions, and the git commit of the working directory."""
    versions = {name: importlib.metadata.version(name) for name in VERSIONED}
    tags = {names.VERSIONS: json.dumps(versions)}
    if sent_from := os.environ.get(SENT_FROM):
        tags[names.GIT_COMMIT] = sent_from
    elif git := shutil.which("git"):
        commit = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if commit.returncode == 0:
            tags[names.GIT_COMMIT] = commit.stdout.strip()
    return tags
