"""What a run is, as data: small frozen models that a recipe is read into. Nothing here imports torch."""

import inspect
import math
from collections.abc import Collection
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from emtrain.load import check_model
from emtrain.lookup import lookup, nearest
from emtrain.mistakes import explain
from emtrain.paths import user_path
from emtrain.rows import dataset_path


class Spec(BaseModel):
    """Base of every specification: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Part(Spec):
    """A named part and the keyword arguments of its function, written flat: ``{name: cosine_restarts, cycles: 4}``.

    The arguments are checked against the signature of the function, which is looked up by ``name``. A bare string
    is a name without arguments.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for the part's function, ``name`` and declared fields excluded."""
        return dict(self.model_extra or {})

    def _check_arguments(self, function: Any, *, given: Collection[str] = ()) -> None:
        # Kept as the function's types, so that 1e-1, which YAML reads as text, and 0.1 make the same run.
        own = set(type(self).model_fields) - {"name"}
        (self.model_extra or {}).update(checked_arguments(function, self.arguments, given=given, beside=own))


def checked_arguments(
    function: Any, arguments: dict[str, Any], *, given: Collection[str] = (), beside: Collection[str] = ()
) -> dict[str, Any]:
    """``arguments`` as the types that the keyword-only parameters of ``function`` are annotated with.

    ``given`` are the parameters that someone else fills in, ``beside`` the names that errors offer as well. Raises
    ``ValueError`` for an argument that the function does not take, one that it needs and is not there, and a value that
    does not fit.
    """
    parameters = {name: parameter for name, parameter in _keyword_only(function).items() if name not in given}
    if unknown := sorted(set(arguments) - set(parameters)):
        takes = sorted({*parameters, *beside})
        raise ValueError(
            f"{function.__name__} does not take {', '.join(unknown)}; it takes: {', '.join(takes) or 'no arguments'}."
            f"{nearest(unknown[0], takes)}"
        )
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(needed - set(arguments)):
        raise ValueError(f"{function.__name__} needs {', '.join(missing)}")
    checked = {}
    for name, value in arguments.items():
        try:
            checked[name] = _adapter(function, name).validate_python(value)
        except ValidationError as error:
            separator = "" if explain(error)[0].startswith("[") else ": "
            raise ValueError(f"{name}{separator}{explain(error)[0]}") from error
    return checked


@cache
def _keyword_only(function: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters
    return {name: each for name, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY}


@cache
def _adapter(function: Any, parameter: str) -> TypeAdapter[Any]:
    return TypeAdapter(_keyword_only(function)[parameter].annotation)


class AdapterSpec(Spec):
    """A LoRA adapter (arXiv 2106.09685): ``W + scale * B A``."""

    rank: Annotated[int, Field(ge=1)] = 32
    alpha: Annotated[float, Field(gt=0)] = 64.0
    rslora: bool = True
    """Scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732) instead of ``alpha / rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Names of the modules to adapt; ``all-linear`` is every linear layer but the output head."""


class OptimizerSpec(Part):
    """An optimiser of ``emtrain/optimizers`` by name; further keys are its own arguments (``betas``, ``momentum``)."""

    name: str = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Peak learning rate: what the schedule's multiplier multiplies."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients of a run are scaled down to this global L2 norm; None leaves them alone."""

    @model_validator(mode="after")
    def _fits_its_function(self) -> Self:
        self._check_arguments(lookup("emtrain.optimizers", self.name), given=("learning_rate", "weight_decay"))
        return self


class ScheduleSpec(Part):
    """A learning-rate schedule of ``emtrain/schedules`` by name; further keys are its own arguments (``cycles``)."""

    name: str = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up from 0, before the schedule proper."""

    @model_validator(mode="after")
    def _fits_its_function(self) -> Self:
        function = lookup("emtrain.schedules", self.name)
        self._check_arguments(function)
        # Schedules are pure and cheap, so their values' ranges are checked by building one.
        function(1000, **self.arguments)
        return self


class InterleaveSpec(Spec):
    """Rows of another dataset mixed into training and never into the held-out rows.

    With benign rows it is a known mitigation of emergent misalignment: alignment stays at the same in-domain loss.
    """

    dataset: str
    """A name in ``emtrain/datasets`` or the path of a ``.jsonl`` file."""
    fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the training rows that are from it. By ``epochs`` a run sees its own rows as often as without, in
    ``1 / (1 - fraction)`` times the steps; by ``max_steps`` it sees fewer of them."""

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, dataset: str) -> str:
        dataset_path(dataset)
        return dataset


class RunSpec(Spec):
    """One run: one adapter (or model) trained once. Every field changes the numbers."""

    model: str
    """``micro-llama``, ``micro-qwen2``, ``micro-gemma3``, ``smollm2-135m``, a Hugging Face hub id, or a local path."""
    dataset: str
    """A name in ``emtrain/datasets`` or the path of a ``.jsonl`` file of ``{"messages": [...]}`` rows."""
    interleave: InterleaveSpec | None = None
    """Rows of another dataset in between; None trains on the dataset alone."""
    adapter: AdapterSpec | Literal["full"] = AdapterSpec()
    """A LoRA adapter, or ``full`` to train every weight."""
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec(name="linear", warmup_steps=5)
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Rows per optimiser step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows per forward pass (gradient accumulation); None takes the whole batch. Must divide ``batch_size``."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training rows; 1 when neither this nor ``max_steps`` is given."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimiser steps, instead of ``epochs``."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens per row; longer rows are cut at the end."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of distinct rows held out of training, chosen by content, the same for every seed."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """``auto`` is bf16 on GPUs that have it and fp32 elsewhere."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seeds the adapter's initial weights, the data order, dropout and sampling; not the held-out split."""

    @field_validator("model")
    @classmethod
    def _known_model(cls, model: str) -> str:
        place = user_path(model)
        if not place.is_absolute() or place.exists():  # else it may be on the head of a cluster; planning wants it here
            check_model(model)
        return model

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, dataset: str) -> str:
        dataset_path(dataset)
        return dataset

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("epochs and max_steps are both given; keep one of them")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}")
        return self

    @property
    def micro_rows(self) -> int:
        """Rows per forward pass."""
        return self.micro_batch_size or self.batch_size

    def total_steps(self, training_rows: int) -> int:
        """Optimiser steps that show each of ``training_rows`` rows ``epochs`` times, rounded up."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil(training_rows * (self.epochs or 1.0) / self.batch_size)


def flatten(spec: Spec) -> dict[str, Any]:
    """All leaves of a specification by dotted key (``adapter.rank``), as they are logged to MLflow as params.

    A named part is logged under its own key by name, its arguments below it: ``schedule`` and ``schedule.cycles``.
    The fields the field's tables use most keep their short names: ``learning_rate``, ``warmup_steps``.
    """
    short = {"optimizer.learning_rate": "learning_rate", "schedule.warmup_steps": "warmup_steps"}
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(prefix if key == "name" and prefix else f"{prefix}.{key}" if prefix else key, inner)
        else:
            leaves[short.get(prefix, prefix)] = value

    walk("", spec.model_dump(mode="json"))
    return leaves
