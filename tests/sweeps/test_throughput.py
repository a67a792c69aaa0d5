"""What a sweep measures of the machine, and what the next plan finds."""

from pathlib import Path
from typing import Any

import pytest

from emtrain.tracking import SweepLog
from sweeps.engine import Engine
from sweeps.lease import Job
from sweeps.planner import plan_sweep
from sweeps.recipe import load_recipe
from sweeps.record import Setting
from sweeps.throughput import Throughput, Work, keep, known, measure

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  schedule: constant
  batch_size: 4
  max_steps: 4
  max_length: 64
eval: {questions: [micro-narrow], samples: 1, at: [0.5, 1.0], judges: [micro-rule], max_new_tokens: 8}
"""


def test_engines_side_by_side_add_up() -> None:
    """One trains 100 tokens/s and samples 4 responses/s, the other 300 and 2; the third had hardly begun."""
    one, other = Work(), Work()
    one.train(500, 5.0)
    one.train(500, 5.0)
    one.sample(16, 4.0)
    other.train(1200, 4.0)
    other.sample(10, 5.0)
    measured = measure([one, other, Work(3, 0.1, 1, 9.0)], sweep="s")
    assert measured is not None
    assert (measured.tokens_per_second, measured.responses_per_second) == (400, 6)
    assert measured.measured.endswith("by s")


def test_from_too_little_work_nothing_is_measured() -> None:
    assert measure([Work(), Work(500, 9.0), Work(500, 9.0, 10, 0.1)], sweep="s") is None


def test_the_newest_of_each_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    assert known("m") is None
    old, new = Throughput(1.0, 2.0, "yesterday"), Throughput(3.0, 4.0, "today")
    keep("m", old)
    keep("n", old)
    keep("m", new)
    assert (known("m"), known("n"), known("o")) == (new, old, None)


def test_a_file_that_was_tampered_with_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path))
    (tmp_path / "throughput.json").write_text("not JSON")
    assert known("m") is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["packed", "trl"])
def test_an_engine_counts_what_it_trains_and_samples(backend: Any, tmp_path: Path) -> None:
    """Four steps, evaluated before, after two and at the end, 32 questions each; the run reports the same tokens."""
    recipe = load_recipe(RECIPE, source="r")
    (run,) = plan_sweep(recipe).runs
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = SweepLog.open("tiny", uri=uri, artifacts=tmp_path / "artifacts")
    job = Job(run, sweep.plan(run.run_key, name="r", params=run.params, tags=run.tags))
    engine = Engine(Setting(uri, tmp_path, "tiny"), capacity=2, heaviest={}, only_base=None, backend=backend)
    reports = [engine.advance(job)]
    while reports[-1].ending is None:
        reports.append(engine.advance(job))
    assert reports[-1].ending.status == "FINISHED"
    (work,) = engine.worked().values()
    assert work.tokens == reports[-1].tokens > 0
    assert work.responses == 3 * 32
    assert work.training_seconds > 0
    assert work.sampling_seconds > 0
