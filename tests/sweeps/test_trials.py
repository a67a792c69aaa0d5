"""Trials of a real Tune on a real Ray, whose engines are scripted."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import tune

from emtrain.packed.gain import Packing
from sweeps.halving import Halving
from sweeps.lease import Ending, Report
from sweeps.trials import FAILURE, LACK, STATUS, Trial, TrialHost, in_one_process

pytestmark = pytest.mark.slow


class Engine:
    """Reports each run's evaluation at steps 5 and 10, then its end.

    Dies at the first call for a run named so, can't be reached by one named so, and gives one named so up. Lacks the
    model of a run named so, as does the other where nobody has it.
    """

    def __init__(self, scratch: str) -> None:
        self.scratch, self.reached = Path(scratch), dict[str, int]()

    def advance(self, job: Any) -> Report | None:
        key = job.run.run_key
        (self.scratch / f"{key}.began").touch()
        died = self.scratch / f"{key}.died"
        if key.startswith("deadly") or (key.startswith("dies") and not died.exists()):
            died.touch()
            os._exit(1)
        if key.startswith("unreachable") and not (away := self.scratch / f"{key}.away").exists():
            away.touch()
            raise ray.exceptions.ActorUnavailableError("the network is down", None)
        if key.startswith("queued") and not (given_up := self.scratch / f"{key}.given-up").exists():
            given_up.touch()
            return None
        lacks = self.scratch / f"{key}.lacks"
        if key.startswith("lacking") and ("nowhere" in key or not lacks.exists()):
            lacks.touch()
            return Report({}, 0, 0, Ending("FAILED", "no such model here", elsewhere=True))
        at = self.reached[key] = self.reached.get(key, 0) + 5
        ending = Ending("FINISHED") if at > 10 else None
        return Report({"heldout/loss": float(job.loss)}, at, 10 * at, ending)

    def packing(self, base: tuple[str, str]) -> Packing:
        time.sleep(2)
        (self.scratch / "measured").touch()
        return Packing(2, "measured", "here", {})

    def give_up(self, run_keys: Any, *, most: int) -> None:
        """Nothing waits for a slot here."""

    def drop(self, run_key: str) -> None:
        (self.scratch / f"{run_key}.dropped").touch()


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def fit(
    names: list[str],
    scratch: Path,
    *,
    at_once: int = 4,
    slots: int = 1,
    halving: Callable[[], Halving] | None = None,
    callbacks: Sequence[tune.Callback] = (),
    **config: Any,
) -> tune.ResultGrid:
    jobs = [SimpleNamespace(run=SimpleNamespace(run_key=n), base="model", loss=i) for i, n in enumerate(names)]
    make = ray.remote(Engine).options(num_cpus=0, max_restarts=-1, max_concurrency=8)
    engines = {f"engine-{number}": make.remote(str(scratch)) for number in range(2)}
    host = ray.remote(TrialHost).options(num_cpus=0, max_concurrency=16).remote(engines, slots=slots, halving=halving)
    packings = None if slots else host.pack.remote([("model", "auto")])
    with in_one_process(host):
        results = tune.Tuner(
            Trial,
            param_space={"job": tune.grid_search(jobs)},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, **config),
            run_config=tune.RunConfig(
                storage_path=str(scratch / "tune"),
                verbose=0,
                callbacks=[*callbacks],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    if packings is not None:
        assert ray.get(packings) == {"model": Packing(2, "measured", "here", {})}
    return results


def test_trials_begin_and_wait_while_it_is_being_measured_how_many_are_worth_packing(tmp_path: Path) -> None:
    """The engine that measures answers no run before it has, nor does the other."""
    results = fit(["run-0", "run-1"], tmp_path, slots=0)
    assert [result.metrics[STATUS] for result in results] == ["FINISHED"] * 2
    began = [(tmp_path / f"run-{number}.began").stat().st_mtime for number in range(2)]
    assert min(began) > (tmp_path / "measured").stat().st_mtime


def test_all_trials_live_in_one_process_and_reach_their_ends(tmp_path: Path) -> None:
    results = fit([f"run-{number}" for number in range(6)], tmp_path)
    assert [result.metrics[STATUS] for result in results] == ["FINISHED"] * 6
    assert [result.metrics["heldout/loss"] for result in results] == [0, 1, 2, 3, 4, 5]
    assert [result.metrics["training_iteration"] for result in results] == [3] * 6
    assert len({result.metrics["pid"] for result in results}) == 1
    assert os.getpid() not in {result.metrics["pid"] for result in results}


def test_tune_stops_a_trial_at_an_evaluation_point(tmp_path: Path) -> None:
    rule = tune.schedulers.AsyncHyperBandScheduler(
        time_attr="steps", metric="heldout/loss", mode="min", max_t=20, grace_period=5, reduction_factor=2
    )
    # One after the other, since the rule compares each with those that came before.
    results = fit(["good", "worse", "worst"], tmp_path, at_once=1, scheduler=rule)
    assert [result.metrics.get(STATUS) for result in results] == ["FINISHED", None, None]
    assert [result.metrics["steps"] for result in results[1:]] == [5, 5]


def test_runs_that_wait_for_each_other_leave_their_places_and_those_that_end_are_dropped(tmp_path: Path) -> None:
    """Six runs and four places: the last two come to the rung while the others wait there."""
    names = [f"run-{number}" for number in range(6)]
    halving = functools.partial(
        Halving,
        dict.fromkeys(names, (5,)),
        metric="heldout/loss",
        reduction=3,
        direction="minimize",
        known={},
        over=[],
    )
    results = fit(names, tmp_path, at_once=6, halving=halving)
    assert [result.metrics.get(STATUS) for result in results] == ["FINISHED"] * 2 + [None] * 4
    # An engine is told beside the end of its run; a winner that goes on at the other engine is dropped at its first.
    deadline = time.monotonic() + 20
    while not set(names[2:]) <= (dropped := {path.stem for path in tmp_path.glob("*.dropped")}):
        assert time.monotonic() < deadline, dropped
        time.sleep(0.1)


def test_a_run_that_its_engine_gives_up_is_leased_again(tmp_path: Path) -> None:
    results = fit(["queued", "well"], tmp_path)
    assert (tmp_path / "queued.given-up").exists()
    assert [result.metrics[STATUS] for result in results] == ["FINISHED", "FINISHED"]
    assert [result.metrics["training_iteration"] for result in results] == [3, 3]


def test_an_engine_that_could_not_be_reached_is_told_to_drop_the_run_that_is_leased_again(tmp_path: Path) -> None:
    """Alive, it may train on."""
    (found,) = fit(["unreachable"], tmp_path)
    assert (found.metrics[STATUS], found.metrics[FAILURE]) == ("FINISHED", None)
    assert (tmp_path / "unreachable.dropped").exists()


def test_a_run_whose_model_is_not_there_is_trained_by_another_engine_and_fails_where_none_has_it(
    tmp_path: Path,
) -> None:
    said = []

    class Listener(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            said.append(result[LACK])

    (found,) = fit(["lacking"], tmp_path, callbacks=[Listener()])
    assert (found.metrics[STATUS], found.metrics[FAILURE]) == ("FINISHED", None)
    assert said == ["no such model here", None, None], "told once"
    (failed,) = fit(["lacking-nowhere"], tmp_path)
    assert (failed.metrics[STATUS], failed.metrics[FAILURE]) == ("FAILED", "no such model here")
    assert failed.metrics[LACK] is None, "no other engine trains it"


def test_a_run_whose_engine_dies_goes_on_and_one_that_kills_every_engine_fails_alone(tmp_path: Path) -> None:
    results = fit(["dies-once", "well"], tmp_path)
    assert [result.metrics[STATUS] for result in results] == ["FINISHED", "FINISHED"]
    assert [result.metrics[FAILURE] for result in results] == [None, None]
    (failed,) = fit(["deadly"], tmp_path)
    assert "the engine process died 3 times under this run" in str(failed.error)
