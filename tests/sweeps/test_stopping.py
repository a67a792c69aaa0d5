"""Early stopping: what each rule says of results made by hand, and in whole sweeps, of runs whose order is known
beforehand: some learn, some can't."""

import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Run
from ray.tune.schedulers import TrialScheduler

from emtrain import names
from emtrain.tracking import RunLog, SweepLog, client
from sweeps.planner import examples, plan_sweep
from sweeps.recipe import Recipe, load_recipe
from sweeps.stopping import Reports, fellows, reports_before, scheduler

if TYPE_CHECKING:
    from conftest import Sweep

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  schedule: constant
  batch_size: 4
  max_steps: 12
  max_length: 64
grid: {GRID}
stopping: {rule: RULE, metric: heldout/loss, direction: minimize, grace: 0.25, reduction: 2}
eval: {questions: [micro-narrow], samples: 1, at: [0.25, 1.0], judges: [micro-rule], max_new_tokens: 16}
resources: {max_concurrent: 1, keep_weights: last}
"""
STEPS, RUNG = 12, 3
POINTS = (1, 3, 5, 6, 9)


def load(*changes: str) -> Recipe:
    return load_recipe(RECIPE.replace("GRID", "").replace("RULE", "asha"), source="", overrides=changes)


class Sight:
    """A rule of the recipe above, changed at some keys, to which runs can be shown by name."""

    def __init__(self, *changes: str, before: Reports | None = None, whole: Collection[str] = ()) -> None:
        recipe = load(*changes)
        assert recipe.stopping is not None
        self.rule = scheduler(recipe.stopping, examples(recipe, plan_sweep(recipe)), before or {}, whole=whole)
        self.trials: dict[str, Any] = {}

    def shows(self, name: str, *, loss: float, role: str = "search", **at: int) -> bool:
        """Whether the run goes on from there."""
        if name not in self.trials:
            job = SimpleNamespace(run=SimpleNamespace(run_key=name), role=role)
            self.trials[name] = SimpleNamespace(trial_id=f"drawn by Tune {len(self.trials)}", config={"job": job})
            self.rule.on_trial_add(None, self.trials[name])
        answer = self.rule.on_trial_result(None, self.trials[name], {"heldout/loss": loss, **at})
        assert answer in {TrialScheduler.CONTINUE, TrialScheduler.STOP}  # a run can't be paused
        return answer == TrialScheduler.CONTINUE

    def ends(self, name: str) -> None:
        """As a trial reports it: without a count of steps."""
        self.rule.on_trial_complete(None, self.trials[name], {"heldout/loss": 0.0})


def test_median_holds_a_run_against_three_that_are_over() -> None:
    sight = Sight("stopping.rule=median")
    for name, loss in [("a", 1.0), ("b", 2.0), ("c", 3.0)]:
        assert sight.shows(name, loss=loss, steps=3), "it has fewer than three fellows"
        sight.ends(name)
    assert sight.shows("d", loss=2.0, steps=3)
    assert not sight.shows("e", loss=2.1, steps=3)


def test_asha_lets_the_better_half_go_on_and_looks_at_no_run_before_the_grace_is_over() -> None:
    """Half of those seen at the rung before: 1, then 1 and 2, whose upper half begins at 1.5."""
    sight = Sight()
    assert sight.shows("early", loss=9.0, steps=2)
    assert sight.shows("a", loss=1.0, steps=3)
    assert not sight.shows("b", loss=2.0, steps=3)
    assert not sight.shows("c", loss=1.6, steps=3)
    assert sight.shows("d", loss=0.9, steps=3)


def test_asha_looks_at_a_run_once_where_it_came_past_two_rungs_at_a_time() -> None:
    """Rungs are at 3 and 6 steps of 12; a run first seen at 6 stands at that one, and at none later."""
    sight = Sight()
    assert sight.shows("a", loss=1.0, steps=6)
    assert sight.shows("b", loss=0.9, steps=3)
    assert sight.shows("a", loss=5.0, steps=9)


def test_rungs_in_tokens_are_shares_of_the_tokens_of_the_longest_run() -> None:
    """Rows of micro datasets have 10 to 40 tokens, so that 48 rows have 480 to 1,920, and the rung is among the first
    half of them. A run of a thousand tokens would be far past the end, were the 12 steps taken for tokens."""
    sight = Sight("stopping.by=tokens")
    assert sight.shows("a", loss=1.0, tokens=100)
    assert sight.shows("b", loss=9.0, tokens=100), "not a rung yet"
    assert sight.shows("a", loss=1.0, tokens=480)
    assert not sight.shows("b", loss=9.0, tokens=480)


def test_a_search_without_a_grid_has_rungs_of_its_longest_runs() -> None:
    search = "{trials: 3, space: {max_steps: {low: 12, high: 40, integer: true}}, objectives: {heldout/loss: minimize}}"
    sight = Sight(f"search={search}")
    for name, loss in [("a", 1.0), ("b", 9.0)]:
        assert sight.shows(name, loss=loss, steps=9)
    assert sight.shows("a", loss=1.0, steps=10)
    assert not sight.shows("b", loss=9.0, steps=10)


def adapters(sweep: "Sweep", run: Run) -> list[str]:
    """The adapters among the artifacts of a run."""
    store = client(sweep.uri)
    at = {file.path for folder in (None, names.ADAPTERS) for file in store.list_artifacts(run.info.run_id, folder)}
    return sorted(path for path in at if path.startswith(names.ADAPTER) and path != names.ADAPTERS)


ARRIVALS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 20)), min_size=20, max_size=40)
"""Of runs at their evaluation points, each at its next one, with its loss."""


@settings(max_examples=50, deadline=None)
@given(ARRIVALS, st.integers(1, 20), st.sampled_from(["asha", "median"]))
def test_a_sweep_that_is_started_again_decides_as_one_that_was_not(
    arrivals: list[tuple[str, int]], cut: int, rule: str
) -> None:
    """What was told before the cut is given to the second start, of runs that are over and of such as go on. Of a run
    that was stopped nothing arrives any more."""
    whole = Sight(f"stopping.rule={rule}")
    told: dict[str, list[dict[str, float]]] = {}
    answers: list[tuple[str, int, int, bool]] = []
    for name, loss in arrivals:
        own = [going for told_of, _, _, going in answers if told_of == name]
        if all(own) and len(own) < len(POINTS):
            answers.append((name, loss, POINTS[len(own)], whole.shows(name, loss=loss, steps=POINTS[len(own)])))
    for name, loss, steps, _ in answers[:cut]:
        told.setdefault(name, []).append({"heldout/loss": loss, "steps": steps})
    again = Sight(f"stopping.rule={rule}", before=told)
    for name, loss, steps, going in answers[cut:]:
        assert again.shows(name, loss=loss, steps=steps) == going


def test_without_what_was_told_before_a_bad_run_would_go_on() -> None:
    told = {name: [{"heldout/loss": 1.0, "steps": 3}] for name in "abc"}
    for rule in ("asha", "median"):
        assert Sight(f"stopping.rule={rule}").shows("d", loss=2.0, steps=3)
        assert not Sight(f"stopping.rule={rule}", before=told).shows("d", loss=2.0, steps=3)


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_run_that_confirms_a_winner_is_never_stopped_and_stops_no_other(rule: str) -> None:
    told = {name: [{"heldout/loss": 1.0, "steps": 3}] for name in "abc"}
    sight = Sight(f"stopping.rule={rule}", before=told)
    for name, loss in [("d", 9.0), ("e", 0.1), ("f", 0.1), ("g", 0.1), ("h", 0.1)]:
        assert sight.shows(name, loss=loss, steps=3, role="confirm")
        assert sight.shows(name, loss=loss, steps=6, role="confirm")
        sight.ends(name)
    assert sight.shows("i", loss=1.0, steps=3)
    assert not sight.shows("j", loss=1.1, steps=3)


@pytest.mark.parametrize("rule", ["asha", "median"])
def test_a_grid_that_is_a_baseline_is_trained_to_its_end_and_the_search_is_held_against_it(rule: str) -> None:
    """Also a run of it that nothing could be judged of."""
    sight = Sight(f"stopping.rule={rule}", whole={"grid"})
    for name, loss in [("a", 1.0), ("b", 2.0), ("c", 3.0)]:
        for steps in (3, 6):
            assert sight.shows(name, loss=loss, steps=steps, role="grid")
    assert sight.rule.on_trial_result(None, sight.trials["a"], {"steps": 9}) == TrialScheduler.CONTINUE
    assert sight.shows("d", loss=1.0, steps=3)
    assert not sight.shows("e", loss=3.1, steps=3)


def test_what_was_told_before_is_read_from_mlflow(tmp_path: Path) -> None:
    """Neither the base's loss nor that of the end; nothing of a run that has not come to a point, nor of one of a grid
    that the recipe has no more, nor of one that was asked to confirm a winner."""
    sweep = SweepLog.open("study", uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=tmp_path)
    for name, role in (("a", "grid"), ("b", "search"), ("new", "grid"), ("gone", "grid"), ("won", "confirm")):
        run_id = sweep.plan(name, name=name, params={"total_steps": STEPS}, tags={names.ROLE: role})
        log = RunLog(sweep.uri, run_id)
        log.metrics({names.HELDOUT_LOSS: 9.0}, step=0)
        for step in (3, 6, STEPS) if name != "new" else ():
            log.metrics({names.HELDOUT_LOSS: 1.0 / step, names.TOKENS: 40 * step}, step=step)
        log.finish("KILLED")
    known = fellows(sweep.runs(), {"a", "new"})
    for by, points in (("steps", (3, 6)), ("tokens", (120, 240))):
        rule = load(f"stopping.by={by}").stopping
        assert rule is not None
        reports = [{"heldout/loss": 1 / step, by: at} for step, at in zip((3, 6), points, strict=True)]
        assert reports_before(rule, known, sweep) == {"a": reports, "b": reports, "new": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "rates", "useless", "starts"),
    [
        # Each that learns is better than those before; of the two best halves so far none holds a useless one. These
        # are trained at a second start, and held against what the first one saw.
        ("asha", "5.0e-4, 1.0e-3, 2.0e-3", "1.0e-8, 1.0e-9", 2),
        # The median of three or more fellows is the first thing that it stops by.
        ("median", "1.0e-3, 1.5e-3, 2.0e-3", "1.0e-8, 1.0e-9", 1),
    ],
)
def test_runs_that_learn_nothing_end_at_the_rung_and_the_others_at_their_end(
    rule: str, rates: str, useless: str, starts: int, make_sweep: Callable[[], "Sweep"]
) -> None:
    """One after the other, so that it is known what each is held against; and the same command changes nothing."""
    sweep = make_sweep()
    for asked in (rates, f"{rates}, {useless}")[-starts:]:
        sweep.recipe = RECIPE.replace("RULE", rule).replace("GRID", f"optimizer.learning_rate: [{asked}]")
        process = sweep.start("--no-report")
        stdout, stderr = process.communicate(timeout=600)
        assert (process.returncode, stderr) == (0, ""), stdout
    assert "3 of 5 runs finished, 2 stopped early" in stdout.splitlines()
    runs = {float(run.data.params["learning_rate"]): run for run in sweep.runs().values()}
    for rate in map(float, rates.split(", ")):
        assert runs[rate].info.status == "FINISHED"
        assert names.STOPPED not in runs[rate].data.tags
        assert adapters(sweep, runs[rate]) == [names.ADAPTER]
        assert [step for step, _ in sweep.history(runs[rate], names.TRAIN_LOSS)] == list(range(1, STEPS + 1))
    for rate in map(float, useless.split(", ")):
        assert (runs[rate].info.status, runs[rate].data.tags.get(names.STOPPED)) == ("KILLED", rule)
        assert [step for step, _ in sweep.history(runs[rate], names.TRAIN_LOSS)] == list(range(1, RUNG + 1))
        assert [step for step, _ in sweep.history(runs[rate], names.HELDOUT_LOSS)] == [0, RUNG]
        assert adapters(sweep, runs[rate]) == [f"{names.ADAPTERS}/{RUNG}"]
    assert {run.data.params["backend"] for run in runs.values()} == {"packed"}
    left = {path.name for path in (sweep.data / "runs" / "tiny").glob("*/*")}
    assert left == {"responses"}, "states and adapters of what was stopped are gone"

    before = sweep.numbers()
    again = sweep.start("--no-report")
    stdout, stderr = again.communicate(timeout=300)
    assert (again.returncode, stderr) == (0, "")
    assert stdout.splitlines()[0] == "tiny: 5 runs, 3 finished, 2 stopped early"
    assert "starting" not in stdout
    assert sweep.numbers() == before
    assert {run.info.run_id: run.info.status for run in sweep.runs().values()} == {
        run.info.run_id: run.info.status for run in runs.values()
    }


@pytest.mark.slow
def test_halving_lets_the_best_third_of_all_go_on_also_after_a_kill(make_sweep: Callable[[], "Sweep"]) -> None:
    """Six runs in two slots wait for each other at step 3, whoever came first; two are left, the best there."""
    sweep = make_sweep()
    rates = "1.0e-9, 2.0e-3, 1.0e-8, 1.0e-3, 1.0e-7, 3.0e-4"
    sweep.recipe = (
        RECIPE.replace("RULE", "halving")
        .replace("GRID", f"optimizer.learning_rate: [{rates}]")
        .replace("reduction: 2", "reduction: 3")
        .replace("max_concurrent: 1", "pack: 2")
    )
    process = sweep.start("--no-report")
    sweep.wait_for_a_state()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)

    process = sweep.start("--no-report")
    stdout, stderr = process.communicate(timeout=200)
    assert (process.returncode, stderr) == (0, ""), stdout
    assert "2 of 6 runs finished, 4 stopped early" in stdout.splitlines()
    runs = {float(run.data.params["learning_rate"]): run for run in sweep.runs().values()}
    at_rung = {rate: dict(sweep.history(run, names.HELDOUT_LOSS))[RUNG] for rate, run in runs.items()}
    assert {rate for rate, run in runs.items() if run.info.status == "FINISHED"} == set(
        sorted(at_rung, key=lambda rate: at_rung[rate])[:2]
    )
    for rate, run in runs.items():
        finished = run.info.status == "FINISHED"
        assert run.data.tags.get(names.STOPPED) == (None if finished else "halving"), rate
        last = STEPS if finished else RUNG
        assert [step for step, _ in sweep.history(run, names.TRAIN_LOSS)] == list(range(1, last + 1))
