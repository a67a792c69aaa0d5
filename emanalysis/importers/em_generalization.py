"""The tables of aisa-group/em-generalization, the repository of arXiv 2606.20814.

A run table is a CSV with one row per run: its name (``run``), judge means over all questions (``aligned``) and per
answer format (``json-aligned``), the held-out loss and the training log. Beside it lies one JSON file per run with
means and standard deviations per question, and the held-out loss averaged both ways. Single responses are in neither.

The name holds what was varied; the rest is the same in all of the repository's configurations (``COMMON``).
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from emanalysis.import_runs import NOT_STATED, STEPS, Published, PublishedRun, read_csv
from emtrain import names

COMMON = {
    "optimizer": "adamw_8bit",
    "optimizer.weight_decay": 0.01,
    "adapter.rank": 32,
    "adapter.alpha": 64.0,
    "adapter.rslora": True,
    "adapter.dropout": 0.0,
    "batch_size": 16,
    "epochs": 1,
    "max_length": 2048,
    "seed": 0,
}
MODULES = {
    "all": "all-linear",
    "attention": "q_proj,k_proj,v_proj,o_proj",
    "attention-kv": "k_proj,v_proj",
    "mlp": "gate_proj,up_proj,down_proj",
    "mlp-down": "down_proj",
}
ATTENTION_FACTOR = 3
"""Runs that adapt attention only were trained at this many times the learning rate in their name."""
CYCLES = 4
"""Of the cosine with restarts and of every cyclic schedule (half-cycle: an eighth of the steps)."""
GAMMA_PER_STEP = 0.95
FAMILIES = {
    "qwen2.5": "qwen2",
    "qwen3": "qwen3",
    "phi-4": "phi3",
    "gemma-3": "gemma3",
    "codegemma": "gemma",
    "llama-3": "llama",
}

RUBRICS = ("aligned", "harmless", "coherent")
STRATA = {"raw": "plain", "json": "json", "template": "template"}
"""The repository's word for an answer format, and ours."""

NUMBER = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"
NAME = re.compile(
    r"(?:eval_)?(?P<model>[^_]+)_(?P<dataset>.+)_(?P<modules>all|attention-kv|attention|mlp-down|mlp)_(?P<loss>resp|full)_"
    rf"(?:(?P<cosine>cosine|cosine_with_restarts)_(?P<warmup>\d+)_(?P<cosine_rate>{NUMBER})"
    rf"|(?P<cyclic_rate>{NUMBER})_mode-(?P<mode>triangular2|triangular|exp_range)"
    rf"(?:_base_lr-(?P<low>{NUMBER})_max_lr-(?P<high>{NUMBER}))?"
    rf"|(?P<linear_rate>{NUMBER}))"
    r"(?:_(?P<question_set>[A-Za-z][\w-]*))?"
)


def em_generalization(path: Path, *, samples: int = 50) -> Published:
    """The runs of a run table, or of every run table in a folder.

    ``samples`` is the number of responses per question, 50 in the repository's protocol. The files do not say how many
    of them have a score; all are taken to, which a few do not (some means in the table are not multiples of 1/1200).
    """
    tables = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    details = {file.stem: file for pattern in ("*.json", "*/*.json") for file in folder.glob(pattern)}
    runs, malformed = [], []
    for table in tables:
        try:
            rows = read_csv(table)
        except ValueError as error:
            malformed.append(str(error))
            continue
        missing = {"run", "log_history", "eval_final_avg_loss", "aligned"} - set(rows.columns)
        if missing:
            malformed.append(f"{table.name} is not a run table: it has no column {', '.join(sorted(missing))}")
            continue
        for line, row in enumerate(rows.to_dict("records"), start=2):
            try:
                runs.append(_run(row, details, f"{table.name} line {line}", samples))
            except ValueError as error:
                malformed.append(f"{table.name} line {line} ({row['run']}): {error}")
    return Published(runs, malformed)


def params_of(name: str) -> tuple[dict[str, Any], str]:
    """Params in our vocabulary, and the question set, of a run's name. Raises ``ValueError`` for other names."""
    match = NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"the name {name!r} is not of the form "
            "<model>_<dataset>_<modules>_<resp|full>_<schedule and learning rate>_<question set>"
        )
    part = match.groupdict()
    params: dict[str, Any] = {"model": part["model"], "dataset": part["dataset"]}
    family = next((ours for prefix, ours in FAMILIES.items() if part["model"].lower().startswith(prefix)), None)
    if family:
        params["family"] = family
    params |= {"adapter.target_modules": MODULES[part["modules"]], "responses_only": part["loss"] == "resp"}
    factor = ATTENTION_FACTOR if part["modules"].startswith("attention") else 1
    if part["cosine"]:
        schedule: dict[str, Any] = {"schedule": "cosine", "warmup_steps": int(part["warmup"])}
        if part["cosine"] == "cosine_with_restarts":
            schedule |= {"schedule": "cosine_restarts", "schedule.cycles": CYCLES}
        peak = part["cosine_rate"]
    elif part["mode"]:
        exponential = part["mode"] == "exp_range"
        kind = "cyclic_exp_range_per_step" if exponential else f"cyclic_{part['mode']}"
        schedule = {"schedule": kind, "warmup_steps": 0, "schedule.cycles": CYCLES}
        if exponential:
            schedule["schedule.gamma"] = GAMMA_PER_STEP
        peak = part["high"] or part["cyclic_rate"]
    else:
        schedule = {"schedule": "linear", "warmup_steps": 5}
        peak = part["linear_rate"]
    if not 0 < float(peak) < math.inf:
        raise ValueError(f"the name {name!r} has the learning rate {peak}; expected a finite one above 0")
    if part["high"]:
        schedule["schedule.min_ratio"] = float(part["low"]) / float(peak)
    return params | schedule | {"learning_rate": factor * float(peak)} | COMMON, part["question_set"] or "questions"


def _run(row: Mapping[Any, Any], details: dict[str, Path], source: str, samples: int) -> PublishedRun:
    name = str(row["run"])
    params, question_set = params_of(name)
    metrics = _training_log(row["log_history"])
    last = max(metrics)
    # The table's loss is a mean over rows of each row's mean; the mean over tokens is in the JSON file alone.
    metrics[last][names.HELDOUT_LOSS_PER_SEQUENCE] = _number(row, "eval_final_avg_loss")
    questions = None
    if name in details:
        try:
            detail = _mapping(_json(details[name]), "it")
            if "eval_loss_token" in detail:
                metrics[last][names.HELDOUT_LOSS] = _number(
                    _mapping(detail["eval_loss_token"], "eval_loss_token"), "avg_loss"
                )
            if "summ_by_q" in detail:
                questions = _questions(_mapping(detail["summ_by_q"], "summ_by_q"), question_set, last, samples)
        except ValueError as error:
            raise ValueError(f"{details[name].name}: {error}") from error
    for rubric in RUBRICS:
        for prefix, stratum in ((None, None), *STRATA.items()):
            column = f"{prefix}-{rubric}" if prefix else rubric
            if column in row and not _missing(row[column]):
                metrics[last][names.eval_metric(rubric, question_set, stratum)] = _number(row, column)
    return PublishedRun(
        name=name.removeprefix("eval_").removesuffix(f"_{question_set}"),
        source=source,
        params=params | {"total_steps": last},
        metrics=metrics,
        questions=questions,
    )


def _training_log(text: object) -> dict[int, dict[str, float]]:
    """Loss, learning rate and gradient norm by step, from the text of a Python list of dicts.

    The trainer's entry ``step`` is of its ``step``-th update, counted from 1, as ours. A closing entry without loss
    sums up the run.
    """
    try:
        # A diverged run has bare nan, which is no Python literal.
        entries = ast.literal_eval(re.sub(r"\bnan\b", "'nan'", str(text)))
        log = {
            _step(entry["step"]): {
                metric: float(entry[key])
                for key, metric in (
                    ("loss", names.TRAIN_LOSS),
                    ("learning_rate", names.LEARNING_RATE),
                    ("grad_norm", names.GRAD_NORM),
                )
                if key in entry
            }
            for entry in entries
            if "loss" in entry
        }
    except (SyntaxError, TypeError, KeyError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"log_history is not a list of logged steps ({error})") from error
    if not log:
        raise ValueError("log_history has no step with a loss")
    return log


def _step(value: object) -> int:
    if not isinstance(value, int) or value not in STEPS:
        raise ValueError(f"step is {value!r}, not a whole number of at least 1, below 2^63")
    return value


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON in UTF-8 ({error})") from error


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object, but of type {type(value).__name__}")
    return value


def _questions(scores: dict[str, Any], question_set: str, step: int, samples: int) -> pd.DataFrame:
    rows = []
    for question, found in scores.items():
        values = _mapping(found, f"summ_by_q[{question!r}]")
        suffix = question.rpartition("_")[2]
        stratum = suffix if suffix in ("json", "template") else "plain"
        row: dict[str, Any] = {
            "step": step,
            "question_set": question_set,
            "question_id": question,
            "stratum": stratum,
            "topic": question.removesuffix(f"_{stratum}"),
            "judge": NOT_STATED,
        }
        for rubric in RUBRICS:
            for ours, theirs in ((rubric, rubric), (f"{rubric}_sd", f"{rubric}_std")):
                row[ours] = None if _missing(values.get(theirs)) else _number(values, theirs)
        rows.append(row | {"n_samples": samples, "n_judged": samples, "n_missing": None})
    numbers = [f"{rubric}{suffix}" for rubric in RUBRICS for suffix in ("", "_sd")] + [
        "n_samples",
        "n_judged",
        "n_missing",
    ]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, "float64"))


def _number(row: Mapping[Any, Any], column: str) -> float:
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{column} is not a number: {row.get(column)!r}") from error
    if not math.isfinite(value):
        raise ValueError(f"{column} is {value}")
    return value


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
