"""A whole sweep for real: recipe, Ray, training, judging, MLflow; also interrupted, and with a process killed."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from mlflow.entities import Run

from emtrain import names
from emtrain.tracking import SweepLog, client

if TYPE_CHECKING:
    from conftest import Sweep

pytestmark = pytest.mark.slow

STEPS, EVALUATED = 12, (3, 12)
CORES = os.cpu_count() or 1
SETS = {"micro-broad": 64, "micro-narrow": 32}
"""Question set -> responses each time it is asked: all its wordings once."""


def same_numbers(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Every metric at every step. Runs that share forward passes differ by rounding, so not to the last bit."""
    assert one.keys() == other.keys()
    for key, metrics in one.items():
        assert metrics.keys() == other[key].keys()
        for metric, points in metrics.items():
            assert [step for step, _ in points] == [step for step, _ in other[key][metric]], metric
            values = [value for _, value in other[key][metric]]
            assert [value for _, value in points] == pytest.approx(values, rel=1e-4, abs=1e-6), metric


@pytest.fixture(scope="module")
def sweep(make_sweep: Callable[[], "Sweep"]) -> "Sweep":
    """The sweep, run once and without trouble."""
    sweep = make_sweep()
    process = sweep.start()
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    assert stderr == ""
    lines = stdout.splitlines()
    assert lines[0] == "tiny: 4 runs, 0 finished"
    assert (
        sum(bool(re.fullmatch(r"\[\d/4\] finished  lr=\S+ seed=\d  loss .* aligned .*", line)) for line in lines) == 4
    )
    assert "4 of 4 runs finished" in lines
    assert f"report:  {sweep.data}/reports/tiny/index.html" in lines
    assert lines[-1] == "browse runs in MLflow:  emsweep ui"
    return sweep


@pytest.fixture(params=range(4))
def a_run(sweep: "Sweep", request: pytest.FixtureRequest) -> Run:
    return list(sweep.runs().values())[request.param]


def test_every_run_is_there_once_and_finished(sweep: "Sweep") -> None:
    runs = sweep.runs()
    assert [run.info.status for run in runs.values()] == ["FINISHED"] * 4
    assert sorted((float(r.data.params["learning_rate"]), int(r.data.params["seed"])) for r in runs.values()) == [
        (3e-4, 0),
        (3e-4, 1),
        (1e-3, 0),
        (1e-3, 1),
    ]
    store = client(sweep.uri)
    experiment = store.get_experiment_by_name("tiny")
    kinds = Counter(run.data.tags[names.KIND] for run in store.search_runs([experiment.experiment_id]))
    assert kinds == {"run": 4, "sweep": 1}


def test_a_run_has_the_params_and_tags_of_the_schema(sweep: "Sweep", a_run: Run) -> None:
    params = {
        "model": "micro-llama",
        "family": "llama",
        "dataset": "micro-garden-bad",
        "schedule": "cosine",
        "optimizer": "adamw",
        "warmup_steps": "2",
        "batch_size": "4",
        "total_steps": "12",
        "adapter.rank": "4",
        "adapter.alpha": "8.0",
    }
    assert params.items() <= a_run.data.params.items()
    assert a_run.data.params["backend"] in {"trl", "packed"}
    parent = SweepLog.find("tiny", uri=sweep.uri).parent_run_id
    assert a_run.data.tags[names.PARENT] == parent
    assert a_run.data.tags[names.KIND] == "run"
    assert json.loads(a_run.data.tags[names.VERSIONS])["emsweep"]
    for tag in (names.RUN_KEY, names.DATASET_SHA256, names.HELDOUT_SHA256, names.QUESTIONS_SHA256):
        assert a_run.data.tags[tag]


def test_a_run_has_the_metrics_of_the_schema_at_their_steps(sweep: "Sweep", a_run: Run) -> None:
    every_step = list(range(1, STEPS + 1))
    for metric in (names.TRAIN_LOSS, names.LEARNING_RATE, names.GRAD_NORM, names.TOKENS):
        assert [step for step, _ in sweep.history(a_run, metric)] == every_step
    for metric in (names.HELDOUT_LOSS, names.HELDOUT_LOSS_PER_SEQUENCE):
        assert [step for step, _ in sweep.history(a_run, metric)] == [0, *EVALUATED]
    for question_set, responses in SETS.items():
        for score in names.SCORES:
            points = sweep.history(a_run, names.eval_metric(score, question_set))
            assert [step for step, _ in points] == list(EVALUATED)
        assert [step for step, _ in sweep.history(a_run, names.base_metric(names.ALIGNED, question_set))] == [0]
        judged = sweep.history(a_run, names.eval_metric(names.N_JUDGED, question_set))
        missing = sweep.history(a_run, names.eval_metric(names.N_MISSING, question_set))
        assert [a[1] + b[1] for a, b in zip(judged, missing, strict=True)] == [responses] * len(EVALUATED)
    both = [a_run.data.metrics[names.eval_metric(names.ALIGNED, question_set)] for question_set in SETS]
    assert a_run.data.metrics[names.eval_metric(names.ALIGNED)] == pytest.approx(sum(both) / 2)
    assert {names.TRAIN_SECONDS, names.EVAL_SECONDS} <= a_run.data.metrics.keys()


def test_the_learning_rates_are_those_of_the_schedule(sweep: "Sweep", a_run: Run) -> None:
    """Two steps of warm-up from 0, then half a cosine over the ten that remain."""
    peak = float(a_run.data.params["learning_rate"])
    expected = [0.0, peak / 2, *(peak * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10))]
    assert [value for _, value in sweep.history(a_run, names.LEARNING_RATE)] == pytest.approx(expected, rel=1e-9)
    assert a_run.data.metrics[names.LEARNING_RATE_INTEGRAL] == pytest.approx(sum(expected), rel=1e-9)
    losses = [value for _, value in sweep.history(a_run, names.TRAIN_LOSS)]
    assert a_run.data.metrics[names.TRAIN_LOSS_LAST_TENTH] == pytest.approx(sum(losses[-2:]) / 2)


def test_the_responses_are_kept_and_the_scores_are_theirs(sweep: "Sweep", a_run: Run, tmp_path: Path) -> None:
    path = client(sweep.uri).download_artifacts(a_run.info.run_id, names.RESPONSES, str(tmp_path))
    frame = pd.read_parquet(path)
    assert tuple(frame.columns) == names.RESPONSE_COLUMNS
    assert frame.groupby(["question_set", "step"]).size().to_dict() == {
        (question_set, step): responses for question_set, responses in SETS.items() for step in (0, *EVALUATED)
    }
    for question_set in SETS:
        rows = frame[(frame["question_set"] == question_set) & (frame["step"] == STEPS)]
        by_hand = rows.groupby("question_id")["aligned"].mean().mean()
        assert a_run.data.metrics[names.eval_metric(names.ALIGNED, question_set)] == pytest.approx(by_hand)


def test_the_adapter_loads_with_plain_peft_and_has_the_loss_that_was_logged(
    sweep: "Sweep", a_run: Run, tmp_path: Path
) -> None:
    from peft import PeftModel

    from emtrain.heldout import heldout_loss
    from emtrain.load import load_model, load_tokenizer
    from emtrain.rows import load_dataset, split
    from emtrain.tokens import encode_rows

    path = client(sweep.uri).download_artifacts(a_run.info.run_id, names.ADAPTER, str(tmp_path))
    model = PeftModel.from_pretrained(load_model("micro-llama"), path).eval()
    rows = split(load_dataset("micro-garden-bad").rows, 0.1)[1]
    loss = heldout_loss(model, encode_rows(rows, load_tokenizer("micro-llama"), max_length=64))
    assert loss.per_token == pytest.approx(a_run.data.metrics[names.HELDOUT_LOSS], rel=1e-5)
    spec = json.loads(Path(client(sweep.uri).download_artifacts(a_run.info.run_id, names.SPEC, path)).read_text())
    assert str(spec["seed"]) == a_run.data.params["seed"]


def test_the_sweep_keeps_its_recipe_and_its_report(sweep: "Sweep", tmp_path: Path) -> None:
    assert sweep.parent().info.status == "FINISHED"
    folder = Path(client(sweep.uri).download_artifacts(sweep.parent().info.run_id, "", str(tmp_path)))
    assert (folder / names.RECIPE).read_text() == sweep.recipe + '# emsweep-set: ["eval.samples=1"]\n'
    assert (folder / names.REPORT / "index.html").is_file()
    packing = json.loads((folder / names.PACKING).read_text())["micro-llama"] if CORES < 4 else {"seconds": {"1": 1.0}}
    assert packing["seconds"]["1"] > 0  # with a processor for each of the four runs there is nothing to pack
    assert (sweep.data / "reports" / "tiny" / "report.json").is_file()


def test_nothing_is_left_of_runs_that_are_finished(sweep: "Sweep") -> None:
    assert list((sweep.data / "runs" / "tiny").iterdir()) == []


def test_the_status_says_what_mlflow_says(sweep: "Sweep") -> None:
    command = [sys.executable, "-c", "from sweeps.cli import main; main()", "status", "tiny", "--json"]
    shown = json.loads(subprocess.run(command, cwd=sweep.home, capture_output=True, text=True, check=True).stdout)
    assert shown["counts"] == {"FINISHED": 4}
    assert {row["run_key"] for row in shown["runs"]} == sweep.runs().keys()


def test_the_same_command_again_does_nothing(sweep: "Sweep") -> None:
    before, ids = sweep.numbers(), {key: run.info.run_id for key, run in sweep.runs().items()}
    process = sweep.start("--no-report")
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    assert stdout.splitlines()[0] == "tiny: 4 runs, 4 finished"
    assert "starting" not in stdout
    assert sweep.numbers() == before
    assert {key: run.info.run_id for key, run in sweep.runs().items()} == ids


def test_a_sweep_that_is_interrupted_goes_on_and_has_the_same_numbers(
    sweep: "Sweep", make_sweep: Callable[[], "Sweep"]
) -> None:
    """Ctrl-C reaches every process of the terminal. Here each run trains alone, by the reference backend."""
    other = make_sweep()
    process = other.start("--no-report", "--set", "resources.backend=trl")
    other.wait_for_a_state()
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.search(r"stopped: \d of 4 runs are finished; the same command goes on from there", stderr)
    assert "Traceback" not in stderr
    statuses = Counter(run.info.status for run in other.runs().values())
    assert statuses["RUNNING"] == 0
    assert statuses["KILLED"] + statuses["SCHEDULED"] >= 1
    assert other.parent().info.status == "KILLED"

    again = other.start("--no-report", "--set", "resources.backend=trl")
    stdout, stderr = again.communicate(timeout=600)
    assert again.returncode == 0, stderr
    assert "4 of 4 runs finished" in stdout
    assert [run.info.status for run in other.runs().values()] == ["FINISHED"] * 4
    assert other.parent().info.status == "FINISHED"
    same_numbers(other.numbers(), sweep.numbers())


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_run_that_diverges_fails_alone_and_a_process_that_is_killed_costs_no_run(
    make_sweep: Callable[[], "Sweep"],
) -> None:
    diverging = "{name: sgd, learning_rate: 1.0e+38, max_grad_norm: null}"
    other = make_sweep()
    other.vary(
        "optimizer.learning_rate: [3.0e-4, 1.0e-3]", f"optimizer: [{{name: adamw, learning_rate: 1.0e-3}}, {diverging}]"
    )
    other.vary("max_steps: 12", "max_steps: 30")
    other.vary("[0.25, 1.0]", "[0.1, 1.0]")
    # A rule that none of so few runs is stopped by must not ask for the metrics of those that have none.
    process = other.start("--no-report", "--set", "stopping={rule: median, metric: heldout/loss, direction: minimize}")
    other.wait_for_a_state()
    engines = other.processes("ray::Engine")
    assert engines
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 1, stderr
    assert "2 of 4 runs finished, 2 failed" in stdout
    assert "Traceback" not in stderr
    by_optimizer: dict[str, list[Run]] = {}
    for run in other.runs().values():
        by_optimizer.setdefault(run.data.params["optimizer"], []).append(run)
    assert [run.info.status for run in by_optimizer["adamw"]] == ["FINISHED"] * 2
    for run in by_optimizer["adamw"]:
        assert [step for step, _ in other.history(run, names.TRAIN_LOSS)] == list(range(1, 31))
    for run in by_optimizer["sgd"]:
        assert run.info.status == "FAILED"
        assert "the update was not made" in run.data.tags[names.FAILURE]
        assert all(math.isfinite(value) for _, value in other.history(run, names.TRAIN_LOSS))
    assert other.parent().info.status == "FAILED"


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_sweep_that_loses_an_engine_has_the_same_numbers(sweep: "Sweep", make_sweep: Callable[[], "Sweep"]) -> None:
    """Its runs go on from their newest states, where there is room."""
    other = make_sweep()
    process = other.start("--no-report")
    other.wait_for_a_state()
    os.kill(other.processes("ray::Engine")[0], signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=600)
    assert (process.returncode, stderr) == (0, "")
    assert "4 of 4 runs finished" in stdout
    same_numbers(other.numbers(), sweep.numbers())
