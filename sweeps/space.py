"""The space a search draws from: ranges and choices by dotted key of a run, as a recipe writes them.

A value of the space is a range ``{low, high}`` or a list of choices. A choice may be a part written out
(``{name: cosine_restarts, cycles: {low: 2, high: 6}}``) with ranges of its own, which exist only when it is chosen.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from emtrain.spec import Spec

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution


class Range(Spec):
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float
    log: bool = False
    """Even on a logarithmic scale; learning rates want it."""
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be smaller")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; a logarithmic range must be above 0")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; an integer range needs whole numbers")
        return self

    @property
    def distribution(self) -> "BaseDistribution":
        """As Optuna knows it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)

    def draw(self, trial: "Trial", name: str) -> float:
        """A number, as ``trial`` suggests for the parameter ``name``."""
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or (self.integer and value != int(value)):
            return False
        return self.low <= value <= self.high


Space = Mapping[str, Range | tuple[Any, ...]]


def draw(space: Space, trial: "Trial") -> dict[str, Any]:
    """A value for every key, as Optuna's ``trial`` suggests: what to change in the base run."""
    drawn: dict[str, Any] = {}
    for key, entry in space.items():
        if isinstance(entry, Range):
            drawn[key] = entry.draw(trial, key)
            continue
        label = trial.suggest_categorical(key, labels(entry))
        chosen = dict(zip(labels(entry), entry, strict=True))[label]
        if isinstance(chosen, Mapping):
            chosen = {
                name: within.draw(trial, f"{key}.{label}.{name}") if (within := as_range(value)) is not None else value
                for name, value in chosen.items()
            }
        drawn[key] = chosen
    return drawn


def locate(
    space: Space, changes: Mapping[str, Any], same: Callable[[str, Any], bool]
) -> tuple[dict[str, Any], dict[str, "BaseDistribution"]] | None:
    """Optuna's parameters and distributions of values that were not drawn here; None where they lie outside.

    ``changes`` holds a value for every key of the space. ``same`` says whether a choice at a key, its ranges filled in,
    makes the same run as the value there: the two may be written differently.
    """
    from optuna.distributions import BaseDistribution, CategoricalDistribution

    parameters: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for key, entry in space.items():
        value = changes[key]
        if isinstance(entry, Range):
            if value not in entry:
                return None
            parameters[key], distributions[key] = value, entry.distribution
            continue
        fitting = (
            (label, choice, inside)
            for label, choice in zip(labels(entry), entry, strict=True)
            if (inside := _inside(choice, value)) is not None and same(key, {**choice, **inside} if inside else choice)
        )
        if (first := next(fitting, None)) is None:
            return None
        label, choice, inside = first
        parameters[key], distributions[key] = label, CategoricalDistribution(labels(entry))
        for name, within in _ranges(choice).items():
            parameters[f"{key}.{label}.{name}"] = inside[name]
            distributions[f"{key}.{label}.{name}"] = within.distribution
    return parameters, distributions


def corners(entry: Range | tuple[Any, ...]) -> list[Any]:
    """Values to check an entry of the space by: the ends of ranges, every choice with its ranges at both ends."""
    if isinstance(entry, Range):
        return [entry.low, entry.high]
    found: list[Any] = []
    for choice in entry:
        if not isinstance(choice, Mapping):
            found.append(choice)
            continue
        for end in ("low", "high"):
            at = {name: getattr(inner, end) if (inner := as_range(v)) else v for name, v in choice.items()}
            if at not in found:
                found.append(at)
    return found


def labels(choices: tuple[Any, ...]) -> list[Any]:
    """What Optuna calls each choice: itself, or a part's name (with a number where several share one)."""
    plain = [_label(choice) for choice in choices]
    return [label if plain.count(label) == 1 else f"{label}#{number}" for number, label in enumerate(plain)]


def as_range(value: Any) -> Range | None:
    """The range that a mapping with ``low`` and ``high`` stands for; None for anything else."""
    return Range.model_validate(value) if isinstance(value, Mapping) and "low" in value and "high" in value else None


def _label(choice: Any) -> Any:
    if isinstance(choice, Mapping):
        return str(choice.get("name", choice))
    # Optuna knows none of a list's kind (``betas: [0.9, 0.99]``).
    return choice if isinstance(choice, str | int | float | None) else str(choice)


def _ranges(choice: Any) -> dict[str, Range]:
    """The ranges inside a choice by name."""
    values = choice.items() if isinstance(choice, Mapping) else ()
    return {name: within for name, value in values if (within := as_range(value)) is not None}


def _inside(choice: Any, value: Any) -> dict[str, Any] | None:
    """What ``value`` has for each range inside a choice; None where one of them lies outside."""
    numbers = {name: value.get(name) if isinstance(value, Mapping) else None for name in _ranges(choice)}
    return numbers if all(numbers[name] in within for name, within in _ranges(choice).items()) else None
