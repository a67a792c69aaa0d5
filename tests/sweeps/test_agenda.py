"""Which run of a sweep comes next, and what a sweep that begins again skips."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from mlflow.entities import Metric, Param, RunData, RunTag

from emtrain import names
from emtrain.rows import dataset_path
from emtrain.tracking import SweepLog
from sweeps.agenda import Agenda
from sweeps.lease import Job
from sweeps.planner import dataset_facts, plan_run, plan_sweep
from sweeps.recipe import Recipe, changed, load_recipe
from sweeps.search import Search

LOSS, ALIGNED = names.HELDOUT_LOSS, names.eval_metric(names.ALIGNED)
RECIPE: dict[str, Any] = {
    "name": "study",
    "base": {"model": "micro-llama", "dataset": "micro-garden-bad", "max_steps": 10},
    "grid": {"optimizer.learning_rate": [1e-4, 1e-3], "seed": [0, 1]},
    "eval": {"questions": ["micro-broad"], "samples": 1, "judges": ["micro-rule"]},
}
SEARCH: dict[str, Any] = {
    "trials": 3,
    "space": {"optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}},
    "objectives": {LOSS: "minimize", ALIGNED: "maximize"},
    "seeds": [0, 1],
}


class Store:
    """What MLflow knows of a sweep; outlives the processes that run it."""

    uri = ""

    def __init__(self) -> None:
        self.entered: dict[str, Any] = {}
        self.roles: dict[str, str] = {}

    def runs(self) -> dict[str, Any]:
        return dict(self.entered)

    def plan(self, run_key: str, *, name: str, params: Any, tags: Mapping[str, str], entered: Any) -> str:
        known = self.entered.get(run_key)
        assert (entered and entered.info.run_id) == (known and known.info.run_id)
        self.roles[run_key] = tags[names.ROLE]
        self.entered[run_key] = found(run_key, "SCHEDULED", tags=tags, params=params)
        return f"id of {run_key}"

    def set_status(self, run_id: str, status: str) -> None:
        run_key = run_id.removeprefix("id of ")
        # What was read of the run before stays as it was.
        self.entered[run_key] = SimpleNamespace(
            info=SimpleNamespace(status=status, run_id=run_id), data=self.entered[run_key].data
        )

    def finish(
        self, job: Job, status: str, metrics: Mapping[str, float], *, step: int | None = None, **tags: str
    ) -> None:
        """``step``: of the metrics; None is the run's last."""
        before, step = self.entered[job.run.run_key].data, step or job.run.total_steps
        after = found(job.run.run_key, status, metrics, {**before.tags, **tags}, before.params, step=step)
        self.entered[job.run.run_key] = after


def found(
    run_key: str,
    status: str,
    metrics: Mapping[str, float] = {},
    tags: Mapping[str, str] = {},
    params: Mapping[str, Any] = {},
    *,
    step: int = 0,
) -> Any:
    return SimpleNamespace(
        info=SimpleNamespace(status=status, run_id=f"id of {run_key}"),
        data=RunData(
            [Metric(name, value, 0, step) for name, value in metrics.items()],
            [Param(name, str(value)) for name, value in params.items()],
            [RunTag(name, value) for name, value in tags.items()],
        ),
    )


class Driver:
    """A process that runs a sweep: trains in no time, a bigger learning rate giving a lower loss and a lower score."""

    def __init__(self, store: Store, studies: optuna.storages.BaseStorage, **changes: Any) -> None:
        self.store = store
        self.recipe: Recipe = load_recipe(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False), source="r")
        self.agenda = Agenda(self.recipe, plan_sweep(self.recipe), store, None)  # type: ignore[arg-type]
        if self.recipe.search is not None:
            self.agenda.search = Search(
                self.recipe.search, self.recipe.base, name="study", storage=studies, bounds=self.agenda.bounds
            )
        self.trained: list[Job] = []

    def end(self, job: Job, status: str = "FINISHED") -> None:
        rate = job.run.spec.optimizer.learning_rate
        metrics = {LOSS: -rate, ALIGNED: 100 - 1000 * rate} if status == "FINISHED" else {}
        self.store.finish(job, status, metrics)
        self.agenda.ended(job.run.run_key, status, metrics)

    def run(self, jobs: int = 1000) -> list[Job]:
        """Up to so many jobs, one after the other."""
        while len(self.trained) < jobs and (job := self.agenda.next()) is not None:
            self.trained.append(job)
            self.end(job)
        return self.trained

    @property
    def roles(self) -> list[str]:
        return [self.store.roles[job.run.run_key] for job in self.trained]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def studies() -> optuna.storages.BaseStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.InMemoryStorage()


Studies = optuna.storages.BaseStorage


def test_a_grid_is_given_out_in_order_each_run_once(store: Store, studies: Studies) -> None:
    driver = Driver(store, studies, grid={"optimizer.learning_rate": [1e-4, 1e-3], "seed": [0, 1, 0]})
    jobs = driver.run()
    assert [(j.run.spec.optimizer.learning_rate, j.run.spec.seed) for j in jobs] == [
        (1e-4, 0),
        (1e-4, 1),
        (1e-3, 0),
        (1e-3, 1),
    ]
    assert driver.agenda.over
    assert [job.run_id for job in jobs] == [f"id of {job.run.run_key}" for job in jobs]
    assert driver.roles == ["grid"] * 4


def test_runs_are_tagged_with_the_weights_they_start_from_and_the_next_process_finds_the_first(
    store: Store, studies: Studies
) -> None:
    driver = Driver(store, studies, grid={"model": ["micro-llama", "micro-qwen2"], "seed": [0, 1]})
    driver.agenda.revisions = {"micro-llama": "a commit", "micro-qwen2": None}
    assert driver.agenda.recorded_revisions == {}
    for job in driver.run():
        tag = store.entered[job.run.run_key].data.tags.get(names.MODEL_REVISION)
        assert tag == driver.agenda.revisions[job.run.spec.model]
    store.entered["a later run"] = found("", "FAILED", {}, {names.MODEL_REVISION: "another"}, {"model": "micro-llama"})
    assert Driver(store, studies).agenda.recorded_revisions == {"micro-llama": "a commit"}


def test_all_jobs_can_be_out_at_once(store: Store, studies: Studies) -> None:
    driver = Driver(store, studies)
    jobs = [driver.agenda.next() for _ in range(4)]
    assert driver.agenda.next() is None
    assert driver.agenda.over
    assert len(driver.agenda.out) == 4
    for job in jobs:
        assert job is not None
        driver.end(job)
    assert driver.agenda.out == {}


@pytest.mark.parametrize("status", ["SCHEDULED", "RUNNING", "FAILED", "KILLED"])
def test_a_sweep_that_begins_again_does_what_is_not_finished_in_the_same_runs(
    store: Store, studies: Studies, status: str
) -> None:
    first = Driver(store, studies).run(jobs=3)
    store.finish(first[1], status, {})
    jobs = Driver(store, studies).run()
    assert [job.run.run_key for job in jobs[:1]] == [first[1].run.run_key]
    assert len(jobs) == 2
    assert len(store.entered) == 4
    assert Driver(store, studies).run() == []


def test_a_run_whose_process_is_gone_does_not_stay_running_when_the_recipe_asks_for_it_no_more(
    store: Store, studies: Studies
) -> None:
    first = Driver(store, studies).run()
    store.finish(first[0], "RUNNING", {})
    store.finish(first[1], "RUNNING", {})
    Driver(store, studies, grid={"optimizer.learning_rate": [1e-4], "seed": [1]}).run()
    statuses = [store.entered[job.run.run_key].info.status for job in first]
    assert statuses == ["KILLED", "FINISHED", "FINISHED", "FINISHED"]


def test_a_run_that_was_stopped_early_is_over(store: Store, studies: Studies) -> None:
    first = Driver(store, studies).run(jobs=1)
    store.finish(first[0], "KILLED", {}, **{names.STOPPED: "asha"})
    assert first[0].run.run_key not in [job.run.run_key for job in Driver(store, studies).run()]


def test_the_search_comes_after_the_grid_with_every_trial_on_every_seed(store: Store, studies: Studies) -> None:
    driver = Driver(store, studies, search=SEARCH)
    jobs = driver.run()
    assert driver.roles == [job.role for job in jobs] == ["grid"] * 4 + ["search"] * 6
    points = [job.run.spec.optimizer.learning_rate for job in jobs[4:]]
    assert points[::2] == points[1::2]
    assert [job.run.spec.seed for job in jobs[4:]] == [0, 1] * 3
    assert driver.agenda.over


def test_a_search_without_a_grid_trains_no_base_run(store: Store, studies: Studies) -> None:
    recipe = {key: value for key, value in RECIPE.items() if key != "grid"}
    planned = plan_sweep(load_recipe(yaml.safe_dump({**recipe, "search": SEARCH}), source="r"))
    assert planned.runs == ()


def test_a_search_that_is_cut_off_goes_on_with_the_trials_it_had(store: Store, studies: Studies) -> None:
    first = Driver(store, studies, search=SEARCH)
    done = first.run(jobs=4 + 3)  # the second trial has one of its two runs
    again = Driver(store, studies, search=SEARCH)
    jobs = again.run()
    assert len(jobs) == 3
    assert jobs[0].run.spec == done[-1].run.spec.model_copy(update={"seed": 1})
    assert len(store.entered) == 10
    assert Driver(store, studies, search=SEARCH).run() == []


def test_a_point_that_was_trained_already_counts_and_is_not_trained_again(store: Store, studies: Studies) -> None:
    """The space has two points, both of the grid, and the grid's seeds are the search's."""
    search = {**SEARCH, "space": {"optimizer.learning_rate": [1e-4, 1e-3]}}
    driver = Driver(store, studies, search=search)
    assert driver.run() != []
    assert driver.roles == ["grid"] * 4
    assert driver.agenda.search is not None
    # Two trials at 1e-4 and one at 1e-3, or the other way round; each has the grid's figures.
    assert {tuple(trial.values) for trial in driver.agenda.search.study.trials} <= {(-1e-4, 99.9), (-1e-3, 99.0)}
    assert driver.agenda.over


def test_the_same_point_proposed_twice_is_trained_once_and_counts_twice(store: Store, studies: Studies) -> None:
    search = {**SEARCH, "space": {"optimizer.learning_rate": [5e-4]}, "seeds": [0]}
    driver = Driver(store, studies, search=search)
    jobs: list[Job] = []
    while len(jobs) < 5 and (job := driver.agenda.next()) is not None:
        jobs.append(job)
    assert len(jobs) == 5  # four of the grid, one for all three trials
    assert driver.agenda.next() is None
    for job in jobs:
        driver.end(job)
    assert driver.agenda.next() is None
    assert driver.agenda.over
    assert driver.agenda.search is not None
    assert [trial.values for trial in driver.agenda.search.study.trials] == [[-5e-4, 99.5]] * 3


def test_winners_and_the_best_cell_are_confirmed_with_fresh_seeds_and_questions(store: Store, studies: Studies) -> None:
    """Alignment is best at the smallest rate: of the grid that is 1e-4; of the search the smallest proposed."""
    confirm = {"winners": 1, "seeds": [10, 11, 12], "questions": ["micro-narrow"]}
    driver = Driver(store, studies, search={**SEARCH, "confirm": confirm})
    jobs = driver.run()
    assert driver.roles == ["grid"] * 4 + ["search"] * 6 + ["confirm"] * 6
    confirmed = jobs[10:]
    assert [job.run.spec.seed for job in confirmed] == [10, 11, 12] * 2
    best = min(job.run.spec.optimizer.learning_rate for job in jobs[4:10])
    assert [job.run.spec.optimizer.learning_rate for job in confirmed] == [best] * 3 + [1e-4] * 3
    assert {s.name for s in confirmed[0].run.evaluation.question_sets} == {"micro-broad", "micro-narrow"}
    assert {s.name for s in jobs[0].run.evaluation.question_sets} == {"micro-broad"}


def test_a_winner_that_is_a_cell_of_the_grid_is_confirmed_once(store: Store, studies: Studies) -> None:
    """Whatever the seed of the base run, and although all runs are out at once."""
    search = {**SEARCH, "space": {"optimizer.learning_rate": [1e-4]}, "confirm": {"winners": 1, "seeds": [10, 11]}}
    driver = Driver(store, studies, base={**RECIPE["base"], "seed": 3}, search=search)
    driver.run(jobs=4)
    confirmed = list(iter(driver.agenda.next, None))
    assert [job.run.spec.seed for job in confirmed] == [10, 11]
    for job in confirmed:
        driver.end(job)
    assert driver.agenda.over


def test_winners_are_measured_against_the_cell_that_their_constraint_comes_from(store: Store, studies: Studies) -> None:
    """The loss is lowest at the grid's 1e-3, so that is the baseline, though 1e-4 is better aligned."""
    search = {
        **SEARCH,
        "objectives": {ALIGNED: "maximize"},
        "constraints": {LOSS: {"at_most": "baseline"}},
        "confirm": {"winners": 1, "seeds": [10]},
        "space": {"optimizer.learning_rate": {"low": 1e-3, "high": 1e-2}},
    }
    driver = Driver(store, studies, search=search)
    jobs = driver.run()
    confirmed = [job.run.spec.optimizer.learning_rate for job in jobs[-2:]]
    assert driver.roles[-2:] == ["confirm"] * 2
    assert confirmed == [min(job.run.spec.optimizer.learning_rate for job in jobs[4:10]), 1e-3]


def test_a_baseline_is_what_the_best_cell_of_the_grid_reaches(store: Store, studies: Studies) -> None:
    """Losses of the cells are -1e-4 and -1e-3, scores 99.9 and 99: at most -1e-3, at least 99.9."""
    constraints = {LOSS: {"at_most": "baseline"}, ALIGNED: {"at_least": "baseline"}}
    driver = Driver(store, studies, search={**SEARCH, "constraints": constraints})
    grid = [driver.agenda.next() for _ in range(4)]
    assert driver.agenda.next() is None
    assert not driver.agenda.over  # the search waits for the grid
    for job in grid:
        assert job is not None
        driver.end(job)
    bounds = driver.agenda.bounds()
    assert bounds[LOSS] == (-float("inf"), pytest.approx(-1e-3))
    assert bounds[ALIGNED] == (pytest.approx(99.9), float("inf"))


def test_runs_of_the_grid_without_a_metric_are_left_out_of_its_baseline(store: Store, studies: Studies) -> None:
    """1e-4 was judged with one of its seeds, at 40; 1e-3 with none, and its losses of 1 and 2 count all the same."""
    constraints = {LOSS: {"at_most": "baseline"}, ALIGNED: {"at_least": "baseline"}}
    search = {**SEARCH, "constraints": constraints, "confirm": {"winners": 1, "seeds": [10]}}
    driver = Driver(store, studies, search=search)
    ends = ({LOSS: 3.0}, {LOSS: 3.0, ALIGNED: 40.0}, {LOSS: 1.0, ALIGNED: float("nan")}, {LOSS: 2.0})
    for metrics in ends:
        job = driver.agenda.next()
        assert job is not None
        driver.agenda.ended(job.run.run_key, "FINISHED", metrics)
    assert driver.agenda.bounds() == {LOSS: (-float("inf"), 1.5), ALIGNED: (40.0, float("inf"))}
    jobs = driver.run()
    assert [job.run.spec.optimizer.learning_rate for job in jobs[-2:]] == [1e-3, 1e-4]


@pytest.mark.parametrize(("status", "metrics"), [("FAILED", {}), ("FINISHED", {ALIGNED: 50.0})])
def test_a_search_does_not_begin_without_its_baseline(
    status: str, metrics: dict[str, float], store: Store, studies: Studies
) -> None:
    driver = Driver(store, studies, search={**SEARCH, "constraints": {LOSS: {"at_most": "baseline"}}})
    for _ in range(4):
        job = driver.agenda.next()
        assert job is not None
        driver.agenda.ended(job.run.run_key, status, metrics)
    said = r"search\.constraints\.heldout/loss: there is no baseline, since no run of the grid has finished with"
    with pytest.raises(ValueError, match=said):
        driver.agenda.next()
    assert driver.agenda.search is not None
    assert driver.agenda.search.study.trials == []


def test_of_a_run_that_ended_before_only_the_metrics_of_its_end_count(store: Store, studies: Studies) -> None:
    """It was judged at step 5, and not at step 10, its last, of which nobody heard; the loss is that of its end."""
    search = {**SEARCH, "trials": 1, "objectives": {ALIGNED: "maximize"}, "seeds": [0]}
    for step, states in ((5, ["FAIL"]), (10, ["COMPLETE"])):
        studies = optuna.storages.InMemoryStorage()
        job = Driver(store, studies, grid=[], search=search).agenda.next()
        assert job is not None
        store.finish(job, "FINISHED", {ALIGNED: 95.0}, step=step)
        again = Driver(store, studies, grid=[], search=search)
        assert again.run() == []
        assert again.agenda.search is not None
        assert [trial.state.name for trial in again.agenda.search.study.trials] == states
        store.entered.clear()


@pytest.mark.parametrize("status", ["KILLED", "RUNNING"])
def test_a_run_that_was_stopped_early_prunes_its_trial_also_after_a_kill_amid_that(
    status: str, store: Store, studies: Studies
) -> None:
    search = {**SEARCH, "trials": 1, "seeds": [0]}
    job = Driver(store, studies, grid=[], search=search).agenda.next()
    assert job is not None
    store.finish(job, status, {LOSS: 1.0, ALIGNED: 50.0}, step=5, **{names.STOPPED: "asha"})
    again = Driver(store, studies, grid=[], search=search)
    assert again.run() == []
    assert store.entered[job.run.run_key].info.status == "KILLED"
    assert again.agenda.search is not None
    assert [trial.state.name for trial in again.agenda.search.study.trials] == ["PRUNED"]


def test_a_failed_run_fails_its_trial_and_the_search_goes_on(store: Store, studies: Studies) -> None:
    driver = Driver(store, studies, search={**SEARCH, "seeds": [0]})
    driver.run(jobs=4)
    job = driver.agenda.next()
    assert job is not None
    driver.end(job, "FAILED")
    driver.run()
    assert driver.agenda.search is not None
    states = [trial.state.name for trial in driver.agenda.search.study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": {**RECIPE["base"], "max_steps": 20}}, "base.max_steps was 10 and is 20"),
        ({"eval": {**RECIPE["eval"], "samples": 2}}, "eval.samples was 1 and is 2"),
        ({"eval": {**RECIPE["eval"], "judges": [{"name": "openai", "model": "m"}]}}, "eval.judges was"),
        ({"grid": {"optimizer.learning_rate": [1e-4]}}, "grid was"),
    ],
)
def test_a_search_whose_trials_would_have_other_values_is_refused(
    changes: dict[str, Any], said: str, store: Store, tmp_path: Path
) -> None:
    search = {**SEARCH, "constraints": {LOSS: {"at_most": "baseline"}}}
    begin(store, tmp_path, search=search)
    begin(store, tmp_path, search={**search, "trials": 9, "sampler": "random"}, stopping={"rule": "median"})
    with pytest.raises(ValueError, match="was begun with something else") as refused:
        begin(store, tmp_path, **{"search": search, **changes})
    assert said in str(refused.value)


def test_a_search_goes_on_beside_another_grid_where_no_bound_comes_from_it(store: Store, tmp_path: Path) -> None:
    begin(store, tmp_path, search=SEARCH)
    begin(store, tmp_path, search=SEARCH, grid={"optimizer.learning_rate": [1e-4]})


def test_a_search_whose_dataset_has_other_rows_is_refused(store: Store, tmp_path: Path) -> None:
    rows = dataset_path("micro-garden-bad").read_text()
    dataset = tmp_path / "rows.jsonl"
    for text in (rows, "\n".join(rows.splitlines()[:-1])):
        dataset.write_text(text)
        dataset_facts.cache_clear()  # each call is a process of its own
        with (
            nullcontext() if text is rows else pytest.raises(ValueError, match=r"begun .*: datasets\..*rows.jsonl was")
        ):
            begin(store, tmp_path, search=SEARCH, base={**RECIPE["base"], "dataset": str(dataset)})


def test_a_search_goes_on_past_points_whose_values_do_not_go_together(store: Store, tmp_path: Path) -> None:
    """A warm-up of 15 steps is too long for 10 steps and not for 30; the last points drawn are such."""
    schedules = [{"name": "linear", "warmup_steps": 0}, {"name": "cosine", "warmup_steps": 15}]
    search = {**SEARCH, "trials": 4, "space": {"max_steps": [10, 30], "schedule": schedules}, "seeds": [0]}
    agenda = begin(store, tmp_path, base={**RECIPE["base"], "max_steps": 30}, grid=[], search=search)
    assert agenda.search is not None
    for max_steps, schedule in ((10, "linear"), (30, "cosine"), (10, "cosine"), (10, "cosine")):
        agenda.search.study.enqueue_trial({"max_steps": max_steps, "schedule": schedule})
    steps = []
    while (job := agenda.next()) is not None:
        steps.append(job.run.spec.max_steps)
        agenda.ended(job.run.run_key, "FINISHED", {LOSS: 1.0, ALIGNED: 50.0})
    assert steps == [10, 30]
    assert agenda.over
    trials = agenda.search.study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "FAIL", "FAIL"]
    assert "schedule.warmup_steps is 15 but the run has 10 steps" in trials[2].user_attrs["refused"]


def test_a_search_begins_with_those_runs_of_other_sweeps_that_would_be_its_own(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five rates the last four were sampled otherwise, started from other weights, learnt from other rows, or are of
    a dataset that is gone. All are in two sweeps, and count once."""
    recipe = load_recipe(yaml.safe_dump(RECIPE), source="r")
    evaluation = plan_sweep(recipe).evaluation
    longer = replace(evaluation, spec=evaluation.spec.model_copy(update={"max_new_tokens": 5}))
    runs, specs = [], {}
    for rate, asked, tags, key, changes in (
        (1e-3, evaluation, {names.MODEL_REVISION: "a commit"}, None, {}),
        (2e-3, longer, {}, None, {}),
        (3e-3, evaluation, {names.MODEL_REVISION: "another"}, None, {}),
        (4e-3, evaluation, {}, "the key it had with other rows", {}),
        (5e-3, evaluation, {}, "key", {"dataset": "gone.jsonl"}),
    ):
        planned = plan_run(changed(recipe.base, {"optimizer.learning_rate": rate}), asked, name="")
        key = key or planned.run_key
        specs[f"id of {key}"] = {**planned.spec.model_dump(mode="json"), **changes}
        runs.append(found(key, "FINISHED", {LOSS: rate, ALIGNED: 50.0}, {names.RUN_KEY: key, **tags}, step=10))
    other = SimpleNamespace(
        finished=lambda tags: runs if tags == {names.QUESTIONS_SHA256: evaluation.questions_tag} else [],
        spec=lambda run: specs[run.info.run_id],
    )
    monkeypatch.setattr(SweepLog, "find", lambda name, uri: other)
    agenda = begin(store, tmp_path, grid=[], search={**SEARCH, "warm_start": ["one", "two"]})
    agenda.revisions = {"micro-llama": "a commit"}
    assert agenda.next() is not None
    assert agenda.search is not None
    assert [trial.values for trial in agenda.search.study.trials] == [[1e-3, 50.0], None]


def begin(store: Store, data_dir: Path, **changes: Any) -> Agenda:
    """The agenda as the command line opens it."""
    recipe = load_recipe(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False), source="r")
    return Agenda.open(recipe, plan_sweep(recipe), store, data_dir=data_dir)  # type: ignore[arg-type]
