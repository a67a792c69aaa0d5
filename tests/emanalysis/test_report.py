import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from emanalysis import report
from emanalysis.records import Records, load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements by name with their attributes, and all text outside scripts and styles."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.words += data


@pytest.fixture(scope="module")
def written(records: Records, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    report.write(records, out, ui_url="http://127.0.0.1:5000/")
    return out


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written / "index.html")


def test_the_page_asks_for_nothing_from_a_network(page: Page) -> None:
    asked = [(tag, value) for tag, attributes in page.elements for name, value in attributes.items() if name == "src"]
    assert asked == []
    assert "link" not in {tag for tag, _ in page.elements}
    links = {attributes.get("href") or "" for tag, attributes in page.elements if tag == "a"}
    outside = {link for link in links if not link.startswith(("#", "tables/", "report.json"))}
    assert all(link.startswith("http://127.0.0.1:5000/#/experiments/") for link in outside)


def test_every_run_links_to_its_mlflow_page(page: Page, records: Records, sweep: dict[str, str]) -> None:
    links = {attributes.get("href") for tag, attributes in page.elements if tag == "a"}
    for run_id in sweep.values():
        assert f"http://127.0.0.1:5000/#/experiments/{records.experiment_id}/runs/{run_id}" in links


def test_hostile_text_is_shown_as_text(page: Page, written: Path) -> None:
    hostile = "<img src=x onerror=alert(1)></script>{{ 7*7 }}"
    assert "img" not in {tag for tag, _ in page.elements}
    assert f"failed {hostile}" in page.words
    assert f"loss is nan at step 2 {hostile}" in page.words
    # Neither does it end the scripts that hold the plots' data.
    assert "onerror=alert(1)></script>" not in (written / "index.html").read_text()


def test_no_text_in_a_table_is_a_formula_or_reaches_the_terminal(records: Records, tmp_path: Path) -> None:
    numbers = json.loads(json.dumps(report.compute(records)))
    texts = ['=HYPERLINK("http://x")', "+cmd|calc", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\x1b[31mred", "a=b", "größer"]
    for run, text in zip(numbers["runs"], texts, strict=False):
        run["name"], run["aligned"] = text, -1.5
    report.write(records, tmp_path, numbers=numbers)
    with (tmp_path / "tables" / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[: len(texts)]
    assert [row["name"] for row in rows] == [
        '\'=HYPERLINK("http://x")',
        "'+cmd|calc",
        "'-1+1",
        "'@SUM(1)",
        "\\t=1",
        "\\r=1",
        "\\x1b[31mred",
        "a=b",
        "größer",
    ]
    assert {row["aligned"] for row in rows} == {"-1.5"}


def test_failed_and_killed_runs_are_shown_with_reasons(page: Page) -> None:
    assert re.search(r"8 finished,\s+1 failed,\s+1 killed", page.words)
    assert "no reason was recorded" in page.words


def test_report_json_holds_every_analysis_under_its_name_and_no_nan(written: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    numbers = json.loads((written / "report.json").read_text(), parse_constant=refuse)
    assert {"sweep", "runs", *report.analyses()} == set(numbers)
    assert numbers["sweep"]["status"] == {"FINISHED": 8, "FAILED": 1, "KILLED": 1}
    assert numbers["sweep"]["missing_by_reason"] == {"refused": 1 + 8 * 3 + 2}
    assert len(numbers["runs"]) == 10


def test_a_response_counts_once_whoever_judged_it_and_the_base_models_once_whichever_run_keeps_it(
    records: Records, tmp_path: Path
) -> None:
    """8 questions x 4 samples of the base, at 3 points of 8 runs and at 2 of the killed one; one of 32 is refused."""
    one = report.overview(records)
    assert (one["responses"], one["missing"]) == (32 * (1 + 8 * 3 + 2), 1 + 8 * 3 + 2)
    second = records.questions.assign(judge="second", n_judged=4, n_missing=0, missing_refused=0)
    twice = replace(records, questions=pd.concat([records.questions, second], ignore_index=True))
    two = report.overview(twice)
    assert (two["responses"], two["judged"], two["missing"]) == (864, 2 * 864 - 27, 27)
    words = " ".join(Page(report.write(twice, tmp_path)).words.split())
    assert "864 27 scores of 2 judges missing: 27 refused" in words


def test_every_figure_has_the_table_it_was_drawn_from(written: Path, page: Page) -> None:
    plots = [a for tag, a in page.elements if tag == "div" and (a.get("id") or "").startswith("plot-")]
    data = [a["href"] for tag, a in page.elements if tag == "a" and (a.get("href") or "").startswith("tables/")]
    assert len(plots) >= 7
    assert len(data) == len(plots) + 1  # and the table of runs
    for file in data:
        assert file is not None
        with (written / file).open() as rows:
            assert len(list(csv.reader(rows))) > 1


def test_the_same_records_give_the_same_numbers(records: Records, written: Path) -> None:
    numbers = json.loads((written / "report.json").read_text())
    assert report.compute(records, seed=0) == numbers


def test_dynamics_find_what_the_sweep_was_made_of(written: Path, sweep: dict[str, str]) -> None:
    found = json.loads((written / "report.json").read_text())["dynamics"]
    onsets = {row["run_id"]: row for row in found["onsets"]}
    # Alignment falls by 37.5 points over the run at 1e-3 (9.4 a quarter) and by 11.25 at 3e-4.
    assert onsets[sweep["linear 0.001 seed 0"]]["onset_by"] == 10
    assert onsets[sweep["linear 0.0003 seed 0"]]["onset_by"] == 20
    assert sweep["killed"] not in onsets
    assert sweep["killed"] in {row["run_id"] for row in found["traces"]}
    # The norm grows by 100 times the learning rate a step, so it is 1 at step 10 of the faster runs, where they fall.
    at_onset = {row["run_id"]: row["adapter_norm"] for row in found["adapters"] if row["onset"]}
    assert at_onset[sweep["linear 0.001 seed 0"]] == pytest.approx(1.0)
    path = [row for row in found["adapters"] if row["run_id"] == sweep["cosine 0.0003 seed 1"]]
    assert [row["adapter_norm"] for row in path] == pytest.approx([0, 0.15, 0.3, 0.6])
    assert [row["adapter_turn"] for row in path] == [None, None, 30, 30]
    assert "the adapter's update had a norm of" in found["answer"]
    (stratum,) = found["optimizers"]
    assert (stratum["optimizer"], stratum["runs"], stratum["fell"]) == ("adamw", 8, 8)
    assert stratum["aligned_low"] < stratum["aligned"] < stratum["aligned_high"]


def test_base_comparison_finds_what_the_sweep_was_made_of(written: Path, sweep: dict[str, str]) -> None:
    found = json.loads((written / "report.json").read_text())["base_comparison"]
    shifts = [row for row in found["tests"] if row["test"] == "mean_shift" and row["score"] == "aligned"]
    assert len(shifts) == 8
    for row in shifts:
        assert row["questions"] == 8
        assert row["p"] == pytest.approx(2 / 2**8)  # all eight questions fell
    by_run = {row["run_id"]: row["statistic"] for row in shifts}
    assert by_run[sweep["linear 0.001 seed 0"]] == pytest.approx(-37.5, abs=2)
    formats = {(row["run_id"], row["stratum"]): row for row in found["formats"]}
    assert formats[sweep["linear 0.001 seed 0"], "json"]["aligned"] == pytest.approx(40, abs=3)


def test_an_empty_sweep_has_a_page_with_worded_reasons(store: Any, tmp_path: Path) -> None:
    store.open("nothing")
    written = report.write(load("nothing", tracking_uri=store.uri), tmp_path)
    numbers = json.loads((tmp_path / "report.json").read_text())
    for name in report.analyses():
        assert numbers[name]["reason"].startswith("needs ")
    assert "Not computed: needs" in Page(written).words


def test_without_an_address_of_mlflow_runs_are_not_linked(store: Any, records: Records, tmp_path: Path) -> None:
    page = Page(report.write(records, tmp_path, title="Title & more"))
    assert "Title & more" in page.words
    assert not any((a.get("href") or "").startswith("http") for tag, a in page.elements if tag == "a")


def test_plain_values_are_json_values() -> None:
    values = {1: np.float64("nan"), "b": [np.int64(3), pd.NA, pd.NaT], "c": pd.Timestamp("2026-01-02T03:04:05Z")}
    assert report.plain(values) == {"1": None, "b": [3, None, None], "c": "2026-01-02T03:04:05+00:00"}
    assert report.plain((np.bool_(True), float("inf"), np.array([1.5]))) == [True, None, [1.5]]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_every_plot_and_runs_nothing_hostile(written: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += (
        "--disable-component-update --disable-sync --disable-dev-shm-usage --virtual-time-budget=20000 --dump-dom"
    )
    page = written / "index.html"
    dom = subprocess.run(
        [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    plots = len(re.findall(r'class="plot[ "]', page.read_text()))
    assert len(re.findall(r'<div class="plot js-plotly-plot', dom)) == plots
    assert "<img src" not in dom
