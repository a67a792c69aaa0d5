"""Which engine gets which run, when engines come and go."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from sweeps import fleet as module
from sweeps.fleet import Fleet


@dataclass
class Call:
    """A call to an engine, as Ray gives a reference to it."""

    state: str = "waiting"  # "answered", "failed"


@dataclass
class Engine:
    """Ray's handle of an engine: it answers once it ``lives``."""

    lives: bool = True
    calls: list[Call] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.__dict__["__ray_ready__"] = SimpleNamespace(remote=self._call)
        self.drop = SimpleNamespace(remote=self.dropped.append)

    def _call(self) -> Call:
        self.calls.append(Call("answered" if self.lives else "waiting"))
        return self.calls[-1]

    def comes_up(self) -> None:
        self.lives = True
        self.calls[-1].state = "answered"


@pytest.fixture(autouse=True)
def _calls_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        return [c for c in calls if c.state != "waiting"], [c for c in calls if c.state == "waiting"]

    def get(call: Call) -> None:
        if call.state == "failed":
            raise RayActorError

    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=wait, get=get))


def job(key: str, base: str = "a model") -> Any:
    return SimpleNamespace(run=SimpleNamespace(run_key=key), base=base)


def leased(fleet: Fleet, key: str, base: str = "a model", **more: Any) -> str | None:
    lease = fleet.lease(job(key, base), **more)
    return None if lease is None else lease[0]


def test_runs_go_to_the_engine_with_the_fewest() -> None:
    fleet = Fleet({"one": Engine(), "two": Engine()}, capacity=2)
    assert sorted(str(leased(fleet, key)) for key in "abcd") == ["one", "one", "two", "two"]


def test_a_run_prefers_an_engine_that_holds_its_base() -> None:
    """Although the other one has fewer runs."""
    fleet = Fleet({"one": Engine(), "two": Engine()}, capacity=4)
    assert leased(fleet, "a", "this") == "one"
    assert leased(fleet, "b", "that") == "two"
    assert leased(fleet, "c", "this") == "one"
    assert leased(fleet, "d", "this") == "one"


def test_a_run_waits_when_every_slot_is_taken_and_gets_the_first_that_is_free() -> None:
    engine = Engine()
    fleet = Fleet({"one": engine}, capacity=1)
    assert leased(fleet, "a") == "one"
    assert leased(fleet, "b") is None
    fleet.release("a", drop=False)
    assert leased(fleet, "b") == "one"
    assert engine.dropped == []


def test_an_engine_whose_machine_is_still_coming_gets_nothing_until_it_answers() -> None:
    """A cloud takes minutes to start a machine, and may never find one; the others work meanwhile."""
    coming = Engine(lives=False)
    fleet = Fleet({"coming": coming, "there": Engine()}, capacity=1)
    assert leased(fleet, "a") == "there"
    assert leased(fleet, "b") is None
    coming.comes_up()
    assert leased(fleet, "b") == "coming"


def test_the_runs_of_an_engine_that_died_go_to_another_while_ray_starts_it_anew() -> None:
    lost = Engine()
    fleet = Fleet({"lost": lost, "left": Engine()}, capacity=4)
    assert leased(fleet, "a") == "lost"
    lost.lives = False
    assert leased(fleet, "a", died="lost") == "left"
    assert leased(fleet, "b") == "left"
    lost.comes_up()
    assert leased(fleet, "c") == "lost"


def test_a_call_that_died_with_its_engine_is_no_answer() -> None:
    lost = Engine()
    fleet = Fleet({"lost": lost}, capacity=4)
    lost.lives = False
    assert leased(fleet, "a", died="lost") is None
    lost.calls[-1].state = "failed"
    assert leased(fleet, "a") is None
    lost.comes_up()
    assert leased(fleet, "a") == "lost"


def test_a_run_that_was_stopped_early_is_dropped_by_its_engine() -> None:
    engine = Engine()
    fleet = Fleet({"one": engine}, capacity=1)
    leased(fleet, "a")
    fleet.release("a", drop=True)
    assert engine.dropped == ["a"]
    assert leased(fleet, "b") == "one"
