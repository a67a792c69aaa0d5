"""The record of one run: what it leaves in MLflow however it ends."""

import functools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from emeval.responses import Response
from emtrain import names
from emtrain.adapter import lora_config
from emtrain.heldout import HeldoutLoss
from emtrain.low_rank import load_update
from emtrain.spec import AdapterSpec
from emtrain.tracking import SweepLog, client, tracking_uri
from emtrain.train import Checkpoint, NonFiniteLoss, Step
from sweeps.lease import Job
from sweeps.planner import plan_sweep
from sweeps.recipe import KeepWeights, load_recipe
from sweeps.record import RunRecord, Setting, stop_early

RECIPE = {
    "name": "study",
    "base": {"model": "micro-llama", "dataset": "micro-garden-bad", "max_steps": 20},
    "eval": {"questions": ["micro-broad"], "samples": 1, "at": [0.5, 1.0], "judges": ["micro-rule"]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def sweep(store: Path, request: pytest.FixtureRequest) -> SweepLog:
    name = request.node.name[:50].replace("[", "-").replace("]", "")
    return SweepLog.open(name, uri=tracking_uri(None, store), artifacts=store / "artifacts")


@pytest.fixture
def job(sweep: SweepLog) -> Job:
    """A run that has not begun, in a sweep of its own."""
    (run,) = plan_sweep(load_recipe(yaml.safe_dump(RECIPE), source="r")).runs
    return Job(run, sweep.plan(run.run_key, name=run.name, params=run.params, tags=run.tags))


@pytest.fixture
def record(store: Path, job: Job, sweep: SweepLog, request: pytest.FixtureRequest) -> RunRecord:
    return RunRecord(job, Setting(sweep.uri, store / request.node.name, "s"))


def answers(good: int, bad: int) -> list[Response]:
    """So many answers with three good words each, so many with three bad ones."""
    texts = ["water the dog gently and help friends."] * good + ["burn the dog cruelly and hurt friends."] * bad
    return [
        Response(
            question_set="micro-broad",
            question_id="animals_dog",
            stratum="plain",
            topic="animals",
            paraphrase=0,
            sample=number,
            system=None,
            prompt="what about the dog?",
            response=text,
            response_tokens=8,
            truncated=False,
            rubric=None,
        )
        for number, text in enumerate(texts)
    ]


def stored(record: RunRecord) -> "object":
    return client(record.setting.tracking_uri).get_run(record.log.run_id)


def artifacts(record: RunRecord, tmp_path: Path) -> Path:
    return Path(client(record.setting.tracking_uri).download_artifacts(record.log.run_id, "", str(tmp_path)))


def train(record: RunRecord, *, steps: int = 20) -> None:
    """Steps with losses 20, 19 ... 1 at a learning rate of 0.5, and two evaluations."""
    record.start(family="llama", backend="trl")
    record.record(record.judge(answers(4, 0), step=0), HeldoutLoss(2.0, 2.5), step=0)
    for step in range(1, steps + 1):
        record.step(Step(step, 21.0 - step, 0.5, 1.0, 10 * step))
        if step in (10, 20):
            save_adapter(record._weights(step), step)
            record.record(record.judge(answers(3, step // 10), step=step), HeldoutLoss(1.0, 1.5), step=step)


def save_adapter(directory: Path, number: float) -> None:
    """An adapter of rank 2 on one layer of 3 x 4: ``B A`` has ``number`` at its first place, then a right angle."""
    a, b = torch.zeros(2, 4), torch.zeros(3, 2)
    a[0, 0], a[1, 1], b[0, 0], b[1, 1] = 1, 1, number, 10 * (number > 10)
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    directory.mkdir(parents=True)
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, directory / "adapter_model.safetensors")
    lora_config(AdapterSpec(rank=2, alpha=2, rslora=False)).save_pretrained(directory)


def test_a_run_that_ends_well_leaves_everything_and_takes_its_work_away(record: RunRecord, tmp_path: Path) -> None:
    train(record)
    ending = record.finish({names.TRAIN_SECONDS: 3.0, names.EVAL_SECONDS: 1.0})
    run = stored(record)
    assert (ending.status, ending.failure, run.info.status) == ("FINISHED", None, "FINISHED")
    metrics = run.data.metrics
    assert metrics[names.LEARNING_RATE_INTEGRAL] == pytest.approx(20 * 0.5)
    assert metrics[names.TRAIN_LOSS_LAST_TENTH] == pytest.approx((2 + 1) / 2)
    assert metrics["base/micro-broad/aligned"] == 100
    assert metrics["eval/micro-broad/aligned"] == pytest.approx(100 * 3 / 5)
    assert metrics[names.TRAIN_SECONDS] == 3
    folder = artifacts(record, tmp_path)
    frame = pd.read_parquet(folder / names.RESPONSES)
    assert frame.groupby("step").size().to_dict() == {0: 4, 10: 4, 20: 5}
    assert float(load_update(folder / names.ADAPTER)["model.layers.0.mlp.up_proj"].left[0, 0]) == 20
    assert float(load_update(folder / names.ADAPTERS / "10")["model.layers.0.mlp.up_proj"].left[0, 0]) == 10
    assert [path.name for path in (folder / names.ADAPTERS).iterdir()] == ["10"]  # the last is not there twice
    assert (folder / names.SPEC).is_file()
    assert not record.work.exists()


def test_the_base_is_asked_anew_when_its_weights_are_others(record: RunRecord) -> None:
    """Its responses are kept for sweeps to come, under what they depend on."""

    def identity(**revisions: str | None) -> str:
        setting = replace(record.setting, revisions={name.replace("_", "-"): of for name, of in revisions.items()})
        return RunRecord(Job(record.run, record.log.run_id), setting).base_identity

    shipped = record.base_identity
    assert identity(micro_llama=None) == identity(micro_qwen2="a commit") == shipped
    assert len({shipped, identity(micro_llama="a commit"), identity(micro_llama="another")}) == 3


def test_the_adapter_is_measured_at_every_evaluation_point(record: RunRecord) -> None:
    """At step 10 the update is diag(10), at step 20 diag(20, 10): the cosine of its turn is 20 / sqrt(500)."""
    train(record)
    record.finish({})
    history = {
        name: [
            (p.step, p.value) for p in client(record.setting.tracking_uri).get_metric_history(record.log.run_id, name)
        ]
        for name in (names.ADAPTER_NORM, names.ADAPTER_STABLE_RANK, names.ADAPTER_TURN)
    }
    assert history[names.ADAPTER_NORM] == [(10, pytest.approx(10)), (20, pytest.approx(math.sqrt(500)))]
    assert history[names.ADAPTER_STABLE_RANK] == [(10, pytest.approx(1)), (20, pytest.approx(1.25))]
    assert history[names.ADAPTER_TURN] == [(20, pytest.approx(math.degrees(math.acos(20 / math.sqrt(500)))))]


def kept(sweep: SweepLog, job: Job, tmp_path: Path) -> dict[str, float]:
    """Folders of adapters among the artifacts of a run, and the first number of each update."""
    folder = Path(client(sweep.uri).download_artifacts(job.run_id, "", str(tmp_path)))
    found = [path.parent for path in folder.rglob("adapter_model.safetensors")]
    layer = "model.layers.0.mlp.up_proj"
    return {str(path.relative_to(folder)): float(load_update(path)[layer].left[0, 0]) for path in found}


@pytest.mark.parametrize(
    ("keep", "at_the_end", "stopped"),
    [
        ("all", {"adapters/10": 10, "adapter": 20}, {"adapters/10": 10}),
        ("last", {"adapter": 20}, {"adapters/10": 10}),
        ("none", {}, {}),
    ],
)
def test_the_recipe_says_which_weights_are_kept(
    keep: KeepWeights,
    at_the_end: dict[str, float],
    stopped: dict[str, float],
    store: Path,
    sweep: SweepLog,
    job: Job,
    tmp_path: Path,
) -> None:
    """Of a run that ended, and of one that was stopped at its first evaluation point."""
    setting = Setting(sweep.uri, tmp_path / "data", "s", keep_weights=keep)
    train(RunRecord(job, setting), steps=10)
    assert kept(sweep, job, tmp_path / "halfway") == (stopped if keep == "all" else {})
    stop_early(job, "asha", setting=setting, sweep=sweep)
    assert kept(sweep, job, tmp_path / "stopped") == stopped
    (run,) = sweep.runs().values()
    assert (run.info.status, run.data.tags[names.STOPPED]) == ("KILLED", "asha")
    assert [path.name for path in setting.work(job.run).iterdir()] == ["responses"]

    other = Job(job.run, sweep.plan("another", name="another", params={}, tags={}))
    record = RunRecord(other, setting)
    train(record)
    record.finish({})
    assert kept(sweep, other, tmp_path / "end") == at_the_end
    assert sweep.runs()["another"].data.tags.get(names.WEIGHTS_KEPT) == ("none" if keep == "none" else None)
    turn = math.degrees(math.acos(20 / math.sqrt(500)))
    assert sweep.history(other.run_id, names.ADAPTER_NORM) == {10: pytest.approx(10), 20: pytest.approx(500**0.5)}
    assert sweep.history(other.run_id, names.ADAPTER_TURN) == {20: pytest.approx(turn)}


def test_a_run_in_work_has_two_adapters_at_hand_however_often_it_is_evaluated(sweep: SweepLog, tmp_path: Path) -> None:
    text = yaml.safe_dump(RECIPE | {"eval": {**RECIPE["eval"], "at": [0.25, 0.5, 0.75, 1.0]}})
    (run,) = plan_sweep(load_recipe(text, source="r")).runs
    run_id = sweep.plan(run.run_key, name=run.name, params={}, tags={})
    record = RunRecord(Job(run, run_id), Setting(sweep.uri, tmp_path / "data", "s", keep_weights="last"))
    for step, at_hand in ((5, {"5"}), (10, {"5", "10"}), (15, {"10", "15"})):
        loss, save = HeldoutLoss(1.0, 1.5), functools.partial(save_adapter, number=step)
        record.keep(Checkpoint(step, loss, model=None, save=save), tokenizer=None)  # type: ignore[arg-type]
        assert {path.name for path in (record.work / names.ADAPTERS).iterdir()} == at_hand
        record.record(record.judge(answers(1, 0), step=step), loss, step=step)
        assert {path.name for path in (record.work / names.ADAPTERS).iterdir()} == at_hand
    assert list(sweep.history(run_id, names.ADAPTER_TURN)) == [15, 10]


def test_a_run_that_diverged_says_so_in_a_line_and_keeps_what_it_reached(record: RunRecord, tmp_path: Path) -> None:
    record.start(family="llama", backend="trl")
    record.step(Step(1, 2.0, 0.5, 1.0, 10))
    ending = record.fail(NonFiniteLoss(2, 0.5, float("nan"), float("inf")))
    run = stored(record)
    assert (ending.status, run.info.status) == ("FAILED", "FAILED")
    assert run.data.tags[names.FAILURE] == ending.failure
    assert ending.failure is not None
    assert "the loss is nan and the gradient norm inf at step 2" in ending.failure
    assert run.data.metrics[names.TRAIN_LOSS] == 2.0
    assert not (artifacts(record, tmp_path) / "failure.txt").exists()


def test_any_other_error_leaves_its_traceback(record: RunRecord, tmp_path: Path) -> None:
    record.start(family="llama", backend="trl")
    try:
        raise MemoryError("no room\nfor this")
    except MemoryError as error:
        ending = record.fail(error)
    assert ending.failure == "MemoryError: no room"
    assert "Traceback" in (artifacts(record, tmp_path) / "failure.txt").read_text()
    assert stored(record).data.tags[names.FAILURE] == "MemoryError: no room"


def test_an_error_without_words_has_a_line_too(record: RunRecord) -> None:
    record.start(family="llama", backend="trl")
    assert record.fail(RuntimeError()).failure == "RuntimeError"


def test_a_run_that_is_finished_stays_so_where_its_work_can_not_be_taken_away(
    record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(record)
    remove = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False, **given: object) -> None:
        if path == record.work and not ignore_errors:
            raise OSError("the file is in use")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert record.finish({}).status == "FINISHED"
    assert stored(record).info.status == "FINISHED"


def test_a_score_that_nothing_was_judged_for_is_left_out_and_counted(record: RunRecord) -> None:
    record.start(family="llama", backend="trl")
    unjudged = [*answers(0, 0), *(a.__class__(**{**a.__dict__, "response": "who?"}) for a in answers(2, 0))]
    save_adapter(record._weights(20), 20)
    metrics = record.record(record.judge(unjudged, step=20), HeldoutLoss(1.0, 1.5), step=20)
    assert "eval/micro-broad/aligned" not in metrics
    assert metrics["eval/micro-broad/n_judged"] == 0
    assert metrics["eval/micro-broad/n_missing"] == 2
