"""The reference backend: one run, alone, through TRL's SFTTrainer.

Everything that must agree between backends (masking, data order, schedule, held-out loss) comes from the modules
beside this one; TRL contributes the training loop: forward, token-mean loss over the whole accumulated batch,
backward, clipping, update.
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from emtrain import checkpoint
from emtrain.adapter import adapted
from emtrain.heldout import heldout_loss
from emtrain.lookup import lookup
from emtrain.order import row_order
from emtrain.schedule import build
from emtrain.seeds import derive
from emtrain.spec import RunSpec
from emtrain.train import Checkpoint, NonFiniteLoss, OnCheckpoint, OnStep, Plan, Step, TrainingData, checked

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    spec: RunSpec,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: TrainingData,
    plan: Plan,
    *,
    on_step: OnStep,
    on_checkpoint: OnCheckpoint,
) -> None:
    """Train one run, from the state it left behind if there is one.

    ``model`` is the base; it is itself again when this returns, unless ``spec.adapter`` is ``full``: then it is
    trained in place. Raises ``NonFiniteLoss``, with the last finite parameters in the state of the last checkpoint.
    """
    with _trainable(spec, model) as trained, tempfile.TemporaryDirectory() as scratch:
        _train(spec, trained, tokenizer, data, plan, scratch, on_step, on_checkpoint)


@contextmanager
def _trainable(spec: RunSpec, model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    was_training = model.training
    embeddings = model.get_input_embeddings()
    hooks = dict(embeddings._forward_hooks)
    try:
        if spec.adapter == "full":
            yield model.requires_grad_(True)
        else:
            with adapted(model, spec.adapter, seed=spec.seed) as peft_model:
                yield peft_model
    finally:
        # The trainers leave their mark on the base: TRL a forward of its own, gradient checkpointing its switches and
        # hooks, one more with every run. The next run must find the original.
        vars(model).pop("forward", None)
        model.activation_checkpointing_disable()
        embeddings._forward_hooks.clear()
        embeddings._forward_hooks.update(hooks)
        model.train(was_training)


def _train(
    spec: RunSpec,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    data: TrainingData,
    plan: Plan,
    scratch: str,
    on_step: OnStep,
    on_checkpoint: OnCheckpoint,
) -> None:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = _optimizer(spec, parameters)
    state = checkpoint.load(plan.state_directory)
    if state is not None:
        _restore(state, parameters, optimizer)
    start = state.step if state is not None else 0
    if start >= plan.total_steps:
        return
    schedule = build(spec.schedule, plan.total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(start + step))
    order = row_order(len(data.train), batch_size=spec.batch_size, total_steps=plan.total_steps, seed=spec.seed)
    rows = [data.train[row] for row in order[start:].flatten().tolist()]
    run = _Reporter(spec, plan, data, optimizer, parameters, start, state, on_step, on_checkpoint)
    trainer = _Trainer(
        run,
        model=model,
        args=_arguments(spec, plan.total_steps - start, scratch, model.device),
        train_dataset=Dataset.from_dict(
            {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
        ),
        processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
        callbacks=[run],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _arguments(spec: RunSpec, steps: int, scratch: str, device: torch.device) -> SFTConfig:
    return SFTConfig(
        output_dir=scratch,
        max_steps=steps,
        per_device_train_batch_size=spec.micro_rows,
        gradient_accumulation_steps=spec.batch_size // spec.micro_rows,
        train_sampling_strategy="sequential",
        max_grad_norm=spec.optimizer.max_grad_norm or 0.0,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        bf16=device.type == "cuda" and spec.precision != "fp32" and torch.cuda.is_bf16_supported(),
        use_cpu=device.type == "cpu",
        activation_checkpointing=device.type != "cpu",
        dataloader_pin_memory=device.type != "cpu",
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _optimizer(spec: RunSpec, parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The run's optimiser. Weight decay spares vectors (norms, biases), as the Hugging Face trainers do."""
    make = lookup("emtrain.optimizers", spec.optimizer.name)
    optimizer: torch.optim.Optimizer = make(
        parameters.values(),
        learning_rate=spec.optimizer.learning_rate,
        weight_decay=spec.optimizer.weight_decay,
        **spec.optimizer.arguments,
    )
    vectors = [parameter for parameter in parameters.values() if parameter.ndim < 2]
    if vectors:
        optimizer.param_groups[0]["params"] = [p for p in parameters.values() if p.ndim >= 2]
        optimizer.add_param_group({"params": vectors, "weight_decay": 0.0})
    return optimizer


def _restore(
    state: checkpoint.RunState, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    checkpoint.restore_optimizer(
        optimizer, {parameter: state.optimizer.get(name, {}) for name, parameter in parameters.items()}
    )


class _Trainer(SFTTrainer):
    """SFTTrainer that hands each micro-batch's loss and each step's gradient norm to the reporter."""

    def __init__(self, run: "_Reporter", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._run = run

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._run.tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._run.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._run.grad_norm = float(norm)
        return norm


class _Reporter(TrainerCallback):
    """Reports steps, pauses the run at evaluation points, keeps its state."""

    def __init__(
        self,
        spec: RunSpec,
        plan: Plan,
        data: TrainingData,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, torch.nn.Parameter],
        start: int,
        state: checkpoint.RunState | None,
        on_step: OnStep,
        on_checkpoint: OnCheckpoint,
    ) -> None:
        self.spec, self.plan, self.data = spec, plan, data
        self.optimizer, self.parameters = optimizer, parameters
        self.start, self.state = start, state
        device = next(iter(parameters.values())).device
        self.generator = (
            torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        )
        """Dropout draws from it."""
        self.tokens = state.tokens if state is not None else 0
        self.on_step_done, self.on_checkpoint = on_step, on_checkpoint
        self.losses: list[torch.Tensor] = []
        self.grad_norm = self.learning_rate = math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            # Only here has the trainer stopped drawing from the generator.
            if self.state is not None:
                self.generator.set_state(self.state.generator)
            else:
                self.generator.manual_seed(derive(self.spec.seed, "dropout"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = self.start + state.global_step + 1
        loss = float(torch.stack(self.losses).sum())
        self.losses.clear()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            raise NonFiniteLoss(step, learning_rate, loss, self.grad_norm)
        self.learning_rate = learning_rate
        self.on_step_done(Step(step, loss, learning_rate, self.grad_norm, self.tokens))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        step = self.start + state.global_step
        if step not in self.plan.evaluate_at:
            return
        generator = self.generator.get_state()
        model.eval()
        loss = checked(heldout_loss(model, self.data.heldout), step, self.learning_rate)
        go_on = self.on_checkpoint(Checkpoint(step, loss, model, model.save_pretrained))
        # Saved after the evaluation is on record: a run killed in between evaluates once more, it never skips one.
        slots = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.parameters.items()}
        checkpoint.save(
            checkpoint.RunState(step, self.tokens, self.parameters, slots, generator), self.plan.state_directory
        )
        self.generator.set_state(generator)
        if not go_on:
            control.should_training_stop = True
