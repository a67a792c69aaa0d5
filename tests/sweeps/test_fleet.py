"""Which engine gets which run, when engines come and go."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from sweeps import fleet as module
from sweeps.fleet import ABSENT_SECONDS, AWAITED_SECONDS, LACKING_SECONDS, Fleet


@dataclass
class Call:
    """A call to an engine, as Ray gives a reference to it."""

    state: str = "waiting"  # "answered", "failed"


@dataclass
class Engine:
    """Ray's handle of an engine: it answers once it ``lives``."""

    lives: bool = True
    calls: list[Call] = field(default_factory=list)
    asked: list[tuple[list[str], int]] = field(default_factory=list)
    """The runs that it was asked to give up, and how many of them at most."""
    answer: Call = field(default_factory=lambda: Call("answered"))
    """To each such call."""
    dropped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.__dict__["__ray_ready__"] = SimpleNamespace(remote=self._call)
        self.give_up = SimpleNamespace(remote=self._give_up)
        self.drop = SimpleNamespace(remote=self._drop)

    def _drop(self, run_key: str) -> Call:
        self.dropped.append(run_key)
        return self._call()

    def _give_up(self, run_keys: list[str], *, most: int) -> Call:
        self.asked.append((run_keys, most))
        return self.answer

    def _call(self) -> Call:
        self.calls.append(Call("answered" if self.lives else "waiting"))
        return self.calls[-1]

    def comes_up(self) -> None:
        self.lives = True
        for call in self.calls:
            call.state = "answered"


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In the place of the time that goes by; and calls to engines are answered without Ray."""

    def wait(calls: list[Call], timeout: float, num_returns: int = 1) -> tuple[list[Call], list[Call]]:
        return [c for c in calls if c.state != "waiting"], [c for c in calls if c.state == "waiting"]

    def get(calls: list[Call]) -> None:
        if any(call.state == "failed" for call in calls):
            raise RayActorError

    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=wait, get=get))
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def job(key: str, base: str = "a model") -> Any:
    return SimpleNamespace(run=SimpleNamespace(run_key=key), base=base)


def leased(fleet: Fleet, key: str, base: str = "a model", **more: Any) -> str | None:
    lease = fleet.lease(job(key, base), **more)
    return None if lease is None else lease[0]


def leased_again(fleet: Fleet, key: str, *, died: bool = False) -> str | None:
    """After its engine has given it up, or died."""
    fleet.returned(job(key), died=died)
    return leased(fleet, key)


def test_runs_go_to_the_engine_with_the_fewest() -> None:
    fleet = Fleet({"one": Engine(), "two": Engine()}, slots=1)
    assert sorted(str(leased(fleet, key)) for key in "abcd") == ["one", "one", "two", "two"]


def test_a_run_prefers_an_engine_that_holds_its_base() -> None:
    """Although the other one has fewer runs."""
    fleet = Fleet({"one": Engine(), "two": Engine()}, slots=2)
    assert leased(fleet, "a", "this") == "one"
    assert leased(fleet, "b", "that") == "two"
    assert leased(fleet, "c", "this") == "one"
    assert leased(fleet, "d", "this") == "one"


def test_an_engine_has_two_runs_a_slot_and_the_next_one_waits_until_one_is_over() -> None:
    fleet = Fleet({"one": Engine()}, slots=1)
    assert (leased(fleet, "a"), leased(fleet, "b"), leased(fleet, "c")) == ("one", "one", None)
    assert leased(fleet, "a") == "one", "it has its place already"
    fleet.release("a")
    assert leased(fleet, "c") == "one"
    assert leased(fleet, "a") is None


def test_the_first_engine_to_answer_leaves_those_runs_to_the_others_that_it_could_only_queue(clock: Clock) -> None:
    """With two slots each: of eight runs four for each engine, whoever is there first."""
    coming = Engine(lives=False)
    fleet = Fleet({"there": Engine(), "coming": coming}, slots=2)
    assert [leased(fleet, key) for key in "abcdefgh"] == ["there", "there", *[None] * 6]
    clock.now = 5
    coming.comes_up()
    assert [leased(fleet, key) for key in "cdefgh"] == ["coming", "coming", "there", "coming", "there", "coming"]


def test_no_run_waits_for_an_engine_whose_machine_does_not_come(clock: Clock) -> None:
    """A cloud takes minutes to start a machine, and may never find one; it gets runs when it is there."""
    coming = Engine(lives=False)
    fleet = Fleet({"coming": coming, "there": Engine()}, slots=1)
    assert (leased(fleet, "a"), leased(fleet, "b")) == ("there", None)
    clock.now = AWAITED_SECONDS
    assert (leased(fleet, "b"), leased(fleet, "c")) == ("there", None)
    coming.calls[-1].state = "failed"  # and is called anew, which does not begin the time anew
    assert leased(fleet, "c") is None
    fleet.release("a")
    assert leased(fleet, "c") == "there"
    coming.comes_up()
    assert leased(fleet, "d") == "coming"


def test_a_run_that_had_waited_goes_on_where_it_is_in_memory_unless_another_engine_has_two_runs_less() -> None:
    fleet = Fleet({"one": Engine(), "two": Engine()}, slots=4)
    for key in "abcd":
        leased(fleet, key)
    for key in "abcd":  # all wait for each other
        fleet.release(key)
    assert leased(fleet, "b", held="two") == "two"
    assert leased(fleet, "d", held="two") == "two", "the other one has one less"
    assert leased(fleet, "e", held="two") == "one"


def test_an_engine_that_runs_out_of_runs_gets_half_of_what_another_one_has_more() -> None:
    """Two slots each; ``a``, ``c``, ``e``, ``g`` go to the first, the others to the second, which gets to its end."""
    first, second = Engine(), Engine()
    fleet = Fleet({"first": first, "second": second}, slots=2)
    assert [leased(fleet, key) for key in "abcdefgh"] == ["first", "second"] * 4
    for key in "bd":
        fleet.release(key)
    assert not first.asked, "the second one has a run for each of its slots"
    fleet.release("f")
    assert first.asked == [(["a", "c", "e", "g"], 1)]
    assert leased_again(fleet, "g") == "second"
    fleet.release("h")
    assert first.asked[1:] == [(["a", "c", "e"], 1)]
    assert leased_again(fleet, "e") == "second"
    fleet.release("c")
    fleet.release("g")
    assert len(first.asked) == 2, "each has one"


def test_an_engine_is_asked_again_when_it_has_answered_and_not_before() -> None:
    """Runs that were packed together end together: meanwhile none is released, but those that go on ask for theirs."""
    first, second = Engine(answer=Call("waiting")), Engine()
    fleet = Fleet({"first": first, "second": second}, slots=2)
    for key in "abcdefgh":
        leased(fleet, key)
    for key in "bdfh":
        fleet.release(key)
    assert first.asked == [(["a", "c", "e", "g"], 1)]
    assert leased_again(fleet, "g") == "second"
    assert len(first.asked) == 1
    first.answer.state = "answered"
    assert leased(fleet, "a") == "first"
    assert first.asked[1:] == [(["a", "c", "e"], 1)]


def test_an_engine_that_comes_late_gets_runs_that_are_leased_already(clock: Clock) -> None:
    there, coming = Engine(), Engine(lives=False)
    fleet = Fleet({"there": there, "coming": coming}, slots=2)
    clock.now = AWAITED_SECONDS
    for key in "abcd":
        assert leased(fleet, key) == "there"
    assert not there.asked
    coming.comes_up()
    assert leased(fleet, "a") == "there"
    assert there.asked == [(["a", "b", "c", "d"], 2)]


def test_runs_of_another_base_are_not_moved_to_an_engine_that_is_not_done_with_its_own() -> None:
    first, second = Engine(), Engine()
    fleet = Fleet({"first": first, "second": second}, slots=2)
    leased(fleet, "own", "this")
    for key in "abcd":
        assert leased(fleet, key, "that") == "second"
    assert not second.asked
    fleet.release("own")
    assert second.asked == [(["a", "b", "c", "d"], 2)]


def test_the_runs_of_an_engine_that_died_go_to_another_while_ray_starts_it_anew() -> None:
    lost = Engine()
    fleet = Fleet({"lost": lost, "left": Engine()}, slots=4)
    assert leased(fleet, "a") == "lost"
    lost.lives = False
    assert leased_again(fleet, "a", died=True) == "left"
    assert leased(fleet, "b") == "left"
    lost.comes_up()
    assert leased(fleet, "c") == "lost"


def test_an_engine_that_was_away_drops_what_another_took_over_before_it_gets_runs_again() -> None:
    """It may have been alive all the time, and told so for one run after the other."""
    away = Engine()
    fleet = Fleet({"away": away, "there": Engine()}, slots=4)
    assert [leased(fleet, key) for key in "abc"] == ["away", "there", "away"]
    away.lives = False
    assert leased_again(fleet, "a", died=True) == "there"
    away.calls[-1].state = "failed"  # the call to drop it, which is made again
    assert leased_again(fleet, "c", died=True) == "there"
    for call in away.calls[1:]:
        call.state = "answered"
    away.calls[-1].state = "waiting"
    assert leased(fleet, "d") == "there", "not all is dropped"
    away.comes_up()
    assert leased(fleet, "e") == "away"
    assert set(away.dropped) == {"a", "c"}
    calls = len(away.calls)
    fleet.returned(job("e"), died=True)
    assert (away.dropped[-1], len(away.calls)) == ("e", calls + 2), "the others are its own again, should they come"


def test_an_engine_whose_machine_lacks_the_base_gets_no_more_runs_on_it() -> None:
    """Runs on another base it gets, and after a death Ray may have started it elsewhere."""
    lacking, other = Engine(), Engine()
    fleet = Fleet({"lacking": lacking, "other": other}, slots=2)
    assert leased(fleet, "a") == "lacking"
    assert fleet.lacks("lacking", job("a"), tried=["lacking"])
    assert [leased_again(fleet, "a"), leased(fleet, "b"), leased(fleet, "c")] == ["other"] * 3
    assert not other.asked, "it has no run that the idle one could train"
    assert leased(fleet, "d", "another model") == "lacking"
    fleet.returned(job("d", "another model"), died=True)
    assert leased(fleet, "e") == "lacking"


def test_a_run_whose_base_no_engine_has_is_told_so_by_the_last_one(clock: Clock) -> None:
    """Where one does not come for half an hour that is the last one of those that are there."""
    coming = Engine(lives=False)
    fleet = Fleet({"there": Engine(), "coming": coming}, slots=1)
    assert leased(fleet, "a") == "there"
    assert fleet.lacks("there", job("a"), tried=["there"]), "the other one may have it"
    assert leased_again(fleet, "a") is None
    clock.now = 0.9 * LACKING_SECONDS
    assert leased(fleet, "a") is None
    clock.now = ABSENT_SECONDS
    assert leased(fleet, "a") == "there"
    assert not fleet.lacks("there", job("a"), tried=["there"])
    fleet.release("a")
    assert leased(fleet, "b") == "there"
    assert not fleet.lacks("there", job("b"), tried=["there"])


def test_runs_wait_for_the_engine_with_their_base_while_ray_starts_it_anew(clock: Clock) -> None:
    """Were they leased to the other one, they would fail one after the other."""
    owner = Engine()
    fleet = Fleet({"owner": owner, "lacking": Engine()}, slots=2)
    assert [leased(fleet, key) for key in "ab"] == ["owner", "lacking"]
    assert fleet.lacks("lacking", job("b"), tried=["lacking"])
    assert leased_again(fleet, "b") == "owner"
    owner.lives = False
    assert leased_again(fleet, "a", died=True) is None
    clock.now = 2 * AWAITED_SECONDS
    assert [leased(fleet, key) for key in "acd"] == [None] * 3
    owner.comes_up()
    assert [leased(fleet, key) for key in "ac"] == ["owner"] * 2


def test_an_engine_that_lacked_a_base_is_tried_again_after_a_while(clock: Clock) -> None:
    """The hub was away for a moment; a run that all engines failed is not tried for ever, however long that took."""
    fleet = Fleet({"one": Engine(), "two": Engine()}, slots=1)
    assert leased(fleet, "a") == "one"
    assert fleet.lacks("one", job("a"), tried=["one"])
    assert [leased_again(fleet, "a"), leased(fleet, "b"), leased(fleet, "c")] == ["two", "two", None]
    clock.now = LACKING_SECONDS
    assert leased(fleet, "c") == "one"
    assert not fleet.lacks("two", job("a"), tried=["one", "two"])


def test_a_call_that_died_with_its_engine_is_no_answer() -> None:
    lost = Engine()
    fleet = Fleet({"lost": lost}, slots=4)
    assert leased(fleet, "a") == "lost"
    lost.lives = False
    assert leased_again(fleet, "a", died=True) is None
    lost.calls[-1].state = "failed"
    assert leased(fleet, "a") is None
    lost.comes_up()
    assert leased(fleet, "a") == "lost"


def test_nothing_is_leased_before_it_is_known_how_many_runs_are_worth_packing(clock: Clock) -> None:
    """An engine that comes later is awaited from then on, however long that took."""
    coming = Engine(lives=False)
    fleet = Fleet({"there": Engine(), "coming": coming}, slots=0)
    assert leased(fleet, "a") is None
    clock.now += 10 * AWAITED_SECONDS
    fleet.open(slots=1)
    assert leased(fleet, "a") == "there"
    assert leased(fleet, "b") is None
    clock.now += AWAITED_SECONDS
    assert leased(fleet, "b") == "there"
