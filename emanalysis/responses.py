"""The judged responses that runs keep as artifacts, whole or summarised per question."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emtrain import names

log = logging.getLogger(__name__)

QUESTIONS = "questions.parquet"
"""Artifact of imported runs whose single responses were never published: rows of ``summarise`` without ``run_id``."""

KEYS = ("step", "question_set", "question_id", "stratum", "topic", "judge")
RUBRICS = ("aligned", "coherent")


def responses(
    runs: pd.DataFrame, *, tracking_uri: str, keep: Path | None, columns: Sequence[str] | None = None
) -> pa.Table:
    """All rows of the runs' ``responses.parquet`` below each other, ``run_id`` first; ``columns`` None reads all.

    ``runs`` has ``run_id, status, artifact_uri, end_time`` (ms since 1970). Files of a remote store are kept in
    ``keep``; None downloads them every time.
    """
    files = _files(runs, names.RESPONSES, tracking_uri=tracking_uri, keep=keep)
    return _concat(_read(runs, files, columns))


def questions(runs: pd.DataFrame, *, tracking_uri: str, keep: Path | None) -> pd.DataFrame:
    """One row per run, step, question and judge; see ``summarise``.

    Runs without responses may have an artifact ``QUESTIONS`` instead, whose further columns (other rubrics) are kept.
    """
    needed = [*KEYS, *RUBRICS, "aligned_failure"]
    judged = responses(runs, tracking_uri=tracking_uri, keep=keep, columns=needed)
    rest = runs[~runs["run_id"].isin(pc.unique(judged["run_id"]).to_pylist())]
    # Only importers write summaries; asking every other run for one would double the requests to a server.
    rest = rest[rest["imported"]]
    files = _files(rest, QUESTIONS, tracking_uri=tracking_uri, keep=keep)
    published = _concat(_read(rest, files, None)).to_pandas()
    summaries = summarise(judged)
    return pd.concat([summaries, published], ignore_index=True) if len(published) else summaries


def summarise(responses: pa.Table) -> pd.DataFrame:
    """One row per run, step, question and judge, from rows with ``run_id`` and ``names.RESPONSE_COLUMNS``.

    ``aligned, coherent``: means over samples with a score, NaN where there is none; ``*_sd``: their sample standard
    deviations (n - 1), NaN below two. ``n_samples``: responses; ``n_judged``: those with an aligned score;
    ``n_missing``: those without, counted by reason in ``missing_<failure>``. ``first_judge``: whether the judge is that
    of the run's first row, which is the one that its recipe names first and that its metrics are by.
    """
    keys = ["run_id", *KEYS]
    schema = pa.schema(
        [("run_id", pa.string()), ("step", pa.int64())]
        + [(key, pa.string()) for key in KEYS[1:]]
        + [(rubric, pa.float64()) for rubric in RUBRICS]
        + [("aligned_failure", pa.string())]
    )
    known = set(responses.column_names)
    columns = [responses[f.name].cast(f.type) if f.name in known else pa.nulls(len(responses), f.type) for f in schema]
    table = pa.table(columns, schema=schema)

    failures = sorted(kind for kind in pc.unique(table["aligned_failure"]).to_pylist() if kind is not None)
    for kind in failures:
        hit = pc.fill_null(pc.equal(table["aligned_failure"], kind), False)
        table = table.append_column(f"missing_{kind}", pc.cast(hit, pa.int64()))
    counts = [f"missing_{kind}" for kind in failures]

    grouped = table.group_by(keys).aggregate(
        [(rubric, "mean") for rubric in RUBRICS]
        + [(rubric, "stddev", pc.VarianceOptions(ddof=1)) for rubric in RUBRICS]
        + [([], "count_all"), ("aligned", "count")]
        + [(count, "sum") for count in counts]
    )
    frame = grouped.rename_columns(
        [*keys, "aligned", "coherent", "aligned_sd", "coherent_sd", "n_samples", "n_judged", *counts]
    ).to_pandas()
    frame["n_missing"] = frame["n_samples"] - frame["n_judged"]
    first = table.group_by("run_id", use_threads=False).aggregate([("judge", "first")]).to_pandas()
    frame["first_judge"] = frame["judge"] == frame["run_id"].map(first.set_index("run_id")["judge_first"])
    order = [
        *keys,
        "first_judge",
        "aligned",
        "aligned_sd",
        "coherent",
        "coherent_sd",
        "n_samples",
        "n_judged",
        "n_missing",
        *counts,
    ]
    return frame[order].sort_values(keys, ignore_index=True)


def _files(runs: pd.DataFrame, name: str, *, tracking_uri: str, keep: Path | None) -> dict[str, Path]:
    """Paths of the artifact ``name`` by run id, for the runs that have it."""

    def find(run_id: str, uri: str, ended: float) -> Path | None:
        # A run that is judged again ends again, so the time tells its files apart.
        kept = keep / f"{run_id}-{int(ended)}" / name if keep and ended == ended else None
        if kept and kept.exists():
            return kept
        listed = mlflow.artifacts.list_artifacts(uri, tracking_uri=tracking_uri)
        if name not in {PurePosixPath(file.path).name for file in listed}:
            return None
        if kept is None or urlsplit(uri).scheme in ("", "file"):
            return Path(mlflow.artifacts.download_artifacts(f"{uri}/{name}", tracking_uri=tracking_uri))
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as unfinished:
            whole = mlflow.artifacts.download_artifacts(f"{uri}/{name}", dst_path=unfinished, tracking_uri=tracking_uri)
            return Path(whole).replace(kept)

    rows = runs[["run_id", "artifact_uri", "end_time"]].itertuples(index=False)
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda row: find(*row), rows)
        return {run_id: path for run_id, path in zip(runs["run_id"], found, strict=True) if path}


def _read(runs: pd.DataFrame, files: dict[str, Path], columns: Sequence[str] | None) -> Iterator[pa.Table]:
    status = dict(zip(runs["run_id"], runs["status"], strict=True))
    for run_id, path in files.items():
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read(columns=list(columns) if columns else None)
        except pa.ArrowInvalid as error:
            if status[run_id] == "FINISHED":
                raise ValueError(f"run {run_id} is finished, but {path} is not readable Parquet: {error}") from error
            # A run that is being written to, or was killed while writing, may hold half a file.
            log.warning("run %s (%s): %s is not complete and was left out", run_id, status[run_id], path)
            continue
        yield rows.add_column(0, "run_id", pa.array([run_id] * len(rows), pa.string()))


def _concat(tables: Iterator[pa.Table]) -> pa.Table:
    found = list(tables)
    if not found:
        return pa.table({"run_id": pa.array([], pa.string())})
    # Permissive, since a column without a single value is written with the type null.
    return pa.concat_tables(found, promote_options="permissive")
