"""What a sweep leaves behind when it is stopped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from emtrain import names
from emtrain.tracking import RunLog, SweepLog
from sweeps import runner
from sweeps.agenda import Agenda
from sweeps.planner import plan_sweep
from sweeps.recipe import load_recipe
from sweeps.record import Setting

RECIPE = {
    "name": "study",
    "base": {"model": "micro-llama", "dataset": "micro-garden-bad", "max_steps": 10},
    "grid": {"seed": [0, 1, 2]},
    "eval": {"questions": ["micro-broad"], "samples": 1, "judges": ["micro-rule"]},
}


def test_a_run_that_ends_between_ctrl_c_and_the_end_of_ray_keeps_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three runs in work one finishes and one fails while Ray ends; the third is KILLED, and goes on later."""
    recipe = load_recipe(yaml.safe_dump(RECIPE), source="r")
    sweep = SweepLog.open("study", uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=tmp_path)
    agenda = Agenda(recipe, plan_sweep(recipe), sweep, None)
    shown: list[tuple[str, float | None, str | None]] = []

    def interrupted(agenda: Agenda, *_: Any) -> None:
        while agenda.next() is not None:
            pass
        raise KeyboardInterrupt

    def wait() -> None:
        finished, failed, _ = (RunLog(sweep.uri, job.run_id) for job in agenda.out.values())
        finished.metrics({names.HELDOUT_LOSS: 1.5}, step=10)
        finished.finish("FINISHED")
        failed.finish("FAILED", failure="no more memory")

    def ended(run_key: str, status: str, metrics: Any, failure: str | None) -> None:
        shown.append((status, metrics.get(names.HELDOUT_LOSS), failure))

    monkeypatch.setattr(runner, "_tune", interrupted)
    monkeypatch.setattr(runner.ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(runner, "files_at_hand", lambda model, revision: tmp_path)  # else Ray would have it built
    connection: Any = SimpleNamespace(own=True, close=lambda: None, wait=wait)
    display: Any = SimpleNamespace(ended=ended, note=lambda text: None)
    with pytest.raises(runner.Interrupted):
        runner.execute(agenda, Setting(sweep.uri, tmp_path, "study"), connection=connection, display=display)
    assert [sweep.runs()[key].info.status for key in agenda.out] == ["FINISHED", "FAILED", "KILLED"]
    assert shown == [("FINISHED", 1.5, None), ("FAILED", None, "no more memory")]


@pytest.mark.parametrize(("at_least", "stopped"), [("baseline", False), (50, True)])
def test_a_grid_that_a_constraint_is_measured_by_is_not_stopped_early(
    at_least: str | int, stopped: bool, tmp_path: Path
) -> None:
    search = {
        "trials": 1,
        "space": {"optimizer.learning_rate": {"low": 1e-5, "high": 1e-2}},
        "objectives": {names.HELDOUT_LOSS: "minimize"},
        "constraints": {names.eval_metric(names.ALIGNED): {"at_least": at_least}},
    }
    stopping = {"rule": "asha", "metric": names.HELDOUT_LOSS, "direction": "minimize", "grace": 0.25}
    recipe = load_recipe(yaml.safe_dump({**RECIPE, "search": search, "stopping": stopping}), source="r")
    assert recipe.stopping is not None
    sweep = SweepLog.open("study", uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=tmp_path)
    agenda = Agenda(recipe, plan_sweep(recipe), sweep, None)
    rule = runner._scheduler(agenda, recipe.stopping, agenda.plan.runs)
    answers = []
    for loss in (1.0, 2.0):
        trial = SimpleNamespace(trial_id=f"{loss}", config={"job": agenda.next()})
        rule.on_trial_add(None, trial)
        answers.append(rule.on_trial_result(None, trial, {names.HELDOUT_LOSS: loss, "steps": 5}))
    assert answers == ["CONTINUE", "STOP" if stopped else "CONTINUE"]
