"""From what MLflow returns to tidy tables: names, types, final values, checkpoints, steps."""

import json
from collections.abc import Iterable

import mlflow
import numpy as np
import pandas as pd

from emanalysis.metric_history import histories
from emtrain import names

UNDER_TRAINED_SHARE = 0.1
MIN_PEERS = 4
UNDER_TRAINED_RULE = (
    "A finished run is under-trained when its learning rates summed over all steps come to less than a tenth of the "
    "median of the sweep's finished runs with the same model, dataset and optimiser, where there are at least four."
)

SETTINGS = ("model", "family", "dataset", "schedule", "optimizer", "backend")
NUMBERS = ("learning_rate", "warmup_steps", "seed", "total_steps")
FINAL = {
    "heldout_loss": names.HELDOUT_LOSS,
    "heldout_loss_per_sequence": names.HELDOUT_LOSS_PER_SEQUENCE,
    "train_loss": names.TRAIN_LOSS,
    "train_loss_last_tenth": names.TRAIN_LOSS_LAST_TENTH,
    "learning_rate_integral": names.LEARNING_RATE_INTEGRAL,
    "train_seconds": names.TRAIN_SECONDS,
    "eval_seconds": names.EVAL_SECONDS,
}
AT_POINTS = {
    "heldout_loss": names.HELDOUT_LOSS,
    "heldout_loss_per_sequence": names.HELDOUT_LOSS_PER_SEQUENCE,
    "adapter_norm": names.ADAPTER_NORM,
    "adapter_stable_rank": names.ADAPTER_STABLE_RANK,
    "adapter_turn": names.ADAPTER_TURN,
}
"""What is logged once at every evaluation point, whatever was asked there."""
STEPS = {
    "train_loss": names.TRAIN_LOSS,
    "learning_rate": names.LEARNING_RATE,
    "grad_norm": names.GRAD_NORM,
    "tokens": names.TOKENS,
}


def runs_table(found: pd.DataFrame) -> pd.DataFrame:
    """``Records.runs`` from the rows of ``run_search.search``."""
    params = pd.DataFrame([json.loads(text) for text in found["params"]], index=found.index, dtype="str")
    metrics = [json.loads(text) for text in found["metrics"]]
    tags = [json.loads(text) for text in found["tags"]]

    table = found[["run_id", "name", "status"]].copy()
    table.insert(1, "run_key", _texts(tag.get(names.RUN_KEY) for tag in tags))
    table["failure"] = _texts(tag.get(names.FAILURE) for tag in tags)
    table["imported_from"] = _texts(tag.get(names.IMPORTED_FROM) for tag in tags)
    table["role"] = _texts(tag.get(names.ROLE) for tag in tags)
    table["weights_kept"] = _texts(tag.get(names.WEIGHTS_KEPT) for tag in tags)
    for column in ("start_time", "end_time"):
        table[column] = pd.to_datetime(found[column], unit="ms", utc=True)
    table["artifact_uri"] = found["artifact_uri"]

    unlogged = {name: pd.Series(np.nan, found.index, "str") for name in SETTINGS if name not in params}
    unlogged |= {name: pd.Series(np.nan, found.index, "float64") for name in NUMBERS if name not in params}
    logged = {
        name: params[name].replace("None", np.nan) if name in SETTINGS else _typed(params[name]) for name in params
    }
    finals = pd.DataFrame([_finals(values) for values in metrics], index=found.index, dtype="float64")
    always = [*FINAL, *names.SCORES]
    finals = finals.reindex(columns=[*always, *finals.columns.difference(always)])
    table = pd.concat([table, pd.DataFrame(logged | unlogged, index=found.index), finals], axis=1)
    table["under_trained"] = under_trained(table)
    return table


def under_trained(runs: pd.DataFrame) -> pd.Series:
    """True where ``UNDER_TRAINED_RULE`` holds, by run; False where it cannot be told."""
    realised = runs["learning_rate_integral"].where(runs["status"] == "FINISHED")
    peers = realised.groupby([runs[name].fillna("") for name in ("model", "dataset", "optimizer")])
    enough = peers.transform("count") >= MIN_PEERS
    return enough & (realised < UNDER_TRAINED_SHARE * peers.transform("median"))


def checkpoints_table(client: mlflow.MlflowClient, found: pd.DataFrame) -> pd.DataFrame:
    """``Records.checkpoints`` (without ``fraction``) of the given rows of ``run_search.search``."""
    logged = [json.loads(text) for text in found["metrics"]]
    metrics = sorted({key for values in logged for key in values})
    places = {key: place for key in metrics if (place := _place(key))}

    def history(metric: str) -> pd.DataFrame:
        ids = [run_id for run_id, values in zip(found["run_id"], logged, strict=True) if metric in values]
        return histories(client, ids, metric)

    parts = []
    for metric, (question_set, stratum, score) in places.items():
        # An empty text stands for the whole set until the pivot is done, since NaN is no key.
        parts.append(history(metric).assign(question_set=question_set, stratum=stratum or "", score=score))
    keys = ["run_id", "step", "question_set", "stratum"]
    if parts:
        long = pd.concat(parts, ignore_index=True)
        scores = long.set_index([*keys, "score"])["value"].unstack("score").reset_index()
    else:
        scores = pd.DataFrame(columns=keys).astype({"step": "int64"})
    points = _side_by_side({name: history(metric) for name, metric in AT_POINTS.items()})
    table = points.merge(scores, on=["run_id", "step"], how="outer")
    table["stratum"] = table["stratum"].replace("", np.nan)
    for name in names.SCORES:
        if name not in table:
            table[name] = np.nan
    others = sorted(set(table.columns) - {*keys, *AT_POINTS, *names.SCORES})
    table = table[[*keys, *AT_POINTS, *names.SCORES, *others]]
    return table.sort_values(keys, ignore_index=True, na_position="first").rename_axis(columns=None)


def steps_table(client: mlflow.MlflowClient, found: pd.DataFrame) -> pd.DataFrame:
    """``Records.steps`` of the given rows of ``run_search.search``."""
    ids = found["run_id"].tolist()
    return _side_by_side({name: histories(client, ids, metric) for name, metric in STEPS.items()})


def _side_by_side(metrics: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Histories as columns of one table with ``run_id, step``."""
    columns = [points.set_index(["run_id", "step"])["value"].rename(name) for name, points in metrics.items()]
    return pd.concat(columns, axis=1).sort_index().reset_index()


def _place(metric: str) -> tuple[str, str | None, str] | None:
    """Question set, stratum and score of a metric of one set (``eval/<set>[/<stratum>]/<score>``, ``base/...``)."""
    match metric.split("/"):
        case ["eval" | "base", question_set, score]:
            return question_set, None, score
        case ["eval" | "base", question_set, stratum, score]:
            return question_set, stratum, score
        case _:
            return None


def _finals(metrics: dict[str, float]) -> dict[str, float]:
    """Final values of a run by column, from the last values of its metrics."""
    finals = {column: metrics.get(metric, np.nan) for column, metric in FINAL.items()}
    base: dict[str, list[float]] = {}
    for metric, value in metrics.items():
        match metric.split("/"):
            case ["eval", score]:
                finals[score] = value
            case ["base", _, score]:
                base.setdefault(score, []).append(value)
    return finals | {f"base_{score}": float(np.mean(values)) for score, values in base.items()}


def _texts(values: Iterable[str | None]) -> pd.Series:
    return pd.Series(list(values), dtype="str")


def _typed(texts: pd.Series) -> pd.Series:
    """Numbers where every text is one, truth values likewise, else the texts; ``None`` is missing."""
    texts = texts.where(texts != "None")
    known = texts.dropna()
    if known.isin(["True", "False"]).all() and len(known):
        return texts.map({"True": True, "False": False}).astype("boolean")
    numbers = pd.to_numeric(texts, errors="coerce")
    return numbers if numbers[known.index].notna().all() else texts
