"""The report of a sweep: a page that needs no network, every number in it as JSON, and a CSV behind each figure."""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.records import Records
from emanalysis.tidy import UNDER_TRAINED_RULE
from emtrain.lookup import lookup, names

Arguments = Mapping[str, Mapping[str, Any]]
SHOWN = {
    "name": "run",
    "status": "status",
    "model": "model",
    "dataset": "dataset",
    "schedule": "schedule",
    "optimizer": "optimiser",
    "learning_rate": "learning rate",
    "seed": "seed",
    "total_steps": "steps",
    "heldout_loss": "held-out loss",
    "train_loss": "training loss",
    "aligned": "aligned",
    "coherent": "coherent",
    "misaligned_rate": "misaligned rate",
    "n_missing": "missing",
}
"""Columns of the run table, where the sweep has them, and their headings."""
SETTINGS = ("model", "dataset", "schedule", "optimizer", "learning_rate", "seed", "total_steps")
"""Columns left out where all runs have the same value: the top of the page has it."""
FORMS = {"learning_rate": ".3g", "heldout_loss": ".4f", "train_loss": ".4f", "aligned": ".1f", "coherent": ".1f"}
FORMS |= {"misaligned_rate": ".3f", "seed": ".0f", "total_steps": ".0f", "n_missing": ".0f"}


@dataclass(frozen=True)
class Section:
    """One analysis on the page."""

    name: str
    analysis: Analysis
    result: Result
    figures: list[Figure]


def analyses() -> dict[str, Analysis]:
    """Every analysis by name, in the report's order."""
    found = {name: lookup("emanalysis.analyses", name) for name in names("emanalysis.analyses")}
    return dict(sorted(found.items(), key=lambda item: (item[1].order, item[0])))


def compute(records: Records, *, seed: int = 0, arguments: Arguments = MappingProxyType({})) -> dict[str, Any]:
    """Every number of the report: ``sweep``, ``runs`` and the result of each analysis under its name.

    ``arguments`` are further keyword arguments of analyses by their name: ``{"better_minima": {"margin": 3.0}}``.
    """
    results = {
        name: analysis.compute(records, seed=seed, **arguments.get(name, {})) for name, analysis in analyses().items()
    }
    return plain({"sweep": overview(records), "runs": run_table(records.runs), **results})


def write(
    records: Records,
    out_dir: Path,
    *,
    title: str | None = None,
    ui_url: str | None = None,
    seed: int = 0,
    arguments: Arguments = MappingProxyType({}),
    numbers: dict[str, Any] | None = None,
) -> Path:
    """Write ``index.html``, ``report.json`` and ``tables/*.csv`` into ``out_dir``; returns the page's path.

    ``title`` None is the sweep's name. ``ui_url`` is the address of the MLflow page that runs link to; None leaves the
    links out. ``seed`` and ``arguments`` are ``compute``'s; ``numbers`` is what it returned, where it is at hand.
    """
    numbers = numbers or compute(records, seed=seed, arguments=arguments)
    sections = []
    for name, analysis in analyses().items():
        result = numbers[name]
        figures = [] if "reason" in result else analysis.figures(result)
        sections.append(Section(name, analysis, result, figures))

    (out_dir / "tables").mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, ensure_ascii=False, allow_nan=False)
    (out_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    for name, rows in tables(numbers).items():
        cells = [{_cell(column): _cell(value) for column, value in row.items()} for row in rows]
        pd.DataFrame(cells).to_csv(out_dir / "tables" / f"{name}.csv", index=False)
    page = out_dir / "index.html"
    page.write_text(render(numbers, sections, title or records.sweep, _run_address(records, ui_url)), encoding="utf-8")
    return page


def overview(records: Records) -> dict[str, Any]:
    """What the sweep was: settings, runs by status, questions, judges, responses, and scores that there are and not.

    ``responses`` counts each response once, whoever judged it; ``judged`` and ``missing`` count scores, one for each
    response and judge.
    """
    runs, questions = records.runs, records.questions
    scores = _distinct(records)
    asked = scores.drop_duplicates(_RESPONSE)
    settings = {
        column: sorted(runs[column].dropna().unique().tolist())
        for column in ("model", "family", "dataset", "schedule", "optimizer", "learning_rate", "seed", "backend")
        if column in runs
    }
    reasons = {
        column.removeprefix("missing_"): int(scores[column].sum())
        for column in scores.columns
        if column.startswith("missing_")
    }
    return {
        "name": records.sweep,
        "runs": len(runs),
        "status": runs["status"].value_counts().to_dict(),
        "under_trained": int(runs["under_trained"].sum()),
        "under_trained_rule": UNDER_TRAINED_RULE,
        "imported_from": sorted({source.partition(":")[0] for source in runs["imported_from"].dropna()}),
        "settings": settings,
        "question_sets": questions.groupby("question_set")["question_id"].nunique().to_dict(),
        "judges": sorted(questions["judge"].dropna().unique().tolist()),
        "responses": _total(asked, "n_samples"),
        "judged": _total(scores, "n_judged"),
        "missing": _total(scores, "n_missing"),
        "missing_by_reason": reasons,
        "first_start": runs["start_time"].min(),
        "last_end": runs["end_time"].max(),
    }


_RESPONSE = ["source", "step", "question_set", "question_id"]


def _distinct(records: Records) -> pd.DataFrame:
    """``records.questions`` with one row for each question, judge and ``source`` of responses: a run, or a base model.

    All runs of a model keep what it said before fine-tuning, which was sampled once: that run counts in which the judge
    gave most scores.
    """
    questions = records.questions.merge(records.runs[["run_id", "model"]], on="run_id", how="left")
    base = questions["step"] == 0
    questions["source"] = questions["run_id"].where(~base, questions["model"])
    if "n_judged" in questions:
        questions = questions.sort_values("n_judged", ascending=False, kind="stable")
    return questions.drop_duplicates([*_RESPONSE, "judge"])


def _total(table: pd.DataFrame, column: str) -> int | None:
    """The sum of a count; None where no row has one."""
    return int(table[column].sum()) if column in table and table[column].notna().any() else None


def run_table(runs: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """All runs with the columns of ``SHOWN``, settings that all runs share left out, and why runs failed."""
    shared = {name for name in SETTINGS if name in runs and runs[name].nunique(dropna=False) == 1}
    columns = [name for name in SHOWN if name in runs and name not in shared and runs[name].notna().any()]
    return runs[["run_id", *columns, "failure", "under_trained"]].to_dict("records")


def tables(numbers: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The tables in the report's numbers by file name: ``runs``, and ``<analysis>.<key>`` for lists of records."""
    found = {"runs": numbers["runs"]}
    for analysis, result in numbers.items():
        if isinstance(result, dict):
            for key, value in result.items():
                if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                    found[f"{analysis}.{key}"] = value
    return found


def _cell(value: Any) -> Any:
    """``value`` as it can stand in a CSV file: no text is a formula to a spreadsheet, or a command to a terminal."""
    if not isinstance(value, str):
        return value
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def plain(value: Any) -> Any:
    """``value`` with nothing but JSON's types: numpy and pandas values become Python's, what is not finite None."""
    match value:
        case dict():
            return {str(key): plain(inner) for key, inner in value.items()}
        case list() | tuple() | np.ndarray():
            return [plain(inner) for inner in value]
        case pd.Timestamp() | datetime():
            return None if pd.isna(value) else value.isoformat(timespec="seconds")
        case np.generic():
            return plain(value.item())
        case float():
            return value if math.isfinite(value) else None
        case _ if value is pd.NA or value is pd.NaT:
            return None
    return value


def render(numbers: dict[str, Any], sections: list[Section], title: str, run_address: str | None) -> str:
    """The page as text. Every text from outside is escaped by the template; plots are passed as data."""
    files = resources.files("emanalysis")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": _shown, "listed": _listed, "breakable": _breakable}
    template = environment.from_string((files / "report.html.j2").read_text(encoding="utf-8"))
    runs = numbers["runs"]
    return template.render(
        title=title,
        sweep=numbers["sweep"],
        runs=runs,
        columns={name: heading for name, heading in SHOWN.items() if runs and name in runs[0]},
        failed=Counter(
            run["failure"] or "no reason was recorded" for run in runs if run["status"] in ("FAILED", "KILLED")
        ),
        sections=sections,
        table_files=set(tables(numbers)),
        plots={
            f"{section.name}-{place}": json.loads(figure.plot.to_json())
            for section in sections
            for place, figure in enumerate(section.figures)
        },
        run_address=run_address,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("emsweep"),
        css=(files / "report.css").read_text(encoding="utf-8"),
        js=(files / "report.js").read_text(encoding="utf-8"),
        plotly_js=get_plotlyjs(),
    )


def _run_address(records: Records, ui_url: str | None) -> str | None:
    """The address of a run's page without the run id at its end."""
    return f"{ui_url.rstrip('/')}/#/experiments/{records.experiment_id}/runs/" if ui_url else None


def _shown(value: Any, column: str = "") -> str:
    """A table cell: a dash for what is missing, numbers in the column's format."""
    if value is None or value == "":
        return "–"
    return format(value, FORMS[column]) if column in FORMS and isinstance(value, (int, float)) else str(value)


def _breakable(name: str | None) -> Markup:
    """A name that may be broken after underscores, of which run names are made."""
    return Markup(str(escape(name or "–")).replace("_", "_<wbr>"))


def _listed(values: list[Any], most: int = 8) -> str:
    """Values in a line, those beyond ``most`` counted."""
    texts = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "") or "–"
