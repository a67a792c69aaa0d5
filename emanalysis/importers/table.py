"""Any CSV with one row per run, and which of its columns are what."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emanalysis.import_runs import STEPS, Published, PublishedRun, read_csv
from emtrain import names

LOSSES = {
    "heldout_loss": names.HELDOUT_LOSS,
    "heldout_loss_per_sequence": names.HELDOUT_LOSS_PER_SEQUENCE,
    "train_loss": names.TRAIN_LOSS,
    "train_loss_last_tenth": names.TRAIN_LOSS_LAST_TENTH,
    "learning_rate_integral": names.LEARNING_RATE_INTEGRAL,
}


def table(path: Path, *, columns: Mapping[str, str] | None = None, question_set: str = "table") -> Published:
    """One run per row.

    ``columns`` maps our names to the file's: ``{"heldout_loss": "val_loss", "aligned": "score", "model": "base"}``; a
    column that has our name already needs no entry. Our names: ``name``, the losses of ``LOSSES``, the scores of
    ``names.SCORES`` (which belong to ``question_set``), and any param (``model, dataset, schedule, learning_rate, seed,
    total_steps`` ...). Params must be named in ``columns`` or be among those; other columns of the file are left out.
    Raises ``ValueError`` for a column that the file does not have, and for a directory.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; the format table is one CSV file")
    rows = read_csv(path)
    wanted = {ours: ours for ours in (*LOSSES, *names.SCORES, "name", *PARAMS) if ours in rows} | dict(columns or {})
    absent = sorted(theirs for theirs in wanted.values() if theirs not in rows)
    if absent:
        raise ValueError(f"{path.name} has no column {', '.join(absent)}; it has: {', '.join(map(str, rows.columns))}")
    if not set(names.SCORES[:3]) & set(wanted):
        raise ValueError(f"{path.name}: no column is mapped to aligned, coherent or misaligned_rate")

    runs, malformed = [], []
    for line, row in enumerate(rows.to_dict("records"), start=2):
        try:
            runs.append(_run({ours: row[theirs] for ours, theirs in wanted.items()}, line, path.name, question_set))
        except ValueError as error:
            malformed.append(f"{path.name} line {line}: {error}")
    return Published(runs, malformed)


PARAMS = (
    "model", "family", "dataset", "schedule", "optimizer", "learning_rate", "warmup_steps", "seed", "batch_size",
    "total_steps",
)  # fmt: skip


def _run(row: dict[str, Any], line: int, file: str, question_set: str) -> PublishedRun:
    values, params = {}, {}
    for ours, value in row.items():
        metric = LOSSES.get(ours) or (names.eval_metric(ours, question_set) if ours in names.SCORES else None)
        if value is None or value != value:
            continue
        if metric:
            values[metric] = _finite(ours, value)
        elif ours != "name":
            params[ours] = int(value) if isinstance(value, float) and value.is_integer() else value
    if not values:
        raise ValueError("it has neither a loss nor a score")
    step = params.get("total_steps", 1)
    if not isinstance(step, int) or step not in STEPS:
        raise ValueError(f"total_steps is {step!r}, not a whole number of at least 1, below 2^63")
    name = row.get("name")
    return PublishedRun(
        name=str(name) if name == name and name is not None else f"{Path(file).stem} line {line}",
        source=f"{file} line {line}",
        params=params,
        metrics={step: values},
    )


def _finite(ours: str, value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as error:
        raise ValueError(f"{ours} is not a number: {value!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"{ours} is {number}")
    return number
