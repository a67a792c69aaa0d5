"""The engine process without Ray or MLflow: running out of memory, and what is measured before it trains."""

import gc
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from emeval.spec import EvalSpec
from emtrain.packed.costs import CPU_TOKENS
from emtrain.packed.engine import Engine as PackedEngine
from emtrain.packed.run import Run
from emtrain.revision import Unavailable
from emtrain.spec import RunSpec
from emtrain.tokens import Example
from emtrain.train import Plan, Step, TrainingData
from sweeps import engine as module
from sweeps.engine import Engine
from sweeps.lane import Lane
from sweeps.lease import Ending, Job, Report
from sweeps.planner import Evaluation, PlannedRun, plan_run

STEPS, EVALUATED = 6, (3, 6)


@dataclass
class Record:
    """Keeps in memory what ``RunRecord`` writes."""

    run: PlannedRun
    plan: Plan
    steps: list[Step] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    on_keep: Callable[[], None] = lambda: None
    base_identity: str = "the base"
    tokens: int = 0

    def start(self, **facts: str) -> None: ...

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def keep(self, *arguments: Any) -> None:
        self.on_keep()

    def seed(self, step: int) -> int:
        return step

    def judge(self, responses: Any, *, step: int) -> Any:
        return SimpleNamespace(to_parquet=lambda path, index: path.touch())

    def record(self, judged: Any, loss: Any, *, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        return {"heldout/loss": loss.per_token}

    def finish(self, seconds: Any) -> Ending:
        return Ending("FINISHED")

    def fail(self, error: BaseException) -> Ending:
        return Ending("FAILED", str(error))


@pytest.fixture
def records(
    make_model: Callable[[], PreTrainedModel],
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Record]:
    """The records of all runs by their keys; the engine trains a tiny model in the place of the one that is named."""
    made: dict[str, Record] = {}

    def record(job: Job, setting: Any) -> Record:
        plan = Plan(STEPS, EVALUATED, tmp_path / job.run.run_key)
        return made.setdefault(job.run.run_key, Record(job.run, plan))

    monkeypatch.setattr(module, "RunRecord", record)
    monkeypatch.setattr(Engine, "_why_alone", lambda engine, spec: None)
    monkeypatch.setattr(module, "base_model", lambda *base: (make_model(), words))
    monkeypatch.setattr(module, "_ask", lambda run, model, tokenizer, *, seeds: [[] for _ in seeds])
    monkeypatch.setattr(module, "data_of", lambda *given, **where: TrainingData(examples[:30], examples[30:]))
    return made


def job(seed: int, **changes: Any) -> Job:
    content = {
        "model": "micro-llama",
        "dataset": "micro-garden-bad",
        "adapter": {"rank": 4, "dropout": 0.2 if seed == 1 else 0.0},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "schedule": "constant",
        "batch_size": 4,
        "max_steps": STEPS,
        "seed": seed,
        **changes,
    }
    asked = EvalSpec.model_validate({"questions": ["micro-broad"], "samples": 1, "at": [0.5], "judges": ["micro-rule"]})
    return Job(plan_run(RunSpec.model_validate(content), Evaluation.load(asked), name=f"run {seed}"), "id")


def make_engine(data_dir: Any, **changes: Any) -> Engine:
    arguments = {"capacity": 4, "heaviest": {}, "only_base": None, "backend": "packed", **changes}
    setting: Any = SimpleNamespace(data_dir=data_dir, revisions={}, tracking_uri="nowhere://")
    return Engine(setting, **arguments)


def train(jobs: list[Job], tmp_path: Any, **changes: Any) -> tuple[Engine, dict[str, list[Report]]]:
    """Train to the end, each run asked for by a thread of its own; the engine and the reports by run key."""
    engine = make_engine(tmp_path, **changes)
    lanes = [engine._enter(job) for job in jobs]  # all are there before the first asks

    def ask(job: Job, lane: Lane) -> list[Report]:
        reports = [lane.reports.get(timeout=60)]
        while reports[-1].ending is None:
            reports.append(engine.advance(job))
        return reports

    with ThreadPoolExecutor(len(jobs)) as threads:
        told = list(threads.map(ask, jobs, lanes))
    return engine, {job.run.run_key: reports for job, reports in zip(jobs, told, strict=True)}


def failing(monkeypatch: pytest.MonkeyPatch, where: str, call: int, last: int | None = None) -> None:
    """Let memory run out at one call of a method of the packed engine, or of its runs, or on to the ``last`` call."""
    owner: Any = PackedEngine if hasattr(PackedEngine, where) else Run
    calls, original = [], getattr(owner, where)

    def method(*arguments: Any, **more: Any) -> Any:
        calls.append(arguments)
        if call <= len(calls) <= (last or call):
            raise torch.OutOfMemoryError("no memory left")
        return original(*arguments, **more)

    monkeypatch.setattr(owner, where, method)


@pytest.mark.parametrize(
    ("where", "call", "left"),
    # Three states are copied when the fourth run joins.
    [("_accumulate_gradients", 5, 2), ("acting_as", 5, 2), ("state", 5, 2), ("_enlarge", 2, 1)],
    ids=["in a step", "at an evaluation point", "when states are copied there", "when a run joins"],
)
def test_out_of_memory_halves_the_slots_and_costs_no_run_a_step(
    where: str, call: int, left: int, records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is taken once, with the numbers of an engine that never runs out."""
    # The last one has a greater rank than the others, so that the table must be enlarged for it.
    jobs = [*(job(seed) for seed in range(3)), job(3, adapter={"rank": 6})]
    train(jobs, tmp_path / "undisturbed")
    expected = {key: list(record.steps) for key, record in records.items()}
    records.clear()
    for state in tmp_path.glob("*/newest.safetensors"):
        state.unlink()
    failing(monkeypatch, where, call)
    engine, reports = train(jobs, tmp_path / "disturbed")
    assert set(engine.slots.values()) == {left}
    for key, record in records.items():
        assert reports[key][-1].ending == Ending("FINISHED")
        assert [report.steps for report in reports[key][:-1]] == [3]
        assert record.evaluated == [0, *EVALUATED]
        assert [step.step for step in record.steps] == list(range(1, STEPS + 1))
        assert [step.loss for step in record.steps] == pytest.approx([s.loss for s in expected[key]], rel=1e-4)


def test_a_run_that_is_too_much_by_itself_fails_and_says_so(
    records: dict[str, Record], examples: list[Example], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "_accumulate_gradients", 2, last=1000)
    first = job(0)
    engine, reports = train([first], tmp_path)
    assert reports[first.run.run_key][-1].ending == Ending("FAILED", "no memory left")
    longest = max(len(row.input_ids) for row in examples[:30])
    assert set(engine.pass_tokens.values()) == {longest}
    first = job(1)  # with dropout, which takes its micro-batches as they are
    engine, reports = train([first], tmp_path)
    assert reports[first.run.run_key][-1].ending == Ending("FAILED", "no memory left")
    assert engine.pass_tokens == {}


def test_a_run_alone_goes_on_in_smaller_passes(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(0)
    train([first], tmp_path / "undisturbed")
    expected = [step.loss for step in records.pop(first.run.run_key).steps]
    (tmp_path / first.run.run_key / "newest.safetensors").unlink()
    failing(monkeypatch, "_accumulate_gradients", 2, last=3)
    engine, reports = train([first], tmp_path / "disturbed")
    assert set(engine.slots.values()) == {1}, "first none may join"
    assert set(engine.pass_tokens.values()) == {CPU_TOKENS // 2}
    assert reports[first.run.run_key][-1].ending == Ending("FINISHED")
    assert [step.loss for step in records[first.run.run_key].steps] == pytest.approx(expected, rel=1e-4)


def test_a_neighbour_that_diverges_fails_alone(records: dict[str, Record], tmp_path: Any) -> None:
    sane, diverging = job(0), job(9, optimizer={"name": "sgd", "learning_rate": 1e30, "max_grad_norm": None})
    train([sane], tmp_path / "alone")
    alone = list(records.pop(sane.run.run_key).steps)
    (tmp_path / sane.run.run_key / "newest.safetensors").unlink()
    _, reports = train([sane, diverging], tmp_path / "together")
    ending = reports[diverging.run.run_key][-1].ending
    assert ending is not None
    assert ending.failure is not None
    assert "the update was not made" in ending.failure
    steps = records[sane.run.run_key].steps
    assert reports[sane.run.run_key][-1].ending == Ending("FINISHED")
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in alone], rel=1e-5)


def test_a_neighbour_whose_last_update_broke_it_is_not_sampled_with_the_others(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next token would be none of the vocabulary's, and end the sampling of all that pause together."""
    update, asked = Run.update, []

    def breaking(run: Run, *given: Any) -> Any:
        outcome = update(run, *given)
        if run.spec.seed == 9 and run.step == 3:
            run.row.values_P.fill_(math.nan)
        return outcome

    def ask(run: Any, model: Any, tokenizer: Any, *, seeds: list[int]) -> list[list[Any]]:
        asked.append(len(seeds))
        return [[] for _ in seeds]

    monkeypatch.setattr(Run, "update", breaking)
    monkeypatch.setattr(module, "_ask", ask)
    sane, broken = job(0), job(9)
    _, reports = train([sane, broken], tmp_path)
    assert [report.ending for report in reports[broken.run.run_key]] == [
        Ending("FAILED", "the held-out loss is nan after step 3 (learning rate 0.01); its update broke the parameters")
    ]
    assert reports[sane.run.run_key][-1].ending == Ending("FINISHED")
    assert asked == [1, 1, 1], "the base model, and one run at both of its evaluation points"


def test_a_run_that_was_killed_before_its_end_was_recorded_ends_with_the_metrics_of_its_last_point(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained alone: its state at the last step is there, so nothing is left to train or to evaluate."""
    stored = SimpleNamespace(metrics_at=lambda step: {"heldout/loss": 0.5} if step == STEPS else {})
    monkeypatch.setattr(Record, "log", stored, raising=False)
    monkeypatch.setattr("emtrain.trl_backend.train", lambda *given, **more: None)
    cut_off = job(0)
    _, reports = train([cut_off], tmp_path, backend="trl")
    assert [report.metrics for report in reports[cut_off.run.run_key]] == [{"heldout/loss": 0.5}]


def test_a_run_that_cannot_begin_is_told_why(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(job: Job, setting: Any) -> Record:
        raise ConnectionError("MLflow is away")

    monkeypatch.setattr(module, "RunRecord", away)
    report = make_engine(tmp_path).advance(job(0))
    assert report is not None
    assert report.ending == Ending("FAILED", "ConnectionError: MLflow is away")


def test_a_run_that_waits_for_a_slot_keeps_nothing_on_the_device_that_is_on_disk(
    records: dict[str, Record], tmp_path: Any
) -> None:
    engine = make_engine(tmp_path, capacity=1)
    first, second = job(0), job(1)
    assert engine.advance(first).steps == 3
    assert engine.advance(second).steps == 3
    assert engine.lanes[first.run.run_key].packed is None
    assert engine.lanes[first.run.run_key].state is None
    assert engine.advance(first).ending == Ending("FINISHED")
    assert [step.step for step in records[first.run.run_key].steps] == list(range(1, STEPS + 1))


def test_a_run_that_is_dropped_frees_its_slot_at_once(records: dict[str, Record], tmp_path: Any) -> None:
    engine = make_engine(tmp_path, capacity=1)
    stopped, following = job(0), job(1)
    assert engine.advance(stopped).steps == 3
    waiting = engine._enter(following)
    engine.drop(stopped.run.run_key)
    assert waiting.reports.get(timeout=60).steps == 3
    assert [step.step for step in records[stopped.run.run_key].steps] == [1, 2, 3]


def held(records: dict[str, Record], job: Job, tmp_path: Any) -> tuple[Event, Event]:
    """Keep a run, and the training thread with it, at each evaluation point: reached, and that it may go on."""
    reached, go_on = Event(), Event()

    def hold() -> None:
        reached.set()
        assert go_on.wait(60)

    plan = Plan(STEPS, EVALUATED, tmp_path / job.run.run_key)
    records[job.run.run_key] = Record(job.run, plan, on_keep=hold)
    return reached, go_on


def test_an_engine_gives_up_what_waits_for_a_slot_and_takes_it_again(records: dict[str, Record], tmp_path: Any) -> None:
    engine = make_engine(tmp_path, capacity=1)
    in_slot, kept, other, last = jobs = [job(seed) for seed in range(4)]
    reached, go_on = held(records, in_slot, tmp_path)
    lanes = [engine._enter(job) for job in jobs]
    assert reached.wait(60)
    engine.give_up([job.run.run_key for job in (in_slot, other, last)], most=1)
    assert lanes[3].reports.get(timeout=60) is None
    engine.give_up([in_slot.run.run_key, kept.run.run_key], most=2)
    assert lanes[1].reports.get(timeout=60) is None
    go_on.set()
    assert [lane.reports.get(timeout=60).steps for lane in (lanes[0], lanes[2])] == [3, 3]
    assert [engine.advance(job).steps for job in (kept, last)] == [3, 3]
    assert [engine.advance(job).ending for job in jobs] == [Ending("FINISHED")] * 4


def test_a_run_that_has_begun_is_given_up_where_all_that_it_has_reached_is_on_disk(
    records: dict[str, Record], tmp_path: Any
) -> None:
    """The first has given way to the second at step 3, and would go on; it is taken up from there."""
    engine = make_engine(tmp_path, capacity=1)
    first, second = job(0), job(2)
    train([first], tmp_path / "undisturbed")
    expected = records.pop(first.run.run_key).steps
    (tmp_path / first.run.run_key / "newest.safetensors").unlink()
    assert engine.advance(first).steps == 3
    reached, go_on = held(records, second, tmp_path)
    engine._enter(second)
    assert reached.wait(60)
    lane = engine.lanes[first.run.run_key]
    engine.give_up([first.run.run_key], most=1)
    assert first.run.run_key in engine.lanes, "it has not been asked for: its trial holds its report"
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(engine.advance, first)
        while lane.paused:
            time.sleep(0.01)
        engine.give_up([first.run.run_key], most=1)
        assert asked.result(timeout=60) is None
    go_on.set()
    assert engine.advance(first).ending == Ending("FINISHED")
    steps = records[first.run.run_key].steps
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], rel=1e-4)


def test_a_run_that_is_being_judged_does_not_hold_the_only_slot(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first waits for its judge, at step 3, the second trains; then both end as if they had been alone."""
    first, second = job(0), job(1)
    train([first, second], tmp_path / "undisturbed")
    expected = {key: list(record.steps) for key, record in records.items()}
    records.clear()
    for state in tmp_path.glob("*/newest.safetensors"):
        state.unlink()
    answer, judge = Event(), Record.judge

    def slow(record: Record, responses: Any, *, step: int) -> Any:
        if record.run.run_key == first.run.run_key and step == 3:
            assert answer.wait(60)
        return judge(record, responses, step=step)

    monkeypatch.setattr(Record, "judge", slow)
    engine = make_engine(tmp_path, capacity=1)
    lane = engine._enter(first)
    assert engine.advance(second).steps == 3
    assert lane.reports.empty()
    answer.set()
    assert lane.reports.get(timeout=60).steps == 3
    assert [engine.advance(job).ending for job in (first, second)] == [Ending("FINISHED")] * 2
    for key, record in records.items():
        assert [step.loss for step in record.steps] == pytest.approx([s.loss for s in expected[key]], rel=1e-4)


def test_an_engine_packs_as_many_runs_as_it_has_measured_to_be_worth_it(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emtrain.packed import gain

    monkeypatch.setattr(gain, "cache_dir", lambda: tmp_path)
    seconds = {1: 2.0, 2: 1.0}
    monkeypatch.setattr(gain, "_measure", lambda model, spec, data, runs: gain._Point(seconds[runs], 1))
    jobs = [job(seed) for seed in range(3)]
    engine, reports = train(jobs, tmp_path, capacity=2, heaviest={jobs[0].base: jobs[0].run})
    assert engine.slots == {jobs[0].base: 2}
    assert all(told[-1].ending == Ending("FINISHED") for told in reports.values())


@pytest.mark.parametrize("beforehand", [False, True], ids=["when it is wanted", "before a run asks"])
def test_a_base_that_cannot_be_loaded_is_no_reason_to_stop_and_told_to_the_run_that_wants_it(
    beforehand: bool, records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*base: str) -> Any:
        raise OSError("no such model")

    monkeypatch.setattr(module, "base_model", unreadable)
    first = job(0)
    only_base = first.base if beforehand else None
    engine, reports = train([first], tmp_path, heaviest={first.base: first.run}, only_base=only_base)
    assert engine.packing(first.base) is None
    assert reports[first.run.run_key][-1].ending == Ending("FAILED", "no such model")


@pytest.mark.parametrize("asked", ["data_of", "base_model"], ids=["for the tokens", "for the weights"])
def test_a_run_whose_model_is_not_on_this_machine_may_be_trained_elsewhere(
    asked: str, records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*given: Any, **where: Any) -> Any:
        raise Unavailable("not the same here")

    monkeypatch.setattr(module, asked, unavailable)
    _, reports = train([job(0)], tmp_path)
    assert reports[job(0).run.run_key][-1].ending == Ending("FAILED", "not the same here", elsewhere=True)


def test_an_engine_loads_the_only_base_before_a_run_asks_for_it(
    records: dict[str, Record], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loaded = module.base_model, Event()

    def base_model(*base: Any) -> Any:
        loaded.set()
        return load(*base)

    monkeypatch.setattr(module, "base_model", base_model)
    make_engine(tmp_path, only_base=job(0).base)
    assert loaded.wait(60)
    assert gc.isenabled()
