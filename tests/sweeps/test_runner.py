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
    connection: Any = SimpleNamespace(own=True, close=lambda: None, wait=wait)
    display: Any = SimpleNamespace(ended=ended, note=lambda text: None)
    with pytest.raises(runner.Interrupted):
        runner.execute(agenda, Setting(sweep.uri, tmp_path, "study"), connection=connection, display=display)
    assert [sweep.runs()[key].info.status for key in agenda.out] == ["FINISHED", "FAILED", "KILLED"]
    assert shown == [("FINISHED", 1.5, None), ("FAILED", None, "no more memory")]
