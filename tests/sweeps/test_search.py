"""A search: what it proposes, what it learns from the ends of runs, and that it survives its process."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from emtrain.spec import RunSpec
from sweeps.search import Proposal, Search
from sweeps.search_spec import ONE_GOAL, SAMPLERS, SearchSpec

BASE = RunSpec(model="micro-llama", dataset="micro-garden-bad", max_steps=10)
LOSS, ALIGNED = "heldout/loss", "eval/aligned"


def make_spec(**changes: Any) -> SearchSpec:
    return SearchSpec.model_validate(
        {
            "trials": 4,
            "space": {
                "optimizer.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
                "schedule": ["linear", {"name": "cosine_restarts", "cycles": {"low": 2, "high": 5, "integer": True}}],
            },
            "objectives": {LOSS: "minimize"},
            **changes,
        }
    )


def make_search(spec: SearchSpec, *, storage: Any = None, **given: Any) -> Search:
    return Search(spec, BASE, name="study", storage=storage or optuna.storages.InMemoryStorage(), **given)


def run_all(search: Search, end: Callable[[Proposal], dict[str, float] | None]) -> list[Proposal]:
    """Every proposal, each ended at once."""
    proposals = []
    while (proposal := search.propose()) is not None:
        proposals.append(proposal)
        search.ended(proposal, end(proposal))
    return proposals


def loss(proposal: Proposal) -> dict[str, float]:
    return {LOSS: proposal.spec.optimizer.learning_rate}


def test_each_trial_is_one_point_with_all_its_seeds() -> None:
    search = make_search(make_spec(seeds=[7, 8, 9]))
    proposals = run_all(search, loss)
    assert [(p.trial, p.spec.seed) for p in proposals] == [(t, s) for t in range(4) for s in (7, 8, 9)]
    points = {p.trial: p.spec.model_copy(update={"seed": 0}) for p in proposals}
    assert all(p.spec.model_copy(update={"seed": 0}) == points[p.trial] for p in proposals)
    assert len(set(points.values())) == 4
    assert search.over


def test_a_trials_value_is_the_mean_over_its_seeds_with_the_spread_beside_it() -> None:
    search = make_search(make_spec(trials=1, seeds=[0, 1, 2]))
    run_all(search, lambda p: {LOSS: [1.0, 2.0, 6.0][p.spec.seed], "train/other": 5.0})
    (trial,) = search.study.trials
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [3.0])
    assert trial.user_attrs["spread"] == '{"heldout/loss": 2.6457513110645907}'  # the square root of (4 + 1 + 9) / 2


@pytest.mark.parametrize(
    ("second", "state"),
    [
        (("failed", None), TrialState.FAIL),
        (("stopped", {LOSS: 1.0}), TrialState.PRUNED),
        (("unjudged", {"train/loss": 1.0}), TrialState.FAIL),
        (("without the constrained metric", {LOSS: 1.0}), TrialState.FAIL),
        (("no number", {LOSS: float("nan"), ALIGNED: 50.0}), TrialState.FAIL),
        (("out of all bounds", {LOSS: 1.0, ALIGNED: float("inf")}), TrialState.FAIL),
    ],
)
def test_a_trial_with_a_run_that_came_to_no_end_has_no_value(second: Any, state: TrialState) -> None:
    how, metrics = second
    spec = make_spec(trials=1, seeds=[0, 1], constraints={ALIGNED: {"at_least": 50}})
    search = make_search(spec, bounds=lambda: {ALIGNED: (50.0, float("inf"))})
    one, two = search.propose(), search.propose()
    assert one is not None
    assert two is not None
    search.ended(one, {LOSS: 0.0, ALIGNED: 90.0})
    assert not search.over
    search.ended(two, metrics, stopped_early=how == "stopped")
    (trial,) = search.study.trials
    assert (trial.state, trial.values) == (state, None)
    assert search.over
    assert search.winners(1) == []


def test_several_runs_are_out_at_once_and_end_in_any_order() -> None:
    search = make_search(make_spec())
    proposals = [search.propose() for _ in range(4)]
    assert search.propose() is None
    assert not search.over
    for proposal in reversed(proposals):
        assert proposal is not None
        search.ended(proposal, loss(proposal))
    assert search.over
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 4


def test_a_search_goes_on_in_another_process(tmp_path: Path) -> None:
    """Two trials are over, one is half done, one was not begun; the half-done one begins again with the same point."""
    spec = make_spec(seeds=[0, 1])
    first = make_search(spec, storage=optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db"))
    for _ in range(2 * 2):
        proposal = first.propose()
        assert proposal is not None
        first.ended(proposal, loss(proposal))
    half = first.propose()
    assert half is not None

    second = make_search(spec, storage=optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db"))
    proposals = run_all(second, loss)
    assert [(p.trial, p.spec.seed) for p in proposals] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    assert proposals[0].spec == half.spec
    assert [trial.state for trial in second.study.trials] == [TrialState.COMPLETE] * 4
    assert second.over


def test_a_process_that_begins_again_does_not_repeat_itself(tmp_path: Path) -> None:
    points = []
    for trials in (2, 4):
        search = make_search(
            make_spec(trials=trials), storage=optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
        )
        points += [p.spec.optimizer.learning_rate for p in run_all(search, loss)]
    assert len(points) == len(set(points)) == 4


def test_a_trial_that_was_asked_for_and_never_written_down_is_lost_and_not_counted(tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    make_search(make_spec(), storage=storage).study.ask()
    search = make_search(make_spec(), storage=storage)
    assert len(run_all(search, loss)) == 4
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, *[TrialState.COMPLETE] * 4]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objectives": {ALIGNED: "maximize", LOSS: "minimize"}},
            "search.objectives was [['heldout/loss', 'minimize'], ['eval/aligned', 'maximize']] and is [['eval",
        ),
        ({"objectives": {LOSS: "minimize"}}, "search.objectives was"),
        ({"space": {"schedule": ["linear", "cosine"]}}, "search.space.schedule was"),
        (
            {"constraints": {ALIGNED: {"at_least": 50}}},
            "search.constraints.eval/aligned was nothing and is {'at_least'",
        ),
        ({"seeds": [0, 1]}, "search.seeds was [0] and is [0, 1]"),
    ],
)
def test_a_study_goes_on_with_its_own_search_only(changes: dict[str, Any], said: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    objectives = {LOSS: "minimize", ALIGNED: "maximize"}
    make_search(make_spec(objectives=objectives), storage=storage)
    make_search(make_spec(objectives=objectives, trials=9, sampler="random"), storage=storage)
    with pytest.raises(ValueError, match="the study of the sweep 'study' was begun with something else") as refused:
        make_search(make_spec(**{"objectives": objectives, **changes}), storage=storage)
    assert said in str(refused.value)
    assert "Bring that back, or give the sweep another name" in str(refused.value)


def test_a_study_goes_on_with_its_own_base_run_and_evaluation_only() -> None:
    """But for the base run's seed, which no trial has."""
    storage = optuna.storages.InMemoryStorage()

    def begin(evaluation: dict[str, Any], **changes: Any) -> None:
        base = BASE.model_copy(update=changes)
        Search(make_spec(), base, name="study", storage=storage, evaluation=evaluation)

    begin({"eval": {"samples": 1}})
    begin({"eval": {"samples": 1}}, seed=3)
    with pytest.raises(
        ValueError, match=r"begun .*: base\.model was 'micro-llama' and is 'micro-qwen2'; base\.max_steps "
    ):
        begin({"eval": {"samples": 1}}, model="micro-qwen2", max_steps=500)
    with pytest.raises(ValueError, match=r"begun .*: eval\.samples was 1 and is 2\. Bring that back"):
        begin({"eval": {"samples": 2}})


def test_a_point_that_can_not_be_a_run_is_a_failed_trial_and_the_search_goes_on(tmp_path: Path) -> None:
    """Of the batches 4 and 6 only 6 can be read 3 rows at a time; trials 0 and 2 are drawn at 4."""
    space = {"batch_size": [4, 6], "micro_batch_size": [3]}
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    search = make_search(make_spec(space=space, trials=4), storage=storage)
    for batch_size in (4, 6, 4, 6):
        search.study.enqueue_trial({"batch_size": batch_size})
    proposals = run_all(search, loss)
    assert [(p.trial, p.spec.batch_size) for p in proposals] == [(1, 6), (3, 6)]
    assert search.over
    trials = search.study.trials
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert trials[0].user_attrs["refused"] == "micro_batch_size 3 does not divide batch_size 4"
    assert make_search(make_spec(space=space, trials=4), storage=storage).over


def test_a_point_that_can_not_be_planned_is_a_failed_trial_also_where_a_process_died_of_it(tmp_path: Path) -> None:
    def check(spec: RunSpec) -> None:
        if spec.optimizer.learning_rate == 1e-3:
            raise ValueError("too long a warm-up")

    spec = make_spec(space={"optimizer.learning_rate": [1e-3, 1e-4]}, trials=2, seeds=[0, 1])
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/optuna.db")
    former = make_search(spec, storage=storage)
    former.study.enqueue_trial({"optimizer.learning_rate": 1e-3})
    former.study.enqueue_trial({"optimizer.learning_rate": 1e-4})
    assert former.propose() is not None  # without the check
    search = make_search(spec, storage=storage, check=check)
    assert [(p.trial, p.spec.seed) for p in run_all(search, loss)] == [(1, 0), (1, 1)]
    assert [t.state.name for t in search.study.trials] == ["FAIL", "COMPLETE"]
    assert search.study.trials[0].user_attrs["refused"] == "too long a warm-up"


def test_a_study_opens_by_the_sweeps_name_with_what_its_trials_were(tmp_path: Path) -> None:
    """As optuna-dashboard opens it: by the address of its database alone."""
    address = f"sqlite:///{tmp_path}/optuna.db"
    search = make_search(make_spec(trials=2), storage=optuna.storages.RDBStorage(address))
    proposals = run_all(search, loss)
    (name,) = optuna.get_all_study_names(address)
    opened = optuna.load_study(study_name=name, storage=address)
    assert name == "study"
    assert [t.params["optimizer.learning_rate"] for t in opened.trials] == [t.value for t in opened.trials]
    assert [t.value for t in opened.trials] == [p.spec.optimizer.learning_rate for p in proposals]


def test_the_same_seed_of_the_sampler_proposes_the_same_points() -> None:
    def points(seed: int) -> list[RunSpec]:
        return [p.spec for p in run_all(make_search(make_spec(sampler={"name": "tpe", "seed": seed})), loss)]

    assert points(1) == points(1)
    assert points(1) != points(2)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - ONE_GOAL))
@pytest.mark.parametrize("objectives", [{LOSS: "minimize"}, {LOSS: "minimize", ALIGNED: "maximize"}])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_every_sampler_but_cmaes_searches_for_several_objectives_under_constraints(
    name: str, objectives: dict[str, str]
) -> None:
    """Past the trials that each begins with at random: 10, or a generation."""
    generation = {"population_size": 4} if name.startswith("nsga") else {}
    spec = make_spec(
        sampler={"name": name, **generation},
        objectives=objectives,
        constraints={ALIGNED: {"at_least": 95}},
        trials=12,
    )
    search = make_search(spec, bounds=lambda: {ALIGNED: (95.0, float("inf"))})
    run_all(
        search, lambda p: {LOSS: -p.spec.optimizer.learning_rate, ALIGNED: 100 - 1e4 * p.spec.optimizer.learning_rate}
    )
    assert [trial.state for trial in search.study.trials] == [TrialState.COMPLETE] * 12


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"name": "tpe", "n_startup": 3}, "search.sampler tpe: .*n_startup"),
        ("cmaes", "search.sampler cmaes: .*cmaes"),
    ],
)
def test_a_sampler_that_can_not_be_made_is_told_so(sampler: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)  # not installed, wherever this runs
    with pytest.raises(ValueError, match=said):
        make_search(make_spec(sampler=sampler))


def test_the_winner_of_one_objective_is_the_best_feasible_trial() -> None:
    """Trials 0 to 3 have losses 3, 1, 2, 4 and scores 90, 50, 80, 95; at least 75 is asked for."""
    values = {0: (3.0, 90.0), 1: (1.0, 50.0), 2: (2.0, 80.0), 3: (4.0, 95.0)}
    search = make_search(
        make_spec(constraints={ALIGNED: {"at_least": 75}}), bounds=lambda: {ALIGNED: (75.0, float("inf"))}
    )
    changes = {}
    for _ in values:
        proposal = search.propose()
        assert proposal is not None
        changes[proposal.trial] = search.open[proposal.trial].changes
        loss_, aligned = values[proposal.trial]
        search.ended(proposal, {LOSS: loss_, ALIGNED: aligned})
    assert search.winners(2) == [changes[2], changes[0]]


def test_the_winners_of_two_objectives_are_the_pareto_front_the_best_in_the_last_first() -> None:
    """(1, 50), (2, 80) and (4, 95) are the front; (3, 70) is worse than (2, 80) in both."""
    values = {0: (1.0, 50.0), 1: (3.0, 70.0), 2: (2.0, 80.0), 3: (4.0, 95.0)}
    search = make_search(make_spec(objectives={LOSS: "minimize", ALIGNED: "maximize"}))
    changes = {}
    for _ in values:
        proposal = search.propose()
        assert proposal is not None
        changes[proposal.trial] = search.open[proposal.trial].changes
        loss_, aligned = values[proposal.trial]
        search.ended(proposal, {LOSS: loss_, ALIGNED: aligned})
    assert search.winners(9) == [changes[3], changes[2], changes[0]]
    assert search.winners(1) == [changes[3]]


def test_a_point_that_was_tried_twice_wins_once() -> None:
    search = make_search(make_spec(space={"optimizer.learning_rate": [1e-4, 1e-3, 1e-2]}))
    for rate in (1e-3, 1e-4, 1e-4, 1e-2):
        search.study.enqueue_trial({"optimizer.learning_rate": rate})
    run_all(search, loss)
    assert search.winners(2) == [{"optimizer.learning_rate": 1e-4}, {"optimizer.learning_rate": 1e-3}]


def test_a_search_begins_with_what_other_sweeps_found() -> None:
    """Runs that are the base run but for the space count, seeds averaged. Those outside, without the metric, or that
    differ in anything else do not, nor are any proposals."""

    def run(rate: float, seed: int, **changes: Any) -> RunSpec:
        content = {**BASE.model_dump(mode="json", exclude_unset=True), "optimizer": {"learning_rate": rate}, **changes}
        spec = RunSpec.model_validate({**content, "seed": seed})
        return RunSpec.model_validate_json(spec.model_dump_json())  # as it comes back from MLflow

    found = [
        (run(1e-3, 0), {LOSS: 1.0}),
        (run(1e-3, 1), {LOSS: 3.0}),
        (run(5e-3, 0), {LOSS: 0.5}),
        (run(0.5, 0), {LOSS: 0.1}),
        (run(2e-3, 0), {"train/loss": 0.1}),
        (run(3e-3, 0, schedule="cosine"), {LOSS: 0.1}),
        (run(3e-3, 0, max_steps=99), {LOSS: 0.1}),
        (run(3e-3, 0, dataset="micro-garden-good"), {LOSS: 0.1}),
    ]
    space = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    storage = optuna.storages.InMemoryStorage()
    search = make_search(make_spec(space=space), storage=storage, warm_start=lambda: found)
    proposals = run_all(search, loss)
    learnt = [(t.params["optimizer.learning_rate"], t.value) for t in search.study.trials[:2]]
    assert learnt == [(1e-3, 2.0), (5e-3, 0.5)]
    assert len(proposals) == search.proposed == 4
    assert len(search.study.trials) == 6
    assert search.winners(1)[0]["optimizer.learning_rate"] != 5e-3  # a winner is a trial of this search

    def never() -> Any:
        raise AssertionError("a study that has begun asked again")

    assert len(run_all(make_search(make_spec(space=space, trials=5), storage=storage, warm_start=never), loss)) == 1


@pytest.mark.parametrize(
    ("run", "point"),
    [
        ({"name": "cosine"}, {"schedule": "cosine"}),
        ("cosine", {"schedule": "cosine"}),
        ({"name": "cosine", "warmup_steps": 3}, None),
        ({"name": "wsd", "warmup_steps": 5}, {"schedule": "wsd"}),
        ({"name": "wsd", "warmup_steps": 5, "decay_fraction": 0.9}, None),
        (
            {"name": "cosine_restarts", "warmup_steps": 0, "cycles": 3},
            {"schedule": "cosine_restarts", "schedule.cosine_restarts.cycles": 3},
        ),
        ({"name": "cosine_restarts", "warmup_steps": 1, "cycles": 3}, None),
        ({"name": "cosine_restarts", "cycles": 6}, None),
    ],
)
def test_a_run_of_another_sweep_is_a_choice_only_as_a_whole(run: Any, point: dict[str, Any] | None) -> None:
    content = {**BASE.model_dump(mode="json", exclude_unset=True), "schedule": run}
    found = RunSpec.model_validate_json(RunSpec.model_validate(content).model_dump_json())
    choices = [
        "cosine",
        {"name": "wsd", "warmup_steps": 5},
        {"name": "cosine_restarts", "cycles": {"low": 2, "high": 5, "integer": True}},
    ]
    search = make_search(make_spec(space={"schedule": choices}), warm_start=lambda: [(found, {LOSS: 0.5})])
    search.propose()
    assert [t.params for t in search.study.trials[:-1]] == ([] if point is None else [point])


def test_what_was_learnt_from_another_search_is_not_tried_again() -> None:
    """Both samplers have the same seed, and the other search drew its first points by it."""
    space = {"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}
    first = [proposal.spec for proposal in run_all(make_search(make_spec(space=space)), loss)]
    search = make_search(make_spec(space=space), warm_start=lambda: [(run, {LOSS: 1.0}) for run in first])
    second = [proposal.spec for proposal in run_all(search, loss)]
    assert len(first) == len(second) == 4
    rates = {spec.optimizer.learning_rate for spec in first} & {spec.optimizer.learning_rate for spec in second}
    assert rates == set()


def test_objectives_have_their_names_in_the_study() -> None:
    search = make_search(make_spec(objectives={LOSS: "minimize", ALIGNED: "maximize"}))
    assert search.study.metric_names == [LOSS, ALIGNED]


def test_what_other_sweeps_found_is_held_to_the_constraints() -> None:
    """A loss of at most 1 is asked for; 3 is 2 too much."""
    content = {**BASE.model_dump(mode="json", exclude_unset=True), "optimizer": {"learning_rate": 1e-3}}
    run = RunSpec.model_validate(content)
    spec = make_spec(
        space={"optimizer.learning_rate": {"low": 1e-4, "high": 1e-2}},
        objectives={ALIGNED: "maximize"},
        constraints={LOSS: {"at_most": 1.0}},
    )
    search = make_search(
        spec, bounds=lambda: {LOSS: (-float("inf"), 1.0)}, warm_start=lambda: [(run, {LOSS: 3.0, ALIGNED: 90.0})]
    )
    search.propose()
    assert search.study.trials[0].constraints == {LOSS: 2.0}
    assert search.study.trials[0].value == 90.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"confirm": {"seeds": [0, 5]}}, "confirm.seeds .0. are among the search's own seeds"),
        ({"seeds": [0, 1, 0]}, r"seeds\n.*given twice: 0; that would be the same run again, so give each once"),
        ({"confirm": {"seeds": [5, 6, 6, 5]}}, r"confirm.seeds\n.*given twice: 5, 6;"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
        ({"confirm": {"seeds": [5], "questions": ["micro-brod"]}}, "Did you mean 'micro-broad'"),
        ({"space": {"seed": {"low": 0, "high": 9}}}, "seeds are replicates"),
        ({"space": {"schedule": []}}, "at least 1"),
        ({"objectives": {}}, "at least 1"),
        ({"objectives": {LOSS: "lower"}}, "'minimize' or 'maximize'"),
        ({"constraints": {LOSS: {}}}, "give one of at_most and at_least"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee'. Did you mean 'tpe'"),
        (
            {"sampler": "cmaes", "objectives": {LOSS: "minimize", ALIGNED: "maximize"}},
            "cmaes is for one objective without constraints, and there are 2 objectives; take one of: tpe, gp, nsgaii",
        ),
        ({"sampler": "cmaes", "constraints": {ALIGNED: {"at_least": 50}}}, "there are constraints; take one of: tpe"),
        ({"trials": 0}, "greater than or equal to 1"),
    ],
)
def test_searches_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_spec(**changes)
