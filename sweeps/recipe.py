"""A recipe: the one file that describes a sweep, read into frozen models with every mistake named at once."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from emeval.question_sets import question_set_path
from emeval.spec import EvalSpec, JudgeSpec
from emeval.strict_yaml import load_yaml
from emtrain import names
from emtrain.lookup import unknown
from emtrain.mistakes import explain, shown
from emtrain.paths import user_path
from emtrain.spec import RunSpec, Spec
from sweeps.search_spec import SearchSpec
from sweeps.space import Range, corners

RECIPES = Path(__file__).parent / "recipes"
SHOWN_PROBLEMS = 20
"""A screenful."""
KEPT_OVERRIDES = "# emsweep-set: "
"""Begins the last line of a kept recipe, a comment with a JSON list."""

Axes = dict[str, tuple[Any, ...]]
KeepWeights = Literal["all", "last", "none"]


class ResourceSpec(Spec):
    """How runs share the hardware. None of it changes a run's numbers."""

    backend: Literal["auto", "packed", "trl"] = "auto"
    """``packed``: many runs share one base model and its forward passes; ``trl``: each run alone, in TRL's trainer;
    ``auto`` packs what can be packed."""
    pack: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Runs packed together on a device; ``auto`` measures how many are worth it, one included."""
    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Runs in work at once, those that are being judged among them; ``auto`` is twice ``pack`` for each GPU, or for
    each CPU core where there is none."""
    keep_weights: KeepWeights = "all"
    """Which weights are kept in MLflow. ``all``: a run's adapter at every evaluation point. ``last``: that of its end,
    or the newest of a run that was stopped early. ``none``: no weights; ``emsweep geometry`` has nothing to measure.
    Where all weights are trained, ``all`` keeps no more than ``last``: the model at the end."""


def _better(metric: str) -> Literal["minimize", "maximize"]:
    return "maximize" if metric.endswith((names.ALIGNED, names.COHERENT, names.N_JUDGED)) else "minimize"


class StoppingSpec(Spec):
    """Runs that do worse than their fellows at an evaluation point end there (``eval.at`` says when they are seen)."""

    rule: Literal["asha", "median", "halving"] = "asha"
    """``asha``: only the best ``1 / reduction`` of those seen at a rung go on (arXiv 1810.05934). ``median``: a run
    ends when its best value so far is worse than the median of its fellows' running means (Vizier). ``halving``: all
    runs of the grid wait for each other at a rung, then the best ``1 / reduction`` go on (arXiv 1502.07943)."""
    metric: str = names.eval_metric(names.ALIGNED)
    """A metric of evaluation points; ``heldout/loss`` for instance."""
    direction: Literal["minimize", "maximize"] = Field(default_factory=lambda given: _better(given.get("metric", "")))
    """Which values are better; where it is left out, high ones of scores and low ones of all else."""
    by: Literal["steps", "tokens"] = "steps"
    """What rungs are counted in; tokens where runs differ in batch size or row length."""
    grace: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the longest run before which none is stopped."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Of ``asha`` and ``halving``: one in so many goes on from each rung, and rungs are so many times apart."""

    @model_validator(mode="after")
    def _halving_counts_steps(self) -> Self:
        if self.rule == "halving" and self.by != "steps":
            raise ValueError(f"by: halving has its rungs at steps, not at {self.by}; leave `by` out, or use rule: asha")
        return self


class TrackingSpec(Spec):
    """Where the sweep is recorded."""

    uri: str | None = None
    """An MLflow tracking URI; None is ``MLFLOW_TRACKING_URI``, else a SQLite file in ``./emsweep-data``."""

    @field_validator("uri")
    @classmethod
    def _holds_no_secret(cls, uri: str | None) -> str | None:
        if uri is not None and re.search(r"://[^/]*@|password=|[?&][^=&]*(?i:token|key|secret)", uri):
            raise ValueError(
                "the address holds a user, password or key, and a recipe is kept with its sweep; set "
                "MLFLOW_TRACKING_URI in the environment instead (of a server: "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD)"
            )
        return uri


class AnalysisSpec(Spec):
    """What the report's verdict is held to, stated before there are results. None of it changes a run's numbers."""

    margin: Annotated[float, Field(gt=0, le=100)] | None = None
    """The gain of alignment, in points, that would matter; None is the report's usual one (5)."""
    null_sweep: str | None = None
    """Name of a finished null sweep: one configuration with many seeds, of the same model and dataset, asked and
    judged alike. It says what luck does where configurations have fewer than three seeds."""


SweepName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""Letters, digits, dots, hyphens and underscores: it names a folder as well."""


class Recipe(Spec):
    """A sweep: one base run, varied over a grid."""

    name: SweepName
    """Of the sweep and its MLflow experiment: letters, digits, dots, hyphens and underscores."""
    base: RunSpec
    grid: Annotated[tuple[Axes, ...], BeforeValidator(lambda grid: (grid,) if isinstance(grid, Mapping) else grid)] = ()
    """Axes by dotted key of a run (``optimizer.learning_rate``), each with its values. The runs are the product of
    the axes, the first axis slowest. A list of such mappings is a list of products, one after the other. Without a grid
    and a search the sweep is the base run."""
    search: SearchSpec | None = None
    """A search after the grid, or instead of it."""
    stopping: StoppingSpec | None = None
    """Early stopping; None trains every run to its end."""
    eval: EvalSpec
    analysis: AnalysisSpec = AnalysisSpec()
    resources: ResourceSpec = ResourceSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _halving_can_wait(self) -> Self:
        """Every run of a rung has to come there before one goes on."""
        if self.stopping is None or self.stopping.rule != "halving":
            return self
        if self.search is not None:
            raise ValueError(
                "stopping.rule: halving waits until all runs have come to a rung, and a search proposes runs by how "
                "others ended; use rule: asha"
            )
        if self.resources.backend == "trl":
            raise ValueError(
                "resources.backend: a run that trains alone, by trl, keeps the device while it waits for others, as "
                "stopping.rule halving has it; use backend: auto, or rule: asha"
            )
        return self

    @model_validator(mode="after")
    def _metrics_are_reported(self) -> Self:
        """A search for a metric that no run has would fail every trial, after it was trained."""
        sets = [None, *(question_set_path(name).stem for name in self.eval.questions)]
        known = [names.HELDOUT_LOSS, names.HELDOUT_LOSS_PER_SEQUENCE]
        known += [names.eval_metric(score, name) for name in sets for score in names.SCORES]
        wanted = {"stopping.metric": [self.stopping.metric]} if self.stopping else {}
        if self.search:
            wanted |= {"search.objectives": [*self.search.objectives], "search.constraints": [*self.search.constraints]}
        for place, metrics in wanted.items():
            for metric in metrics:
                parts = metric.split("/")
                of_the_set = "/".join(parts[:2] + parts[3:]) if len(parts) == 4 else metric  # not of one answer format
                if of_the_set not in known:
                    raise ValueError(f"{place}: {unknown('metric', metric, known)}")
        return self


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        more = len(problems) - SHOWN_PROBLEMS
        lines = [f"{source}: {problem}" for problem in problems[:SHOWN_PROBLEMS]]
        super().__init__("\n".join([*lines, f"  and {more} more"] if more > 0 else lines))
        self.problems = tuple(problems)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a recipe given by name or by path. Raises ``ValueError`` when there is none."""
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = user_path(recipe)
    if path.is_file():
        return path
    if recipe and path.is_dir():
        raise ValueError(f"{recipe} is a directory; give the .yaml file in it")
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise ValueError(f"there is no recipe file {recipe}")
    raise ValueError(f"{unknown('recipe', recipe, recipe_names())}; or give the path of a .yaml file")


def recipe_text(recipe: str) -> str:
    """What the file of a recipe says. Raises ``ValueError`` when there is none, or none that is text."""
    try:
        return recipe_path(recipe).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{recipe}: not a text file in UTF-8") from None


def load_recipe(text: str, *, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML ``text``; ``source`` is what errors call it.

    ``overrides`` are ``key=value`` with dotted keys and YAML values, applied before the check.
    Raises ``RecipeError``.
    """
    content = _content(text, source=source, overrides=overrides)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        # A grid that is one product is read as a list of one.
        single = isinstance(content.get("grid"), Mapping)
        lines = [line.replace("grid[0]", "grid") if single else line for line in explain(error, Recipe)]
        raise RecipeError(source, lines) from error
    problems = _axis_problems(content, recipe)
    if problems:
        raise RecipeError(source, problems)
    return recipe


def check_name(name: str, *, key: str) -> None:
    """Raises ``ValueError``, which names ``key``, when a sweep can't be called ``name``."""
    try:
        TypeAdapter(SweepName).validate_python(name)
    except ValidationError as error:
        raise ValueError("\n".join(f"{key}: {line}" for line in explain(error))) from error


def load_judge(name: str, *, overrides: Sequence[str] = ()) -> JudgeSpec:
    """The judge called ``name``, with its arguments as ``overrides`` (``key=value``). Raises ``RecipeError``."""
    try:
        return JudgeSpec.model_validate(_overridden({"name": name}, "--judge", overrides))
    except ValidationError as error:
        raise RecipeError("--judge", explain(error, JudgeSpec)) from error


def kept_text(text: str, overrides: Sequence[str]) -> str:
    """What is kept of a recipe with its sweep: the file, and as its last line what was set on the command line."""
    # Always written, so that no line of the user's own is ever taken for it; JSON keeps what has lines itself on one.
    return text.rstrip("\n") + f"\n{KEPT_OVERRIDES}{json.dumps([*overrides])}\n"


def kept_overrides(text: str) -> list[str]:
    """The ``overrides`` of ``kept_text``."""
    _, marker, overrides = text.rstrip("\n").rpartition("\n")[2].partition(KEPT_OVERRIDES)
    return [str(override) for override in json.loads(overrides)] if marker else []


def kept_analysis(text: str) -> AnalysisSpec:
    """The analysis that a recipe kept with its sweep states; the files it names need not be there any more."""
    content = _content(text, source=names.RECIPE, overrides=kept_overrides(text))
    try:
        return AnalysisSpec.model_validate(content.get("analysis", {}))
    except ValidationError as error:
        raise RecipeError(names.RECIPE, [f"analysis.{line}" for line in explain(error, AnalysisSpec)]) from error


def _content(text: str, *, source: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        content = load_yaml(text)
    except ValueError as error:
        raise RecipeError(source, [str(error)]) from error
    if not isinstance(content, dict):
        found = "the file is empty" if content is None else f"this begins as {shown(content)}"
        raise RecipeError(source, [f"a recipe is a mapping of keys ({', '.join(Recipe.model_fields)}); {found}"])
    return _overridden(content, source, overrides)


def _overridden(content: dict[str, Any], source: str, overrides: Sequence[str]) -> dict[str, Any]:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(source, [f"--set {override}: expected KEY=VALUE"])
        try:
            content = with_value(content, key, load_yaml(value))
        except ValueError as error:
            raise RecipeError(source, [f"--set {override}: {error}"]) from error
    return content


def with_value(content: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested mappings with ``value`` at a dotted ``key``. A part given by bare name becomes a mapping.

    Raises ``ValueError`` when the key leads through something that holds no keys.
    """
    head, dot, rest = key.partition(".")
    if not dot:
        return {**content, head: value}
    inner = content.get(head, {})
    if isinstance(inner, str) and head in {"optimizer", "schedule"}:
        inner = {"name": inner}
    if not isinstance(inner, Mapping):
        raise ValueError(f"{head} is {shown(inner)}, which has no key {rest!r}")
    return {**content, head: with_value(inner, rest, value)}


def changed(spec: RunSpec, changes: Mapping[str, Any]) -> RunSpec:
    """``spec`` with the values of ``changes`` at their dotted keys. Raises ``ValidationError``."""
    content = spec.model_dump(mode="json", exclude_unset=True)
    # A whole part comes before keys inside that part.
    for key in sorted(changes, key=lambda key: key.count(".")):
        content = with_value(content, key, changes[key])
    return RunSpec.model_validate(content)


def expand(recipe: Recipe) -> list[RunSpec]:
    """Every run of the grid in order, repeats included. Raises ``RecipeError`` when a combination is not valid."""
    specs = []
    for axes in recipe.grid or (({},) if recipe.search is None else ()):
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            try:
                specs.append(changed(recipe.base, chosen))
            except ValueError as error:
                where = "grid (" + ", ".join(f"{key}={value}" for key, value in chosen.items()) + ")"
                lines = explain(error, RunSpec) if isinstance(error, ValidationError) else [str(error)]
                raise RecipeError(recipe.name, [f"{where}: {line}" for line in lines]) from error
    return specs


def _axis_problems(content: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Each axis value tried alone on the base run, so that a mistake is named once and at its place."""
    base = content["base"]
    several = len(recipe.grid) > 1
    problems = []
    for number, axes in enumerate(recipe.grid):
        prefix = f"grid[{number}]" if several else "grid"
        for key, values in axes.items():
            # An axis may be what makes another one of the same part valid; `expand` tries them together.
            part = key.partition(".")[0]
            alone = not any(other != key and other.partition(".")[0] == part for other in axes)
            if not values:
                problems.append(f"{prefix}.{key}: the axis has no values")
            for position, value in enumerate(values):
                try:
                    RunSpec.model_validate(with_value(base, key, value))
                except ValidationError as error:
                    for line in explain(error, RunSpec):
                        if line.startswith(f"{key}: unknown key"):
                            problems.append(f"{prefix}.{line}")
                        elif line.startswith((f"{key}:", f"{key}.", f"{key}[")):
                            problems.append(f"{prefix}.{key}[{position}]{line.removeprefix(key)}")
                        elif alone and line.startswith(f"{part}:"):
                            problems.append(f"{prefix}.{key}: {line}")
                except ValueError as error:
                    problems += [f"{prefix}.{key}: {error}"] if alone else []
    for key, entry in (recipe.search.space if recipe.search else {}).items():
        try:
            ends = corners(entry)
        except ValidationError as error:
            problems += [f"search.space.{key}: {line}" for line in explain(error, Range)]
            continue
        for value in ends:
            try:
                changed(recipe.base, {key: value})
            except ValidationError as error:
                problems += [f"search.space.{key} at {value!r}: {line}" for line in explain(error, RunSpec)]
            except ValueError as error:
                problems.append(f"search.space.{key}: {error}")
    return list(dict.fromkeys(problems))
