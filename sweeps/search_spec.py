"""A search as a recipe writes it."""

import importlib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from emeval.question_sets import question_set_path
from emtrain.lookup import unknown
from emtrain.spec import Part, Spec
from sweeps.space import Range


class SamplerSpec(Part):
    """One of Optuna's samplers by name; further keys are its own arguments."""

    name: str = "tpe"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.name not in SAMPLERS:
            raise ValueError(unknown("sampler", self.name, SAMPLERS))
        return self

    def build(self, *, offset: int) -> Any:
        """The sampler, its seed moved by ``offset``. Raises ``ValueError`` for an argument that it does not take."""
        import optuna

        make = getattr(optuna.samplers, SAMPLERS[self.name])
        try:
            if self.name == "cmaes":
                importlib.import_module("cmaes")  # which Optuna does not bring along and misses at the first trial only
            return make(seed=self.seed + offset, **self.arguments)
        except (TypeError, ImportError) as error:
            raise ValueError(f"search.sampler {self.name}: {error}") from error


SAMPLERS = {
    "tpe": "TPESampler",
    "gp": "GPSampler",
    "nsgaii": "NSGAIISampler",
    "nsgaiii": "NSGAIIISampler",
    "cmaes": "CmaEsSampler",
    "qmc": "QMCSampler",
    "random": "RandomSampler",
}
ONE_GOAL = {"cmaes"}
"""Samplers that fail with several objectives, and take no notice of constraints."""


class Bound(Spec):
    """A constraint on a metric of a trial (mean over its seeds)."""

    at_most: float | Literal["baseline"] | None = None
    at_least: float | Literal["baseline"] | None = None
    """``baseline``: what the best cell of the sweep's grid reaches (a cell: the runs that differ in seed only)."""

    @property
    def of_baseline(self) -> bool:
        """Whether it follows from the grid."""
        return "baseline" in (self.at_most, self.at_least)

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give one of at_most and at_least")
        return self


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if twice := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise ValueError(
            f"given twice: {', '.join(map(str, twice))}; that would be the same run again, so give each once"
        )
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_distinct)]


class ConfirmSpec(Spec):
    """What is done with the winners of a search before anyone believes in them."""

    winners: Annotated[int, Field(ge=1)] = 2
    """Trials to train again, beside the cells of the grid they are measured against: those that the constraints'
    baselines come from, else the best one in the last objective."""
    seeds: Seeds
    """Seeds that the search has not seen."""
    questions: tuple[str, ...] = ()
    """Question sets that the search has not seen, asked in addition to the recipe's."""

    @field_validator("questions")
    @classmethod
    def _known_sets(cls, questions: tuple[str, ...]) -> tuple[str, ...]:
        for question_set in questions:
            question_set_path(question_set)
        return questions


class SearchSpec(Spec):
    """A search by Optuna over schedules, learning rates and whatever else a run has."""

    trials: Annotated[int, Field(ge=1)]
    """Points of the space to try, each with all seeds."""
    space: dict[str, Range | Annotated[tuple[Any, ...], Field(min_length=1)]]
    """By dotted key of a run: a range ``{low, high, log, integer}`` or a list of choices, which may be parts with
    ranges of their own."""
    objectives: Annotated[dict[str, Literal["minimize", "maximize"]], Field(min_length=1)]
    """Metrics at the end of a run (``heldout/loss``, ``eval/aligned``) and where they should go."""
    constraints: dict[str, Bound] = Field(default_factory=dict)
    """By metric. A trial that violates one is not feasible: it informs the sampler and never wins."""
    sampler: SamplerSpec = SamplerSpec()
    seeds: Seeds = (0,)
    """Replicates of every trial; its value is their mean."""
    warm_start: tuple[str, ...] = ()
    """Sweeps on the same MLflow store whose finished runs the study begins with: those that are the base run but for
    the space, on the same rows from the same weights, asked and judged alike. They teach the sampler. None of them
    wins: their seeds may be those that winners are confirmed on."""
    confirm: ConfirmSpec | None = None

    @model_validator(mode="after")
    def _fresh_seeds(self) -> Self:
        if self.confirm and (seen := set(self.confirm.seeds) & set(self.seeds)):
            raise ValueError(f"confirm.seeds {sorted(seen)} are among the search's own seeds; take others")
        if "seed" in self.space:
            raise ValueError("space.seed: seeds are replicates; give them as search.seeds")
        return self

    @model_validator(mode="after")
    def _within_its_samplers_powers(self) -> Self:
        if self.sampler.name in ONE_GOAL and (len(self.objectives) > 1 or self.constraints):
            several = f"{len(self.objectives)} objectives" if len(self.objectives) > 1 else "constraints"
            able = ", ".join(name for name in SAMPLERS if name not in ONE_GOAL)
            raise ValueError(
                f"sampler: {self.sampler.name} is for one objective without constraints, and there are {several}; "
                f"take one of: {able}"
            )
        return self
