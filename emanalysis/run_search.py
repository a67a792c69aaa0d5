"""The runs of a sweep as MLflow's search returns them, and which of them have to be asked for again."""

import json
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.entities import Run, ViewType

from emanalysis.table_cache import save
from emtrain import names

PAGE = 1000
CLOCK_MARGIN_MS = 10 * 60 * 1000
"""Clocks of the machines that end runs disagree: what ended this long before the newest run is asked for again."""

COLUMNS = (
    "run_id", "name", "status", "start_time", "end_time", "artifact_uri", "imported", "params", "metrics", "tags"
)  # fmt: skip


def search(client: mlflow.MlflowClient, experiment_id: str, known_at: Path | None) -> pd.DataFrame:
    """One row per run of the experiment, oldest first: ``COLUMNS``.

    Times are in ms since 1970, ``end_time`` NaN while a run goes on; ``params``, ``metrics`` (last values) and ``tags``
    are JSON texts. ``known_at`` is where finished runs are kept from one call to the next: those are not asked for
    again unless they may have changed (2.5 s for 2,000 runs on SQLite, where a search for none takes 0.01 s).
    """
    known = pd.read_parquet(known_at) if known_at and known_at.exists() else None
    if known is None or known.empty:
        runs = _table(_pages(client, experiment_id))
    else:
        newest = int(known["end_time"].max()) - CLOCK_MARGIN_MS
        changed = _pages(client, experiment_id, " AND attributes.status != 'FINISHED'")
        changed += _pages(
            client, experiment_id, f" AND attributes.status = 'FINISHED' AND attributes.end_time > {newest}"
        )
        deleted = _pages(client, experiment_id, view=ViewType.DELETED_ONLY)
        replaced = {run.info.run_id for run in [*changed, *deleted]}
        runs = pd.concat([known[~known["run_id"].isin(replaced)], _table(changed)], ignore_index=True)
    runs = runs.sort_values(["start_time", "run_id"], ignore_index=True)

    finished = runs[runs["status"] == "FINISHED"].reset_index(drop=True)
    if known_at and (known is None or not finished.equals(known)):
        save(known_at, finished)
    return runs


def _pages(
    client: mlflow.MlflowClient, experiment_id: str, condition: str = "", view: int = ViewType.ACTIVE_ONLY
) -> list[Run]:
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], f"tags.`{names.KIND}` = 'run'{condition}", view, PAGE, page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _table(runs: list[Run]) -> pd.DataFrame:
    rows = [
        (
            run.info.run_id,
            run.info.run_name,
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            run.info.artifact_uri,
            names.IMPORTED_FROM in run.data.tags,
            json.dumps(run.data.params),
            json.dumps(run.data.metrics),
            json.dumps({key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}),
        )
        for run in runs
    ]
    types = dict.fromkeys(COLUMNS, "str") | {"start_time": "float64", "end_time": "float64", "imported": "bool"}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(types)
