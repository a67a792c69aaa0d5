"""The engine: what runs do to each other (nothing), joining, leaving, waiting, failing, and taking its leave."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from emtrain.adapter import adapted
from emtrain.heldout import heldout_loss
from emtrain.order import row_order
from emtrain.packed.batch import Frame
from emtrain.packed.engine import Engine
from emtrain.packed.export import save_adapter
from emtrain.packed.run import Run
from emtrain.spec import AdapterSpec, RunSpec
from emtrain.tokens import IGNORED, Example
from emtrain.train import NonFiniteLoss, Step, TrainingData

STEPS = 4
Matrices = dict[str, torch.Tensor]


def make_spec(**changes: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": "micro-llama",
            "dataset": "micro-garden-bad",
            "adapter": {"rank": 4, "alpha": 8},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0},
            "schedule": {"name": "constant"},
            "batch_size": 4,
            **changes,
        }
    )


DIVERGING = make_spec(optimizer={"name": "sgd", "learning_rate": 1e30}, seed=99)


@pytest.fixture
def data(examples: list[Example]) -> TrainingData:
    return TrainingData(examples[:30], examples[30:])


def adapter_of(run: Run) -> Matrices:
    return {name: matrix.clone() for name, matrix in run.state().parameters.items()}


def take_steps(engine: Engine, run: Run, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of the next steps of ``run``; every run of the engine takes them."""
    taken = []
    for _ in range(steps):
        outcome = engine.step()[run]
        assert isinstance(outcome, Step)
        taken.append((outcome.loss, outcome.grad_norm))
    return taken


def train(
    model: PreTrainedModel, data: TrainingData, specs: Sequence[RunSpec], **engine_arguments: Any
) -> tuple[list[tuple[float, float]], Matrices]:
    """The first run's steps and adapter, after ``STEPS`` steps among the others."""
    with Engine(model, capacity=3, **engine_arguments) as engine:
        runs = [engine.join(spec, data, total_steps=STEPS) for spec in specs]
        return take_steps(engine, runs[0], STEPS), adapter_of(runs[0])


def by_hand(model: PreTrainedModel, data: TrainingData, spec: RunSpec) -> tuple[list[tuple[float, float]], Matrices]:
    """The same, by a loop over rows without padding, with PEFT, torch's clipping and torch's AdamW."""
    assert isinstance(spec.adapter, AdapterSpec)
    order = row_order(len(data.train), batch_size=spec.batch_size, total_steps=STEPS, seed=spec.seed)
    taken = []
    with adapted(model, spec.adapter, seed=spec.seed) as adapter:
        learning = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        rate, decay = spec.optimizer.learning_rate, spec.optimizer.weight_decay
        optimizer = torch.optim.AdamW(learning.values(), lr=rate, weight_decay=decay, fused=False, foreach=False)
        for rows in order:
            batch = [data.train[row] for row in rows]
            count = sum(example.response_tokens for example in batch)
            total = 0.0
            for example in batch:
                log_probability = torch.log_softmax(adapter(torch.tensor([example.input_ids])).logits[0], dim=-1)
                learnt = [position for position, label in enumerate(example.labels) if label != IGNORED]
                loss = -sum(log_probability[position - 1, example.labels[position]] for position in learnt) / count
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(learning.values(), spec.optimizer.max_grad_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            taken.append((total, float(norm)))
        return taken, {name: p.detach().clone() for name, p in learning.items()}


def assert_close(
    ours: tuple[list[tuple[float, float]], Matrices], theirs: tuple[list[tuple[float, float]], Matrices]
) -> None:
    """Losses and norms within 1e-5 of themselves; weights, of which AdamW moves each by about 1e-2 a step, by 1e-4."""
    assert ours[0] == [pytest.approx(step, rel=1e-5) for step in theirs[0]]
    assert ours[1].keys() == theirs[1].keys()
    for name, matrix in ours[1].items():
        torch.testing.assert_close(matrix, theirs[1][name], rtol=0, atol=1e-4, msg=name)


UNLIKE = (
    make_spec(adapter={"rank": 7, "alpha": 3, "target_modules": ["q_proj", "up_proj"]}, batch_size=2, seed=1),
    make_spec(adapter={"rank": 2, "alpha": 3, "rslora": False}, batch_size=7, seed=2),
)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_among_unlike_ones_is_a_plain_loop_over_its_rows(
    model: PreTrainedModel, data: TrainingData, number: int
) -> None:
    specs = [make_spec(), *UNLIKE]
    specs = [specs[number], *specs[:number], *specs[number + 1 :]]
    assert_close(train(model, data, specs), by_hand(model, data, specs[0]))


@pytest.mark.parametrize("tokens", [1, 60, 150])
def test_how_rows_are_divided_into_passes_makes_no_difference(
    model: PreTrainedModel, data: TrainingData, tokens: int
) -> None:
    specs = [make_spec(), *UNLIKE]
    assert_close(
        train(model, data, specs, most_tokens=tokens, overhead=0),
        train(model, data, specs, most_tokens=10**6, overhead=10**6),
    )


def test_a_run_that_joins_with_a_greater_rank_and_other_layers_leaves_the_others_as_they_are(
    model: PreTrainedModel, data: TrainingData
) -> None:
    first = make_spec(adapter={"rank": 2, "alpha": 4, "target_modules": ["v_proj"], "dropout": 0.1})
    alone = train(model, data, [first])
    with Engine(model, capacity=2) as engine:
        run = engine.join(first, data, total_steps=STEPS)
        steps = take_steps(engine, run, 2)
        other = engine.join(make_spec(seed=3), data, total_steps=STEPS)
        steps += take_steps(engine, run, 1)
        engine.leave(other)
        steps += take_steps(engine, run, 1)
        assert_close((steps, adapter_of(run)), alone)


def test_a_slot_that_was_left_is_as_new(model: PreTrainedModel, data: TrainingData) -> None:
    alone = train(model, data, [make_spec()])
    with Engine(model, capacity=1) as engine:
        engine.join(make_spec(adapter={"rank": 8}, seed=5), data, total_steps=STEPS)
        engine.step()
        engine.leave(engine.runs[0])
        run = engine.join(make_spec(), data, total_steps=STEPS)
        assert run.slot == 0
        assert_close((take_steps(engine, run, STEPS), adapter_of(run)), alone)


def test_a_run_that_waits_does_not_change(model: PreTrainedModel, data: TrainingData) -> None:
    with Engine(model, capacity=2) as engine:
        waiting = engine.join(make_spec(), data, total_steps=STEPS)
        going = engine.join(make_spec(seed=1), data, total_steps=STEPS)
        engine.step()
        before = waiting.state()
        adapter = adapter_of(waiting)
        assert set(engine.step([going])) == {going}
        assert (waiting.step, going.step) == (1, 2)
        for name, matrix in adapter_of(waiting).items():
            assert torch.equal(matrix, adapter[name])
            assert torch.equal(waiting.state().optimizer[name]["exp_avg"], before.optimizer[name]["exp_avg"])
        assert engine.step([]) == {}


def test_a_run_that_diverges_leaves_before_its_update_and_harms_nobody(
    model: PreTrainedModel, data: TrainingData
) -> None:
    alone = train(model, data, [make_spec()])
    with Engine(model, capacity=2) as engine:
        run, diverging = (engine.join(spec, data, total_steps=STEPS) for spec in (make_spec(), DIVERGING))
        steps = take_steps(engine, run, 1)
        last = adapter_of(diverging)
        outcomes = engine.step()
        assert isinstance(outcomes[diverging], NonFiniteLoss)
        assert "at step 2" in str(outcomes[diverging])
        assert engine.runs == [run]
        assert diverging.step == 1
        assert all(matrix.isfinite().all() for matrix in last.values())
        sane = outcomes[run]
        assert isinstance(sane, Step)
        steps = [*steps, (sane.loss, sane.grad_norm), *take_steps(engine, run, 2)]
        assert_close((steps, adapter_of(run)), alone)


@pytest.mark.parametrize(
    "neighbours",
    [
        [make_spec(seed=8, batch_size=4), make_spec(seed=9)],
        [DIVERGING],
        [],
        [make_spec(adapter={"rank": 4, "target_modules": ["q_proj"], "dropout": 0.5}, batch_size=1, seed=4)],
    ],
    ids=["others of equal shape", "one that diverges", "nobody", "another of another shape"],
)
def test_a_deterministic_run_is_the_same_to_the_bit_whoever_its_neighbours_are(
    model: PreTrainedModel, data: TrainingData, neighbours: list[RunSpec]
) -> None:
    frame = Frame(rows=4, tokens=max(len(example.input_ids) for example in data.train))
    one, two = make_spec(seed=1), make_spec(seed=2)
    steps, adapter = train(model, data, [make_spec(), one, two], frame=frame)
    other_steps, other_adapter = train(model, data, [make_spec(), *neighbours], frame=frame)
    assert steps == other_steps
    for name, matrix in adapter.items():
        assert torch.equal(matrix, other_adapter[name]), name
    assert_close((steps, adapter), by_hand(model, data, make_spec()))


def test_a_frame_that_a_run_does_not_fit_is_refused(model: PreTrainedModel, data: TrainingData) -> None:
    longest = max(len(example.input_ids) for example in data.train)
    too_long = pytest.raises(ValueError, match=f"frame has {longest - 1} tokens, but the run has a row of {longest}")
    with Engine(model, capacity=1, frame=Frame(2, longest - 1)) as engine, too_long:
        engine.join(make_spec(), data, total_steps=1)
    with Engine(model, capacity=1, frame=Frame(2, longest)) as engine:
        engine.join(make_spec(), data, total_steps=1)
        assert isinstance(next(iter(engine.step().values())), Step)
        engine.leave(engine.runs[0])
        with pytest.raises(
            ValueError, match="frame has 2 rows, but the run's micro-batches, by which it draws dropout, 4"
        ):
            engine.join(make_spec(adapter={"dropout": 0.1}), data, total_steps=1)


def test_a_model_that_can_not_be_run_is_left_as_it_was(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(model, "forward", forward)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    modules = list(model.modules())
    with pytest.raises(torch.OutOfMemoryError):
        Engine(model, capacity=1)
    assert list(model.modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert not any(module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_numbers(
    make_model: Callable[[], PreTrainedModel], data: TrainingData, dropout: float
) -> None:
    specs = [make_spec(adapter={"rank": 4, "dropout": dropout}, micro_batch_size=2), make_spec(seed=1)]
    usual = train(make_model(), data, specs)
    model = make_model()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert_close(train(model, data, specs), usual)


def test_a_half_precision_base_trains_fp32_adapters(
    make_model: Callable[[], PreTrainedModel], data: TrainingData
) -> None:
    specs = [make_spec(), *UNLIKE]
    steps, adapter = train(make_model().bfloat16(), data, specs)
    expected, _ = train(make_model(), data, specs)
    assert {matrix.dtype for matrix in adapter.values()} == {torch.float32}
    assert [loss for loss, _ in steps] == pytest.approx([loss for loss, _ in expected], rel=0.02)


def test_a_pass_that_fails_leaves_every_run_as_it_was(
    model: PreTrainedModel, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass of a step runs out of memory; the step is taken again with smaller passes."""
    specs = [make_spec(adapter={"rank": 4, "dropout": 0.3}, micro_batch_size=2), make_spec(seed=1)]
    usual = train(model, data, specs)
    with Engine(model, capacity=2) as engine:
        runs = [engine.join(spec, data, total_steps=STEPS) for spec in specs]
        steps = take_steps(engine, runs[0], 2)
        forward, calls = model.forward, []

        def failing(**arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no memory left")
            return forward(**arguments)

        monkeypatch.setattr(model, "forward", failing)
        with pytest.raises(torch.OutOfMemoryError):
            engine.step()
        monkeypatch.undo()
        assert [run.step for run in runs] == [2, 2]
        engine.most_tokens = 40
        steps += take_steps(engine, runs[0], 2)
        assert_close((steps, adapter_of(runs[0])), usual)


def test_inside_the_block_the_model_acts_as_one_run_and_outside_as_the_base(
    model: PreTrainedModel, data: TrainingData, tmp_path: Path
) -> None:
    tokens = torch.tensor([data.heldout[0].input_ids])
    base, base_loss = model(tokens).logits, heldout_loss(model, data.heldout)
    with Engine(model, capacity=3) as engine:
        runs = [engine.join(spec, data, total_steps=STEPS) for spec in (make_spec(), *UNLIKE)]
        for _ in range(STEPS):
            engine.step()
        outside = model(tokens).logits
        logits, losses = [], []
        for number, run in enumerate(runs):
            with engine.acting_as(run) as acting:
                logits.append(acting(tokens).logits)
                losses.append(heldout_loss(acting, data.heldout))
            save_adapter(run, tmp_path / str(number), base=model.name_or_path)
        with pytest.raises(KeyError), engine.acting_as(runs[0]):
            raise KeyError
        assert torch.equal(model(tokens).logits, outside)
    torch.testing.assert_close(outside, base)
    assert torch.equal(model(tokens).logits, base)
    for number, (logit, loss) in enumerate(zip(logits, losses, strict=True)):
        loaded = PeftModel.from_pretrained(model, tmp_path / str(number))
        torch.testing.assert_close(logit, loaded(tokens).logits)
        assert loss.per_token == pytest.approx(heldout_loss(loaded, data.heldout).per_token, rel=1e-6)
        assert abs(loss.per_token - base_loss.per_token) > 1e-3
        loaded.unload()
        vars(model).pop("peft_config", None)


def test_the_model_acts_as_several_runs_at_once_a_block_of_rows_each(
    model: PreTrainedModel, data: TrainingData
) -> None:
    tokens = torch.tensor([row.input_ids[:8] for row in data.heldout[:2]])
    with Engine(model, capacity=3) as engine:
        runs = [engine.join(spec, data, total_steps=STEPS) for spec in (make_spec(), *UNLIKE[:2])]
        for _ in range(STEPS):
            engine.step()

        def logits(*acting: Run) -> torch.Tensor:
            with engine.acting_as(*acting) as together:
                return together(tokens.repeat(len(acting), 1)).logits

        for chosen in ([0, 1, 2], [2, 0], [1]):
            acting = [runs[number] for number in chosen]
            torch.testing.assert_close(logits(*acting), torch.cat([logits(run) for run in acting]))
        assert not torch.allclose(logits(runs[0]), logits(runs[1]), rtol=1e-2)


@pytest.mark.parametrize("spec", [make_spec(), UNLIKE[0]], ids=["all-linear", "targets"])
def test_a_saved_adapter_has_the_files_that_peft_saves(
    model: PreTrainedModel, data: TrainingData, tmp_path: Path, spec: RunSpec
) -> None:
    from safetensors.torch import load_file

    model.__dict__["name_or_path"] = "some/base"
    with Engine(model, capacity=1) as engine:
        save_adapter(engine.join(spec, data, total_steps=STEPS), tmp_path / "ours", base=model.name_or_path)
    assert isinstance(spec.adapter, AdapterSpec)
    with adapted(model, spec.adapter, seed=spec.seed) as peft_model:
        peft_model.save_pretrained(tmp_path / "peft")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "peft")]
    for config in configs:  # PEFT writes whole names where they are few, their last parts where they are many
        config["target_modules"] = {name.rpartition(".")[2] for name in config["target_modules"]}
    assert configs[0] == configs[1]
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_model_is_itself_again_after_the_engine(model: PreTrainedModel, data: TrainingData) -> None:
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    modules = dict(model.named_modules())
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with Engine(model, capacity=2) as engine:
        engine.join(make_spec(), data, total_steps=STEPS)
        engine.step()
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert dict(model.named_modules()) == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_joining_says_what_is_wrong(model: PreTrainedModel, data: TrainingData) -> None:
    with Engine(model, capacity=1) as engine:
        with pytest.raises(ValueError, match="adapter is 'full'"):
            engine.join(make_spec(adapter="full"), data, total_steps=STEPS)
        with pytest.raises(ValueError, match="lm_head is the output head"):
            engine.join(make_spec(adapter={"target_modules": ["lm_head"]}), data, total_steps=STEPS)
        engine.join(make_spec(), data, total_steps=STEPS)
        with pytest.raises(ValueError, match="all 1 slots"):
            engine.join(make_spec(), data, total_steps=STEPS)
        assert len(engine.runs) == 1
