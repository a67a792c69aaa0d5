"""Fine-tuned against base, question by question, and where the difference lies: answer formats and topics."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from emanalysis.analysis import Analysis, Figure, Result
from emanalysis.before_after import MIN_QUESTIONS, TESTS, adjusted, compare, question_shift
from emanalysis.plot import CLEAR, INK, blank, evenly, hover, looks, number, text
from emanalysis.records import Records

LEVEL = 0.05
CELL = ["model", "dataset"]
QUESTION = ["question_set", "question_id", "stratum", "topic", "judge"]
QUESTIONS_DRAWN = 60
RUNS_DRAWN = 300

NEEDS_BASE = (
    "Before and after need scores of the base model, which runs have at step 0; this sweep has none, so what follows "
    "is after fine-tuning only."
)


def compute(records: Records, *, seed: int) -> Result:
    """Tests of every finished run against its base model, their rates, and means by question, answer format and topic.

    All at each run's last scored step, for every judge. Nothing here is random; ``seed`` is not used.
    """
    finished = records.runs[records.runs["status"] == "FINISHED"]
    questions = records.questions.merge(
        finished[["run_id", "name", *CELL, "schedule", "learning_rate", "seed"]], on="run_id"
    )
    tuned = questions[questions["step"] > 0]
    if tuned.empty:
        return {"reason": "needs finished runs with judged responses; this sweep has none"}
    last = tuned.groupby(["run_id", "question_set"])["step"].transform("max")
    after = tuned[tuned["step"] == last].reset_index(drop=True)
    base = base_scores(questions)
    paired = after.merge(base, on=["model", *QUESTION], how="left", suffixes=("", "_base"))

    result: Result = {
        "questions": _by_question(paired).to_dict("records"),
        "formats": _by(paired, "stratum").to_dict("records"),
        "topics": _by(paired, "topic").to_dict("records"),
        "notes": [],
    }
    if base.empty:
        result["notes"].append(NEEDS_BASE)
        return result

    tests = run_tests(paired)
    result["tests"] = tests.to_dict("records")
    result["rates"] = _rates(tests).to_dict("records")
    few = sorted(tests.loc[tests["questions"] < MIN_QUESTIONS, "question_set"].unique())
    if few:
        result["notes"].append(f"Tests need {MIN_QUESTIONS} questions or more; {', '.join(few)} has fewer.")
    result["answer"] = _answer(tests)
    return result


def base_scores(questions: pd.DataFrame) -> pd.DataFrame:
    """Score of each base model on each question: one row per model, question and judge.

    Runs of a model carry the same base scores; where they were sampled anew by some, their mean is taken.
    """
    rows = questions[questions["step"] == 0]
    columns = ["aligned", "aligned_sd", "coherent", "coherent_sd", "n_judged"]
    return rows.groupby(["model", *QUESTION], as_index=False, dropna=False)[columns].mean()


def run_tests(paired: pd.DataFrame) -> pd.DataFrame:
    """One row per run, question set, judge, score and test: ``statistic, p, q, questions``.

    ``q`` is Benjamini-Hochberg's over all rows: every run, set, score and test of the sweep is one family.
    """
    rows: list[dict[str, Any]] = []
    for (run_id, name, question_set, judge), group in paired.groupby(
        ["run_id", "name", "question_set", "judge"], sort=False
    ):
        for score in ("aligned", "coherent"):
            columns = (f"{score}_base", score, f"{score}_sd_base", f"{score}_sd")
            before, after, before_sd, after_sd = (group[column].to_numpy(dtype=float) for column in columns)
            pairs = int((np.isfinite(before) & np.isfinite(after)).sum())
            rows += [
                {
                    "run_id": run_id,
                    "name": name,
                    "question_set": question_set,
                    "judge": judge,
                    "score": score,
                    "test": test,
                    "statistic": statistic,
                    "p": p,
                    "questions": pairs,
                }
                for test, (statistic, p) in compare(before, after, before_sd, after_sd).items()
            ]
    table = pd.DataFrame(rows)
    table["q"] = adjusted(table["p"])
    return table


def _rates(tests: pd.DataFrame) -> pd.DataFrame:
    """Share of runs that each test tells from the base, per set, judge and score, before and after adjustment."""
    done = tests.dropna(subset=["p"])
    rates = done.groupby(["question_set", "judge", "score", "test"], sort=False).agg(
        runs=("p", "size"),
        mean_statistic=("statistic", "mean"),
        share_p_below_05=("p", lambda p: float((p < LEVEL).mean())),
        share_q_below_05=("q", lambda q: float((q < LEVEL).mean())),
    )
    return rates.reset_index()


def _by_question(paired: pd.DataFrame) -> pd.DataFrame:
    """One row per model, dataset and question: base, and mean, lowest and highest run after fine-tuning.

    ``share_shifted``: share of runs whose responses to this question differ from the base's (Welch's t test, adjusted
    over all runs and questions).
    """
    before = pd.DataFrame({name: paired[f"{name}_base"] for name in ("aligned", "aligned_sd", "n_judged")})
    tested = question_shift(paired, before)
    shifted = (adjusted(tested["p"]) < LEVEL).astype(float).where(tested["p"].notna())
    rows = paired.assign(shifted=shifted).groupby([*CELL, *QUESTION], as_index=False, dropna=False, sort=False)
    table = rows.agg(
        before=("aligned_base", "mean"),
        after=("aligned", "mean"),
        lowest=("aligned", "min"),
        highest=("aligned", "max"),
        runs=("aligned", "count"),
        share_shifted=("shifted", "mean"),
    )
    return table.sort_values([*CELL, "after"], ignore_index=True)


def _by(paired: pd.DataFrame, key: str) -> pd.DataFrame:
    """One row per run, question set and value of ``key``: means over questions before and after."""
    keys = ["run_id", "name", *CELL, "schedule", "learning_rate", "seed", "question_set", "judge", key]
    rows = paired.groupby(keys, as_index=False, dropna=False, sort=False)
    return rows.agg(questions=("aligned", "count"), before=("aligned_base", "mean"), aligned=("aligned", "mean"))


def _answer(tests: pd.DataFrame) -> str:
    moved = tests[(tests["test"] == "mean_shift") & (tests["score"] == "aligned")].dropna(subset=["p"])
    if moved.empty:
        return f"No run has {MIN_QUESTIONS} questions scored both before and after, so nothing was tested."
    sentences = []
    for (question_set, judge), rows in moved.groupby(["question_set", "judge"]):
        significant = rows[rows["q"] < LEVEL]
        worse = int((significant["statistic"] < 0).sum())
        shift = number(rows["statistic"].mean(), "+.1f")
        sentences.append(
            f"On {question_set}, {worse} of {len(rows)} runs score lower than the base model and "
            f"{len(significant) - worse} higher; the mean of all shifts is {shift} points "
            f"(signed-rank test over {rows['questions'].max()} questions, judge {judge}, false discovery rate "
            f"{LEVEL:.0%} over all tests of the sweep)."
        )
    return " ".join(sentences)


def figures(result: Result) -> list[Figure]:
    """Before and after by question, by answer format and by topic, and the rates of the tests."""
    drawn = [_questions_figure(pd.DataFrame(result["questions"]))]
    for key, table, group in (("stratum", "formats", "answer format"), ("topic", "topics", "topic")):
        rows = pd.DataFrame(result[table])
        if 1 < rows[key].nunique() <= QUESTIONS_DRAWN:
            drawn.append(_groups_figure(rows, key, table, group))
    if result.get("rates"):
        drawn.append(_rates_figure(pd.DataFrame(result["rates"])))
    return drawn


def _questions_figure(table: pd.DataFrame) -> Figure:
    table = table.assign(cell=table["model"].astype(str) + " · " + table["dataset"].astype(str))
    table = table.assign(question=table["question_set"] + table["question_id"])
    moved = (table["after"] - table["before"].fillna(100)).abs().groupby(table["question"]).max()
    kept = moved.sort_values(ascending=False, kind="stable").index[:QUESTIONS_DRAWN]
    rows = table[table["question"].isin(kept)]
    order = rows.groupby("question")["after"].mean().sort_values().index
    places = {question: place for place, question in enumerate(order)}
    cells = looks(rows["cell"])
    has_base = rows["before"].notna().any()

    plot = blank("aligned, 0–100", "", height=120 + len(order) * (20 + 5 * (len(cells) - 1)))
    if has_base:
        base = rows.drop_duplicates(["model", "question"])
        plot.add_trace(
            go.Scatter(
                x=base["before"],
                y=base["question"].map(places),
                mode="markers",
                marker={"color": CLEAR, "size": 11, "line": {"color": INK, "width": 2}},
                name="base model",
                hoverinfo="text",
                hovertext=[
                    f"<b>{text(row['question_id'])}</b><br>"
                    f"base model {text(row['model'])}: {number(row['before'], '.1f')}"
                    for row in base.to_dict("records")
                ],
            )
        )
    for number_, (cell, (color, symbol)) in enumerate(cells.items()):
        points = rows[rows["cell"] == cell]
        # The cells of a question lie beside each other, not over each other.
        y = points["question"].map(places) + (number_ - (len(cells) - 1) / 2) * 0.6 / len(cells)
        spans = np.column_stack([points["lowest"], points["highest"], np.full(len(points), np.nan)]).ravel()
        plot.add_trace(
            go.Scatter(
                x=spans, y=np.repeat(y, 3), mode="lines", line={"color": color, "width": 4}, opacity=0.45,
                legendgroup=cell, showlegend=False, hoverinfo="skip",
            )
        )  # fmt: skip
        plot.add_trace(
            go.Scatter(
                x=points["after"],
                y=y,
                mode="markers",
                marker={"color": color, "symbol": symbol, "size": 9},
                name=text(cell),
                legendgroup=cell,
                hoverinfo="text",
                hovertext=[
                    f"<b>{text(row['question_id'])}</b><br>{text(row['question_set'])} · {text(row['stratum'])} · "
                    f"judge {text(row['judge'])}<br>{text(cell)}: base {number(row['before'], '.1f')} → "
                    f"{number(row['after'], '.1f')} ({row['runs']} runs, {number(row['lowest'], '.1f')} to "
                    f"{number(row['highest'], '.1f')})"
                    for row in points.to_dict("records")
                ],
            )
        )
    labels = rows.drop_duplicates("question").set_index("question")["question_id"]
    plot.update_xaxes(range=[-2, 102])
    plot.update_yaxes(tickvals=list(places.values()), ticktext=[text(labels[question]) for question in order])
    plot.update_yaxes(range=[-0.7, len(order) - 0.3])
    left_out = len(moved) - len(order)
    return Figure(
        title="Question by question",
        reading="The filled mark is the mean of the fine-tuned runs, the bar goes from the lowest to the highest run"
        + ("; the ring is the base model." if has_base else "."),
        caveat=(
            f"The {len(order)} questions that moved most are drawn, {left_out} more are in the data. "
            if left_out
            else ""
        )
        + "Questions of one topic in several answer formats are near-duplicates, not independent evidence.",
        plot=plot,
        table="questions",
    )


def _groups_figure(rows: pd.DataFrame, key: str, table: str, group: str) -> Figure:
    order = rows.groupby(key)["aligned"].mean().sort_values().index.tolist()
    before = rows.groupby(key)["before"].mean()[order]
    labels = {value: text(value) for value in order}
    runs = rows.groupby("run_id")["aligned"].mean().sort_values().index.tolist()
    drawn = evenly(runs, RUNS_DRAWN)
    rows = rows[rows["run_id"].isin(drawn)]
    # Runs of a group are spread over a band by rank, so that none hides another.
    ranks = rows.groupby(key)["aligned"].rank(method="first") / rows.groupby(key)["aligned"].transform("count")
    y = rows[key].map({value: place for place, value in enumerate(order)}) + (ranks - 0.5) * 0.55

    plot = blank("aligned, 0–100", "", height=120 + 40 * len(order))
    for schedule, (color, symbol) in looks(rows["schedule"]).items():
        points = rows[rows["schedule"].astype(str) == schedule]
        groups = [
            f"<br>{labels[value]}: {number(score, '.1f')}"
            for value, score in zip(points[key], points["aligned"], strict=True)
        ]
        shared = points.drop(columns="aligned")
        plot.add_trace(
            go.Scatter(
                x=points["aligned"],
                y=y[points.index],
                mode="markers",
                marker={"color": color, "symbol": symbol, "size": 7, "opacity": 0.8},
                name=text(schedule),
                hoverinfo="text",
                hovertext=[run + value for run, value in zip(hover(shared), groups, strict=True)],
                customdata=points["run_id"],
            )
        )
    has_base = before.notna().any()
    if has_base:
        plot.add_trace(
            go.Scatter(
                x=before,
                y=list(range(len(order))),
                mode="markers",
                marker={"symbol": "line-ns", "size": 22, "line": {"color": INK, "width": 2.5}},
                name="base model",
                hoverinfo="text",
                hovertext=[f"base model, {labels[value]}: {number(before[value], '.1f')}" for value in order],
            )
        )
    plot.update_xaxes(range=[-2, 102])
    plot.update_yaxes(tickvals=list(range(len(order))), ticktext=list(labels.values()), showgrid=False)
    return Figure(
        title=f"Alignment by {group}",
        reading=f"Each point is a run's mean over the questions of one {group}"
        + ("; the upright stroke is the base model." if has_base else "."),
        caveat=(f"{len(drawn)} of {len(runs)} runs are drawn. " if len(drawn) < len(runs) else "")
        + "Groups hold few questions each, so a gap between two groups may be a gap between two questions.",
        plot=plot,
        table=table,
    )


def _rates_figure(rates: pd.DataFrame) -> Figure:
    rows = rates[rates["score"] == "aligned"]
    sets = sorted({f"{row['question_set']} · {row['judge']}" for row in rows.to_dict("records")})
    styles = looks(sets)
    plot = blank("share of runs where the test is significant", "", height=150 + 34 * len(TESTS))
    for label in sets:
        points = rows[rows["question_set"] + " · " + rows["judge"] == label]
        color, symbol = styles[label]
        for column, fill, name in (
            ("share_p_below_05", CLEAR, "p < 0.05"),
            ("share_q_below_05", color, "q < 0.05"),
        ):
            plot.add_trace(
                go.Scatter(
                    x=points[column], y=[text(TESTS[test]) for test in points["test"]], mode="markers",
                    marker={"symbol": symbol, "size": 11, "color": fill, "line": {"color": color, "width": 2}},
                    name=text(f"{label}, {name}"), hoverinfo="text",
                    hovertext=[
                        f"<b>{text(TESTS[row['test']])}</b><br>{row[column]:.0%} of {row['runs']} runs with {name}<br>"
                        f"mean statistic {number(row['mean_statistic'], '+.3g')}"
                        for row in points.to_dict("records")
                    ],
                )
            )  # fmt: skip
    plot.update_xaxes(range=[-0.03, 1.03], tickformat=".0%")
    plot.update_yaxes(autorange="reversed")
    return Figure(
        title="How many runs differ from the base model",
        reading="Rings count runs by plain p-values, filled marks those that remain after adjustment for every test.",
        caveat="The tests take questions as independent, and with many questions a difference too small to matter is "
        "significant too: see the shifts, not only the shares.",
        plot=plot,
        table="rates",
    )


base_comparison = Analysis(
    title="Before and after fine-tuning",
    question="On which questions do fine-tuned models answer differently from their base model?",
    compute=compute,
    figures=figures,
    order=30,
)
