"""Which runs of a recipe are verified, and what is said of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sweeps.cli import main
from sweeps.planner import PlannedRun, plan_sweep
from sweeps.recipe import load_recipe
from sweeps.verify import varied

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
  schedule: {name: linear, warmup_steps: 1}
  batch_size: 4
  max_steps: 10
grid:
  adapter.rank: [2, 4]
  optimizer.name: [adamw, sgd]
  seed: [0, 1, 2]
eval: {questions: [micro-broad], samples: 1, at: [1.0], judges: [micro-rule], max_new_tokens: 16}
"""


def planned() -> list[PlannedRun]:
    return list(plan_sweep(load_recipe(RECIPE, source="tiny.yaml")).runs)


@pytest.mark.parametrize("seed", range(5))
def test_the_second_run_differs_from_the_first_in_all_that_varies(seed: int) -> None:
    first, second = (run.spec for run in varied(planned(), 2, seed=seed))
    assert first.adapter != second.adapter
    assert first.optimizer != second.optimizer
    assert first.seed != second.seed


def test_the_choice_is_the_seeds() -> None:
    keys = [[run.run_key for run in varied(planned(), 3, seed=seed)] for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


def test_no_run_is_taken_twice_and_no_more_than_there_are() -> None:
    taken = varied(planned(), 100, seed=0)
    assert sorted(run.run_key for run in taken) == sorted(run.run_key for run in planned())


def emsweep(*arguments: str) -> int:
    """The exit code of the command."""
    sys.argv[:] = ["emsweep", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_the_command_compares_what_can_be_packed_and_says_why_the_rest_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from emtrain.packed import equivalence

    recipe = RECIPE.replace("adapter.rank: [2, 4]", "adapter: [full, {rank: 2, dropout: 0.1}]")
    (tmp_path / "tiny.yaml").write_text(recipe.replace("[0, 1, 2]", "[0]"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    command = ("verify-packing", "tiny.yaml", "--steps", "3")

    assert emsweep(*command, "--json") == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    assert sorted((run["passed"] is None, run["optimizer"]) for run in runs) == [
        (False, "adamw"), (False, "sgd"), (True, "adamw"), (True, "sgd")
    ]  # fmt: skip
    for run in runs:
        if run["passed"] is None:
            assert "can't share a base" in run["unpackable"]
        else:
            assert run["passed"]
            assert run["comparison"]["steps"] == 3
            assert run["comparison"]["learning_rate"] == 0
            assert 0 < run["comparison"]["loss"] < 1e-5
            assert run["precision"] == "fp32"

    strict = equivalence.Tolerance(loss=0, grad_norm=0, update=0)
    monkeypatch.setattr(equivalence, "tolerance", lambda optimizer, dtype: strict)
    assert emsweep(*command) == 1
    said = capsys.readouterr().out
    assert said.count("differs") == 2
    assert said.count("trained alone anyway") == 2
    assert not (tmp_path / "emsweep-data").exists()
