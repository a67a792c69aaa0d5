"""What is left to measure, and the measuring itself on a sweep trained for the purpose."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from emeval.spec import EvalSpec
from emtrain import names
from emtrain.spec import RunSpec
from emtrain.tracking import SweepLog, client
from sweeps.geometry import Angles, Ball, Line, Place, Surveyor, Tables, key, outstanding
from sweeps.planner import Evaluation
from sweeps.record import Setting

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
  schedule: {name: linear, warmup_steps: 2}
  batch_size: 4
  max_steps: 12
  max_length: 64
grid:
  - seed: [0, 1]
  - schedule: [{name: cosine, warmup_steps: 2}]
  - adapter: [full]
eval: {questions: [micro-broad], samples: 2, at: [0.25, 1.0], judges: [micro-rule], max_new_tokens: 16}
"""


def nothing() -> Tables:
    return {table: pd.DataFrame(columns=list(columns)) for table, columns in names.GEOMETRY_TABLES.items()}


@pytest.fixture
def there() -> dict[tuple[str, int], Place]:
    spec = RunSpec(model="micro-llama", dataset="micro-garden-bad")
    return {(run, 12): Place(run, run, 12, names.ADAPTER, spec, ("0" * 64, None), None) for run in ("c", "a", "b")}


@pytest.fixture
def pairs() -> pd.DataFrame:
    rows = [("a", 12, "b", 12), ("b", 12, "c", 12)]
    return pd.DataFrame(rows, columns=list(names.PAIR)).assign(model="micro-llama", dataset="micro-garden-bad")


def test_everything_is_left_where_nothing_was_measured(
    there: dict[tuple[str, int], Place], pairs: pd.DataFrame
) -> None:
    tasks = outstanding(pairs, there, nothing(), losses_at=[0, 0.5, 1], asked_at=[0, 1])
    assert [type(task) for task in tasks] == [Angles, Ball, Ball, Ball, Line, Line]
    # Angles between all runs that are in a pair, the smaller id first.
    assert [key(*pair)[::2] for pair in tasks[0].pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(task.a.run_id, task.b.run_id) for task in tasks[-2:]] == [("a", "b"), ("b", "c")]
    assert tasks[-1].losses_at == (0, 0.5, 1)


def test_what_was_measured_is_not_measured_again(there: dict[tuple[str, int], Place], pairs: pd.DataFrame) -> None:
    kept = nothing()
    ends = {"run_a": "a", "step_a": 12, "run_b": "b", "step_b": 12}
    kept["losses"] = pd.DataFrame([ends | {"t": t, "row": row} for t in (0, 0.3333333, 1) for row in (0, 1)])
    kept["responses"] = pd.DataFrame([ends | {"t": t} for t in (0, 1)])
    kept["updates"] = pd.DataFrame([ends])
    kept["sharpness"] = pd.DataFrame([{"run_id": "a", "step": 12}, {"run_id": "c", "step": 8}])
    tasks = outstanding(pairs.iloc[:1], there, kept, losses_at=[0, 0.333333, 0.5, 1], asked_at=[0, 1])
    assert [type(task) for task in tasks] == [Ball, Line]
    assert tasks[0].place.run_id == "b"
    assert (tasks[1].losses_at, tasks[1].asked_at) == ((0.5,), ())


def test_a_measurement_that_fails_gives_its_reason_in_a_line_and_no_rows(tmp_path: Path) -> None:
    class Failing:
        def measure(self, surveyor: Surveyor) -> Tables:
            raise ValueError("run a has no artifact adapter\nand more")

    evaluation = Evaluation.load(EvalSpec(questions=("micro-broad",), samples=1, judges=("micro-rule",)))
    surveyor = Surveyor(SweepLog("", "", ""), Setting("", tmp_path, ""), evaluation)
    task = Failing()
    assert surveyor.measure(task) == (task, {}, "run a has no artifact adapter")


Emsweep = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def emsweep(home: Path) -> Emsweep:
    (home / "tiny.yaml").write_text(RECIPE)
    inherited = {k: v for k, v in os.environ.items() if k not in {"MLFLOW_TRACKING_URI", "EMSWEEP_DATA"}}

    def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", "from sweeps.cli import main; main()", *arguments]
        return subprocess.run(
            command, cwd=home, env=inherited, capture_output=True, text=True, timeout=500, check=False
        )

    trained = call("run", "tiny.yaml", "--no-report", "--set", "eval.samples=1")
    assert trained.returncode == 0, trained.stderr
    return call


def measured(home: Path) -> Tables:
    return SweepLog.find("tiny", uri=f"sqlite:///{home}/emsweep-data/mlflow.db").tables(names.GEOMETRY)


@pytest.mark.slow
def test_a_sweep_is_measured_once_and_its_report_has_the_numbers(emsweep: Emsweep, home: Path) -> None:
    first = emsweep("geometry", "tiny", "--points", "3", "--alignment-points", "3")
    assert first.returncode == 0, first.stderr
    assert "all its weights were trained, so it has no adapter" in first.stderr
    # What was set on the command line of the run counts: one sample for each of 64 wordings at 3 points of 3 lines.
    assert "tiny: 3 pairs of runs, 7 measurements to make, 576 responses" in first.stdout

    log = SweepLog.find("tiny", uri=f"sqlite:///{home}/emsweep-data/mlflow.db")
    recorded = {run.info.run_id: run.data.metrics[names.HELDOUT_LOSS] for run in log.runs().values()}
    tables = measured(home)
    points = tables["losses"].groupby([*names.PAIR, "t"])[["loss", "tokens"]].sum()
    losses = (points["loss"] / points["tokens"]).reset_index(name="loss")
    assert len(losses) == 9
    for point in losses[losses["t"] != 0.5].to_dict("records"):
        run_id = point["run_a"] if point["t"] == 0 else point["run_b"]
        assert point["loss"] == pytest.approx(recorded[run_id], rel=1e-5)
    uphill = tables["sharpness"].pivot_table(index="run_id", columns="kind", values="heldout_loss")
    assert (uphill["adversarial"] > uphill["none"]).all()
    assert uphill["none"].to_dict() == pytest.approx({run: recorded[run] for run in uphill.index}, rel=1e-5)
    assert tables["responses"].groupby([*names.PAIR, "t"]).size().tolist() == [64] * 9
    assert tables["updates"]["cosine"].between(-1, 1).all()

    again = emsweep("geometry", "tiny", "--points", "3", "--alignment-points", "3")
    assert "0 measurements to make, 0 responses" in again.stdout
    finer = emsweep("geometry", "tiny", "--points", "5", "--alignment-points", "3")
    assert "3 measurements to make, 0 responses" in finer.stdout
    assert (
        measured(home)["losses"].groupby(list(names.PAIR))["t"].unique().map(sorted).tolist()
        == [[0, 0.25, 0.5, 0.75, 1]] * 3
    )

    report = emsweep("report", "tiny", "--json")
    numbers = json.loads(report.stdout)
    found = numbers["minima_geometry"]
    assert len(found["barriers"]) == 3
    assert found["answer"].startswith(("Mostly", "No clear answer"))
    assert len(found["sharpness"]) == 3
    assert numbers["dynamics"]["adapters"]


@pytest.mark.slow
def test_runs_keep_their_adapters_at_every_evaluation_point(emsweep: Emsweep, home: Path) -> None:
    store = client(f"sqlite:///{home}/emsweep-data/mlflow.db")
    runs = SweepLog.find("tiny", uri=f"sqlite:///{home}/emsweep-data/mlflow.db").runs().values()
    for run in runs:
        kept = {file.path for file in store.list_artifacts(run.info.run_id)}
        if run.data.params.get("adapter") == "full":
            assert names.MODEL in kept
            assert not kept & {names.ADAPTER, names.ADAPTERS}
            assert names.ADAPTER_NORM not in run.data.metrics
        else:
            assert names.ADAPTER in kept
            assert [file.path for file in store.list_artifacts(run.info.run_id, names.ADAPTERS)] == ["adapters/3"]
            files = {file.path for file in store.list_artifacts(run.info.run_id, "adapters/3")}
            assert files == {"adapters/3/adapter_config.json", "adapters/3/adapter_model.safetensors"}
            assert run.data.metrics[names.ADAPTER_NORM] > 0


@pytest.mark.slow
def test_a_sweep_that_was_not_trained_here_is_a_mistake_without_a_traceback(emsweep: Emsweep) -> None:
    ended = emsweep("geometry", "tinny")
    assert ended.returncode == 2
    assert "Did you mean 'tiny'?" in ended.stderr
    ended = emsweep("geometry", "tiny", "--alignment-points", "2")
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert "--alignment-points 2" in ended.stderr
