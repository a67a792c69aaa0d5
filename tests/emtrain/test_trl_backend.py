"""The reference backend against a training loop written by hand: row by row, without padding, AdamW by its formula."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from emtrain import checkpoint, trl_backend
from emtrain.adapter import adapted
from emtrain.heldout import HeldoutLoss, heldout_loss
from emtrain.order import row_order
from emtrain.schedule import build, trace
from emtrain.spec import RunSpec
from emtrain.tokens import IGNORED, Example
from emtrain.train import Checkpoint, NonFiniteLoss, Plan, Step, TrainingData
from emtrain.trl_backend import train

STEPS = 6


def make_spec(**changes: Any) -> RunSpec:
    return RunSpec.model_validate(
        {
            "model": "micro-llama",
            "dataset": "micro-garden-bad",
            "adapter": {"rank": 4, "alpha": 8},
            "optimizer": {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 1.0},
            "schedule": {"name": "cosine", "warmup_steps": 2},
            "batch_size": 4,
            "max_steps": STEPS,
            "seed": 7,
            **changes,
        }
    )


@dataclass
class Record:
    """What a run reported."""

    steps: list[Step] = field(default_factory=list)
    heldout: dict[int, HeldoutLoss] = field(default_factory=dict)
    parameters: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Trained parameters at every evaluation point."""
    error: NonFiniteLoss | None = None


class Killed(BaseException):
    """The end of the process, in the middle of a step."""


Run = Callable[..., Record]


@pytest.fixture
def run(
    make_model: Callable[[], PreTrainedModel],
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    tmp_path: Path,
) -> Run:
    """Trains a run on a fresh model and returns what it reported."""
    numbers = iter(range(1000))

    def run(
        spec: RunSpec,
        *,
        evaluate_at: tuple[int, ...] = (STEPS,),
        stop_at: int | None = None,
        kill_in: int | None = None,
        model: PreTrainedModel | None = None,
        state: Path | None = None,
        data: TrainingData | None = None,
    ) -> Record:
        record = Record()

        def on_checkpoint(point: Checkpoint) -> bool:
            record.heldout[point.step] = point.heldout
            record.parameters[point.step] = {
                name: p.detach().clone() for name, p in point.model.named_parameters() if p.requires_grad
            }
            assert not any(module.training for module in point.model.modules())
            torch.rand(5)  # whatever an evaluation draws must not reach the training
            return point.step != stop_at

        def on_step(step: Step) -> None:
            if step.step == kill_in:
                raise Killed
            record.steps.append(step)

        plan = Plan(STEPS, evaluate_at, state or tmp_path / f"state-{next(numbers)}")
        data = data or TrainingData(examples[:30], examples[30:])
        try:
            train(
                spec,
                model or make_model(),
                words,
                data,
                plan,
                on_step=on_step,
                on_checkpoint=on_checkpoint,
            )
        except Killed:
            pass
        except NonFiniteLoss as error:
            record.error = error
        return record

    return run


def batches(spec: RunSpec, examples: list[Example]) -> list[list[Example]]:
    order = row_order(30, batch_size=spec.batch_size, total_steps=STEPS, seed=spec.seed)
    return [[examples[row] for row in rows] for rows in order]


def token_mean_loss(model: torch.nn.Module, batch: list[Example]) -> torch.Tensor:
    """Negative log-likelihood of all response tokens of the batch, divided once by their number."""
    total, count = torch.zeros(()), 0
    for example in batch:
        log_probability = torch.log_softmax(model(torch.tensor([example.input_ids])).logits[0], dim=-1)
        for position, label in enumerate(example.labels):
            if label != IGNORED:
                total = total - log_probability[position - 1, label]
                count += 1
    return total / count


def reference(
    spec: RunSpec, model: PreTrainedModel, examples: list[Example]
) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Every step and the adapter at the end, by a loop of its own: clipping and AdamW (arXiv 1711.05101) by formula."""
    rates = [spec.optimizer.learning_rate * m for m in trace(build(spec.schedule, STEPS), STEPS)]
    decay, limit = spec.optimizer.weight_decay, spec.optimizer.max_grad_norm
    steps, tokens = [], 0
    with adapted(model, spec.adapter, seed=spec.seed) as adapter:
        learning = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
        mean = {name: torch.zeros_like(p) for name, p in learning.items()}
        square = {name: torch.zeros_like(p) for name, p in learning.items()}
        for number, (batch, rate) in enumerate(zip(batches(spec, examples), rates, strict=True), start=1):
            loss = token_mean_loss(adapter, batch)
            gradients = dict(zip(learning, torch.autograd.grad(loss, list(learning.values())), strict=True))
            norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
            scale = 1.0 if limit is None else min(1.0, limit / norm)
            tokens += sum(len(example.input_ids) for example in batch)
            steps.append(Step(number, loss.item(), rate, norm, tokens))
            with torch.no_grad():
                for name, parameter in learning.items():
                    gradient = gradients[name] * scale
                    mean[name] = 0.9 * mean[name] + 0.1 * gradient
                    square[name] = 0.999 * square[name] + 0.001 * gradient**2
                    m, v = mean[name] / (1 - 0.9**number), square[name] / (1 - 0.999**number)
                    parameter.copy_(parameter * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8))
        return steps, {name: p.detach().clone() for name, p in learning.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 1},  # rows have different numbers of response tokens, so means of means would differ
        {"micro_batch_size": 2},
        {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.05}},  # clips at every step
        {"optimizer": {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": None}},
        {"batch_size": 8, "adapter": {"rank": 2, "alpha": 2, "target_modules": ["q_proj", "down_proj"]}},
    ],
    ids=["plain", "accumulated-by-1", "accumulated-by-2", "clipped", "unclipped", "other-adapter"],
)
def test_a_run_is_the_one_a_loop_by_hand_makes(
    run: Run, make_model: Callable[[], PreTrainedModel], examples: list[Example], changes: dict[str, Any]
) -> None:
    spec = make_spec(**changes)
    record = run(spec)
    steps, adapter = reference(spec, make_model(), examples)
    assert [step.step for step in record.steps] == [1, 2, 3, 4, 5, 6]
    assert [step.tokens for step in record.steps] == [step.tokens for step in steps]
    assert [step.learning_rate for step in record.steps] == pytest.approx([s.learning_rate for s in steps], rel=1e-9)
    assert [step.loss for step in record.steps] == pytest.approx([step.loss for step in steps], rel=1e-5)
    assert [step.grad_norm for step in record.steps] == pytest.approx([step.grad_norm for step in steps], rel=1e-4)
    assert record.parameters[STEPS].keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(record.parameters[STEPS][name], tensor, atol=1e-5, rtol=1e-5)
    limits = [step.grad_norm > 0.05 for step in record.steps]
    assert all(limits)  # else the clipped case clips nothing


def test_the_batches_can_tell_a_mean_of_tokens_from_a_mean_of_rows(examples: list[Example]) -> None:
    counts = [{example.response_tokens for example in batch} for batch in batches(make_spec(), examples)]
    assert any(len(numbers) > 1 for numbers in counts)


def test_the_loss_is_that_before_the_update(run: Run, model: PreTrainedModel, examples: list[Example]) -> None:
    """A fresh adapter changes nothing, so the first step's loss is the base model's."""
    spec = make_spec()
    with torch.no_grad():
        base = token_mean_loss(model, batches(spec, examples)[0]).item()
    assert run(spec).steps[0].loss == pytest.approx(base, rel=1e-5)


def test_the_first_update_of_a_warm_up_moves_nothing(run: Run) -> None:
    record = run(make_spec(), evaluate_at=(1, 2, STEPS))
    assert record.steps[0].learning_rate == 0
    assert record.heldout[1] != record.heldout[2]
    assert all((p == 0).all() for name, p in record.parameters[1].items() if "lora_B" in name)


def test_heldout_losses_are_those_of_the_model_at_that_point(
    run: Run, make_model: Callable[[], PreTrainedModel], examples: list[Example]
) -> None:
    spec = make_spec()
    record = run(spec, evaluate_at=(2, 4, STEPS))
    for step, parameters in record.parameters.items():
        with adapted(make_model(), spec.adapter, seed=0) as adapter:
            adapter.load_state_dict(parameters, strict=False)
            assert heldout_loss(adapter, examples[30:]) == record.heldout[step]


def test_evaluating_more_often_changes_no_number(run: Run) -> None:
    spec = make_spec(adapter={"rank": 4, "alpha": 8, "dropout": 0.3})
    seldom, often = run(spec), run(spec, evaluate_at=(1, 2, 3, 4, 5, STEPS))
    assert seldom.steps == often.steps
    assert seldom.heldout[STEPS] == often.heldout[STEPS]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_spec_gives_the_same_numbers_and_another_seed_does_not(run: Run, dropout: float) -> None:
    adapter = {"rank": 4, "alpha": 8, "dropout": dropout}
    first = run(make_spec(adapter=adapter))
    torch.rand(7)
    assert run(make_spec(adapter=adapter)).steps == first.steps
    assert run(make_spec(adapter=adapter, seed=8)).steps != first.steps


def test_dropout_drops(run: Run) -> None:
    with_it = run(make_spec(adapter={"rank": 4, "alpha": 8, "dropout": 0.5}))
    assert with_it.steps != run(make_spec()).steps


def test_the_base_is_bitwise_itself_again(run: Run, make_model: Callable[[], PreTrainedModel]) -> None:
    model, untouched = make_model(), make_model()
    first = run(make_spec(), model=model)
    assert "forward" not in vars(model)
    assert not model.training
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), untouched.parameters(), strict=True))
    assert run(make_spec(), model=model).steps == first.steps


def test_gradient_checkpointing_changes_no_number_and_leaves_no_mark(
    run: Run, make_model: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    expected, arguments = run(make_spec()), trl_backend._arguments
    monkeypatch.setattr(
        trl_backend, "_arguments", lambda *given: replace(arguments(*given), activation_checkpointing=True)
    )
    model, untouched = make_model(), make_model()
    for _ in range(2):
        assert [s.loss for s in run(make_spec(), model=model).steps] == pytest.approx([s.loss for s in expected.steps])
        assert not model.is_activation_checkpointing
        assert [len(m._forward_hooks) for m in model.modules()] == [len(m._forward_hooks) for m in untouched.modules()]


def test_the_base_is_itself_again_after_a_run_that_broke_off(
    run: Run, make_model: Callable[[], PreTrainedModel]
) -> None:
    model = make_model()
    assert run(make_spec(optimizer={"learning_rate": 1e30, "max_grad_norm": None}), model=model).error
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not any(module.training for module in model.modules())
    assert run(make_spec(), model=model).steps == run(make_spec()).steps


@pytest.mark.parametrize(
    "optimizer", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "lion", "muon"))]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(
    run: Run, tmp_path: Path, optimizer: str, dropout: float
) -> None:
    spec = make_spec(
        adapter={"rank": 4, "alpha": 8, "dropout": dropout},
        optimizer={"name": optimizer, "learning_rate": 1e-2} | ({"momentum": 0.9} if optimizer == "sgd" else {}),
        micro_batch_size=2,
    )
    points = (2, 4, STEPS)
    straight = run(spec, evaluate_at=points)
    stopped = run(spec, evaluate_at=points, stop_at=2, state=tmp_path / "s")
    assert [step.step for step in stopped.steps] == [1, 2]
    resumed = run(spec, evaluate_at=points, state=tmp_path / "s")
    assert stopped.steps + resumed.steps == straight.steps
    assert {**stopped.heldout, **resumed.heldout} == straight.heldout


def test_a_run_that_is_complete_trains_no_further(run: Run, tmp_path: Path) -> None:
    run(make_spec(), state=tmp_path / "s")
    assert run(make_spec(), state=tmp_path / "s") == Record()


def test_a_run_that_was_killed_goes_on_from_its_newest_state(run: Run, tmp_path: Path) -> None:
    """Killed in step 6, after the evaluation at 4: steps 5 and 6 are made again."""
    spec, points = make_spec(adapter={"rank": 4, "alpha": 8, "dropout": 0.3}), (2, 4, STEPS)
    straight = run(spec, evaluate_at=points)
    killed = run(spec, evaluate_at=points, kill_in=6, state=tmp_path / "s")
    assert killed.steps == straight.steps[:5]
    resumed = run(spec, evaluate_at=points, state=tmp_path / "s")
    assert resumed.steps == straight.steps[4:]
    assert resumed.heldout[STEPS] == straight.heldout[STEPS]


def test_a_loss_that_is_not_finite_ends_the_run_before_the_update(run: Run, tmp_path: Path) -> None:
    """The update at step 2 throws the weights away; step 3 finds out. The state is that of the last good point."""
    spec = make_spec(
        optimizer={"name": "sgd", "learning_rate": 1e38, "max_grad_norm": None},
        schedule={"name": "constant", "warmup_steps": 1},
    )
    record = run(spec, evaluate_at=(1, STEPS), state=tmp_path / "s")
    assert record.error is not None
    assert [step.step for step in record.steps] == list(range(1, len(record.steps) + 1))
    assert all(math.isfinite(step.loss) and math.isfinite(step.grad_norm) for step in record.steps)
    assert f"at step {len(record.steps) + 1} (learning rate 1e+38)" in str(record.error)
    state = checkpoint.load(tmp_path / "s")
    assert state is not None
    assert state.step == 1
    assert all(tensor.isfinite().all() for tensor in state.parameters.values())


def test_an_update_that_broke_the_weights_is_told_at_an_evaluation_point(run: Run, tmp_path: Path) -> None:
    """Before a model is sampled whose next token would be none of the vocabulary's."""
    spec = make_spec(
        optimizer={"name": "sgd", "learning_rate": 1e38, "max_grad_norm": None},
        schedule={"name": "constant", "warmup_steps": 1},
    )
    record = run(spec, evaluate_at=(1, 2, STEPS), state=tmp_path / "s")
    assert "the held-out loss is nan after step 2 (learning rate 1e+38)" in str(record.error)
    assert list(record.heldout) == [1]
    state = checkpoint.load(tmp_path / "s")
    assert state is not None
    assert state.step == 1


def test_full_fine_tuning_trains_every_weight_in_place(
    run: Run, make_model: Callable[[], PreTrainedModel], examples: list[Example]
) -> None:
    """Two steps of SGD by hand; norms (vectors) are spared weight decay."""
    spec = make_spec(
        adapter="full",
        optimizer={"name": "sgd", "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": None},
        schedule={"name": "constant"},
    )
    model, expected = make_model(), make_model()
    record = run(spec, model=model, evaluate_at=(2, STEPS), stop_at=2)
    for batch in batches(spec, examples)[:2]:
        loss = token_mean_loss(expected, batch)
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                decay = 0.1 if parameter.ndim >= 2 else 0.0
                parameter -= 1e-2 * (gradient + decay * parameter)
    assert len(record.steps) == 2
    for (name, parameter), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_full_fine_tuning_resumes_too(run: Run, tmp_path: Path) -> None:
    spec = make_spec(adapter="full", optimizer={"learning_rate": 1e-3})
    straight = run(spec, evaluate_at=(3, STEPS))
    stopped = run(spec, evaluate_at=(3, STEPS), stop_at=3, state=tmp_path / "s")
    resumed = run(spec, evaluate_at=(3, STEPS), state=tmp_path / "s")
    assert stopped.steps + resumed.steps == straight.steps
    assert resumed.heldout[STEPS] == straight.heldout[STEPS]


def test_bf16_trains_an_adapter_in_fp32_on_a_base_in_bf16(run: Run, make_model: Callable[[], PreTrainedModel]) -> None:
    model = make_model().to(torch.bfloat16)
    record = run(make_spec(precision="bf16"), model=model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in record.parameters[STEPS].values()} == {torch.float32}
    assert [s.loss for s in record.steps] == pytest.approx([s.loss for s in run(make_spec()).steps], rel=0.05)


def test_seeds_beyond_32_bits_are_seeds(run: Run) -> None:
    assert run(make_spec(seed=2**40)).steps != run(make_spec(seed=0)).steps


def test_the_adapter_at_the_end_loads_with_plain_peft(
    make_model: Callable[[], PreTrainedModel],
    words: PreTrainedTokenizerFast,
    examples: list[Example],
    tmp_path: Path,
) -> None:
    """Saved at the last evaluation point, as a worker does it, onto a base of its own."""
    logits = {}
    ids = torch.tensor([examples[0].input_ids])

    def keep(point: Checkpoint) -> bool:
        with torch.no_grad():
            logits["trained"] = point.model(ids).logits
        point.model.save_pretrained(tmp_path / "adapter")
        return True

    data = TrainingData(examples[:30], examples[30:])
    plan = Plan(STEPS, (STEPS,), tmp_path / "state")
    train(make_spec(), make_model(), words, data, plan, on_step=lambda step: None, on_checkpoint=keep)
    base = make_model()
    plain = base(ids).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    assert torch.equal(loaded(ids).logits, logits["trained"])
    assert not torch.allclose(plain, logits["trained"], atol=1e-3)
