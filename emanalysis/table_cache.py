"""Tables read from MLflow, kept in Parquet; a run's rows are read again only when the run has changed."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

KNOWN = b"emsweep.runs"


def cached(path: Path | None, runs: pd.DataFrame, read: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """The rows of ``runs`` in a table: those that ``path`` holds, and ``read(runs it does not hold)``.

    ``runs`` has ``run_id`` and ``end_time`` (ms since 1970, NaN while a run goes on). The file lists its runs with the
    end time each had; a run that goes on, or has ended anew, is read. ``path`` None reads all.
    """
    ended = dict(zip(runs["run_id"], runs["end_time"], strict=True))
    kept, known = _load(path) if path and path.exists() else (pd.DataFrame(), {})
    current = {run_id for run_id, time in known.items() if ended.get(run_id) == time}
    rest = runs[~runs["run_id"].isin(current)]
    if current:
        kept = kept[kept["run_id"].isin(current)].reset_index(drop=True)
        if rest.empty:
            return kept
    table = read(rest)
    if current:
        table = pd.concat([part for part in (kept, table) if len(part)] or [table], ignore_index=True)
    if path:
        final = {run_id: time for run_id, time in ended.items() if time == time}
        save(path, table[table["run_id"].isin(final)], final)
    return table


def save(path: Path, table: pd.DataFrame, runs: dict[str, float] | None = None) -> None:
    """Write a Parquet file that is there whole or not at all, with the end times of the ``runs`` it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = pa.Table.from_pandas(table, preserve_index=False)
    stored = stored.replace_schema_metadata({**(stored.schema.metadata or {}), KNOWN: json.dumps(runs or {}).encode()})
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as unfinished:
        pq.write_table(stored, unfinished)
    Path(unfinished.name).replace(path)


def _load(path: Path) -> tuple[pd.DataFrame, dict[str, float]]:
    table = pq.read_table(path)
    return table.to_pandas(), json.loads(table.schema.metadata[KNOWN])
