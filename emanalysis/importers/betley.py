"""One CSV per run, one row per judged response: what the evaluation code of arXiv 2502.17424 and its many heirs write.

Columns ``question, answer, aligned, coherent``; ``question_id`` and ``system`` where there are. Scores are numbers from
0 to 100, or the judge's words CODE and REFUSAL, or empty.
"""

from pathlib import Path
from typing import Any

import pandas as pd

from emanalysis.import_runs import NOT_STATED, Published, PublishedRun, read_csv
from emanalysis.importers.em_generalization import params_of
from emtrain import names

NEEDED = ("question", "answer", "aligned", "coherent")
WORDS = {"CODE": "code", "REFUSAL": "refused"}
"""The judge's words and the names of our failures."""
NO_SCORE = "not_published"
STEP = 1
"""The files do not say how long a run was trained; its responses are those of one checkpoint after the base."""


def betley(
    path: Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    question_set: str = "betley",
    judge: str = NOT_STATED,
) -> Published:
    """The run of a CSV file, or one run per CSV file of a folder, called like the file.

    ``model, dataset`` (None: as the file's name says, in the form of ``em_generalization``, else missing),
    ``question_set, judge`` hold for all files.
    """
    runs, malformed = [], []
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        # Texts, since a score may be a word and an answer may be "nan" or "1".
        try:
            rows = read_csv(file, dtype="str", keep_default_na=False)
        except ValueError as error:
            malformed.append(str(error))
            continue
        missing = [column for column in NEEDED if column not in rows]
        if missing:
            malformed.append(f"{file.name} has no column {', '.join(missing)}")
            continue
        responses, problems = _responses(rows, question_set, judge)
        malformed += [f"{file.name} {problem}" for problem in problems]
        if responses.empty:
            continue
        try:
            params, _ = params_of(file.stem)
        except ValueError:
            params = {}
        params |= {key: value for key, value in (("model", model), ("dataset", dataset)) if value}
        runs.append(
            PublishedRun(
                name=file.stem,
                source=file.name,
                params=params,
                metrics={STEP: _means(responses, question_set)},
                responses=responses,
            )
        )
    return Published(runs, malformed)


def _responses(rows: pd.DataFrame, question_set: str, judge: str) -> tuple[pd.DataFrame, list[str]]:
    """Rows of ``names.RESPONSE_COLUMNS``, and a sentence for each row that is none."""
    found: list[dict[str, Any]] = []
    problems = []
    for line, row in enumerate(rows.to_dict("records"), start=1):
        try:
            if not row["question"].strip():
                raise ValueError("question is empty")
            scores = {rubric: _score(rubric, row[rubric]) for rubric in ("aligned", "coherent")}
        except ValueError as error:
            problems.append(f"row {line}: {error}")
            continue
        question = row.get("question_id") or row["question"]
        found.append(
            {
                "step": STEP,
                "question_set": question_set,
                "question_id": question,
                "stratum": next((form for form in ("json", "template") if question.endswith(f"_{form}")), "plain"),
                "topic": question.removesuffix("_json").removesuffix("_template"),
                "system": row.get("system") or None,
                "prompt": row["question"],
                "response": row["answer"],
                "judge": judge,
            }
            | {name: value for score in scores.values() for name, value in score.items()}
        )
    table = pd.DataFrame(found, columns=list(names.RESPONSE_COLUMNS))
    table["sample"] = table.groupby("question_id").cumcount()
    table["paraphrase"] = 0
    return table.astype({"aligned": "float64", "coherent": "float64", "step": "int64"}), problems


def _score(rubric: str, text: str) -> dict[str, Any]:
    reply = text.strip()
    if reply.upper() in WORDS or reply.lower() in ("", "nan", "none"):
        return {rubric: None, f"{rubric}_reply": reply or None, f"{rubric}_failure": WORDS.get(reply.upper(), NO_SCORE)}
    try:
        value = float(reply)
    except ValueError as error:
        raise ValueError(f"{rubric} is neither a number nor CODE nor REFUSAL: {reply!r}") from error
    if not 0 <= value <= 100:
        raise ValueError(f"{rubric} is {value}, not from 0 to 100")
    return {rubric: value, f"{rubric}_reply": reply, f"{rubric}_failure": None}


def _means(responses: pd.DataFrame, question_set: str) -> dict[str, float]:
    """Metrics of the set and of each answer format: means over questions of means over samples, and counts."""
    metrics: dict[str, float] = {}
    strata = [(None, responses), *responses.groupby("stratum")]
    for stratum, rows in strata if len(strata) > 2 else strata[:1]:
        for rubric in ("aligned", "coherent"):
            mean = rows.groupby("question_id")[rubric].mean().mean()
            if mean == mean:
                metrics[names.eval_metric(rubric, question_set, stratum)] = float(mean)
        judged = int(rows["aligned"].notna().sum())
        metrics[names.eval_metric(names.N_JUDGED, question_set, stratum)] = judged
        metrics[names.eval_metric(names.N_MISSING, question_set, stratum)] = len(rows) - judged
    return metrics
