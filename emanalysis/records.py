"""A sweep as tidy tables, read from MLflow.

``load`` reads what a report needs first; the two long tables (every training step, every response) are read when they
are first asked for. With a cache a run is read once, and again only when it has changed.
"""

import gc
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from emanalysis.responses import questions, responses
from emanalysis.run_search import search
from emanalysis.table_cache import cached
from emanalysis.tidy import STEPS, checkpoints_table, runs_table, steps_table
from emtrain import names, tracking

FORMAT = 3
"""Raised when a cached table changes its meaning."""


def _no_steps() -> pd.DataFrame:
    return pd.DataFrame(columns=["run_id", "step", *STEPS])


def _no_responses() -> pd.DataFrame:
    return pd.DataFrame(columns=["run_id", *names.RESPONSE_COLUMNS])


def _no_geometry() -> dict[str, pd.DataFrame]:
    return {table: pd.DataFrame(columns=list(columns)) for table, columns in names.GEOMETRY_TABLES.items()}


@dataclass(frozen=True)
class Records:
    """The tables of one sweep. Every run is there, whatever its status; NaN is a value that does not exist."""

    sweep: str
    runs: pd.DataFrame
    """One row per run: ``run_id, run_key, name, status`` (MLflow's), ``failure, imported_from, role`` (``names.ROLE``;
    NaN of imported runs), ``weights_kept`` (``none``, or NaN where it kept some), ``start_time, end_time,
    artifact_uri``; every param under its MLflow name; final values ``heldout_loss, heldout_loss_per_sequence,
    train_loss`` (last step), ``train_loss_last_tenth, learning_rate_integral, aligned, coherent, misaligned_rate,
    n_judged, n_missing`` and any other score (means over question sets at the last checkpoint), ``base_<score>``
    likewise before fine-tuning; ``under_trained`` by ``tidy.UNDER_TRAINED_RULE``."""
    checkpoints: pd.DataFrame
    """One row per run, step, question set and stratum (NaN: the whole set): ``fraction`` of ``total_steps``,
    ``heldout_loss, heldout_loss_per_sequence``, the scores of ``names.SCORES``, and of the adapter's update
    ``adapter_norm, adapter_stable_rank, adapter_turn``. Step 0 is the base model. A step without scores has one row
    whose ``question_set`` is NaN."""
    questions: pd.DataFrame
    """One row per run, step, question set, question and judge; see ``emanalysis.responses.summarise``."""
    load_steps: Callable[[], pd.DataFrame] = _no_steps
    load_responses: Callable[[], pd.DataFrame] = _no_responses
    load_geometry: Callable[[], dict[str, pd.DataFrame]] = _no_geometry
    experiment_id: str = ""
    """MLflow's; with a run id it makes the address of a run's page."""
    judge: str | None = None
    """Id of the judge whose scores runs are compared by, where several judged; None: see ``comparable``."""

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per run and optimiser step (the first is 1): ``train_loss, learning_rate, grad_norm, tokens``."""
        return self.load_steps()

    @cached_property
    def responses(self) -> pd.DataFrame:
        """One row per run, response and judge: ``run_id`` and ``names.RESPONSE_COLUMNS``."""
        return self.load_responses()

    @cached_property
    def geometry(self) -> dict[str, pd.DataFrame]:
        """What ``emsweep geometry`` measured: ``names.GEOMETRY_TABLES``, without rows where it measured nothing."""
        return self.load_geometry()


def load(sweep: str, *, tracking_uri: str, cache: Path | None = None) -> Records:
    """The tables of the sweep called ``sweep``.

    ``cache`` is a directory where tables are kept between loads; None reads everything. Raises ``ValueError`` when
    there is no such sweep, naming those there are.
    """
    log = tracking.SweepLog.find(sweep, uri=tracking_uri)
    client = tracking.client(tracking_uri)
    # The parent run's id is in the digest because a database made anew at the same place numbers experiments anew.
    place = f"{FORMAT} {tracking_uri} {log.experiment_id} {log.parent_run_id}"
    folder = cache / hashlib.sha256(place.encode()).hexdigest()[:16] if cache else None

    def at(table: str) -> Path | None:
        return folder / f"{table}.parquet" if folder else None

    def read_questions(runs: pd.DataFrame) -> pd.DataFrame:
        return questions(runs, tracking_uri=tracking_uri, keep=folder)

    def load_steps() -> pd.DataFrame:
        with _without_garbage_collection():
            return cached(at("steps"), found, lambda runs: steps_table(client, runs))

    def load_responses() -> pd.DataFrame:
        return responses(found, tracking_uri=tracking_uri, keep=folder).to_pandas()

    def load_geometry() -> dict[str, pd.DataFrame]:
        return _no_geometry() | log.tables(names.GEOMETRY)

    with _without_garbage_collection(), ThreadPoolExecutor(max_workers=1) as beside:
        found = search(client, log.experiment_id, at("runs"))
        # Files and Arrow on one side, MLflow's Python objects on the other: they hardly wait for each other.
        asked = beside.submit(cached, at("questions"), found, read_questions)
        checkpoints = cached(at("checkpoints"), found, lambda runs: checkpoints_table(client, runs))

    runs = runs_table(found)
    last_step = checkpoints.groupby("run_id")["step"].transform("max")
    total_steps = checkpoints["run_id"].map(runs.set_index("run_id")["total_steps"]).fillna(last_step)
    checkpoints.insert(2, "fraction", checkpoints["step"] / total_steps)
    return Records(
        sweep, runs, checkpoints, asked.result(), load_steps, load_responses, load_geometry, log.experiment_id
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # The collector walks the objects that MLflow makes of each row over and over: 6.4 s for 2,000 runs, 2.5 s without.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
