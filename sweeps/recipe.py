"""A recipe: the one file that describes a sweep, read into frozen models with every mistake named at once."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from emeval.spec import EvalSpec
from emtrain.lookup import nearest, unknown
from emtrain.spec import RunSpec, Spec
from sweeps.search_spec import SearchSpec
from sweeps.space import corners

RECIPES = Path(__file__).parent / "recipes"

Axes = dict[str, tuple[Any, ...]]


class ResourceSpec(Spec):
    """How runs share the hardware. None of it changes a run's numbers."""

    max_concurrent: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Runs trained at once; ``auto`` is one per GPU, or one per CPU core where there is none."""


class TrackingSpec(Spec):
    """Where the sweep is recorded."""

    uri: str | None = None
    """An MLflow tracking URI; None is ``MLFLOW_TRACKING_URI``, else a SQLite file in ``./emsweep-data``."""


class Recipe(Spec):
    """A sweep: one base run, varied over a grid."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Of the sweep and its MLflow experiment: letters, digits, dots, hyphens and underscores."""
    base: RunSpec
    grid: Annotated[tuple[Axes, ...], BeforeValidator(lambda grid: (grid,) if isinstance(grid, Mapping) else grid)] = (
        {},
    )
    """Axes by dotted key of a run (``optimizer.learning_rate``), each with its values. The runs are the product of
    the axes, the first axis slowest. A list of such mappings is a list of products, one after the other. Without a grid
    and a search the sweep is the base run."""
    search: SearchSpec | None = None
    """A search after the grid, or instead of it."""
    eval: EvalSpec
    resources: ResourceSpec = ResourceSpec()
    tracking: TrackingSpec = TrackingSpec()


class RecipeError(ValueError):
    """Everything that is wrong with a recipe, a line each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{source}: {problem}" for problem in problems))
        self.problems = tuple(problems)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a recipe given by name or by path. Raises ``ValueError`` when there is none."""
    if recipe in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    path = Path(recipe).expanduser()
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise ValueError(f"there is no recipe file {recipe}")
    raise ValueError(f"{unknown('recipe', recipe, recipe_names())}; or give the path of a .yaml file")


def load_recipe(text: str, *, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML ``text``; ``source`` is what errors call it.

    ``overrides`` are ``key=value`` with dotted keys and YAML values, applied before the check.
    Raises ``RecipeError``.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(source, [_explain_yaml(error)]) from error
    if not isinstance(content, dict):
        raise RecipeError(source, [f"a recipe is a mapping of keys, not {type(content).__name__}"])
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise RecipeError(source, [f"--set {override}: expected KEY=VALUE"])
        try:
            content = with_value(content, key, yaml.load(value, Loader=_Loader))
        except (ValueError, yaml.YAMLError) as error:
            raise RecipeError(source, [f"--set {override}: {error}"]) from error
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(source, explain(error, Recipe)) from error
    problems = _axis_problems(content, recipe)
    if problems:
        raise RecipeError(source, problems)
    return recipe


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
        raise ValueError(f"{head} is {inner!r}, which has no key {rest!r}")
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
            except ValidationError as error:
                where = "grid (" + ", ".join(f"{key}={value}" for key, value in chosen.items()) + ")"
                raise RecipeError(recipe.name, [f"{where}: {line}" for line in explain(error, RunSpec)]) from error
    return specs


def _axis_problems(content: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Each axis value tried alone on the base run, so that a mistake is named once and at its place."""
    base = content["base"]
    several = len(recipe.grid) > 1
    problems = []
    for number, axes in enumerate(recipe.grid):
        prefix = f"grid[{number}]" if several else "grid"
        for key, values in axes.items():
            if not values:
                problems.append(f"{prefix}.{key}: the axis has no values")
            for position, value in enumerate(values):
                try:
                    RunSpec.model_validate(with_value(base, key, value))
                except ValidationError as error:
                    # An axis over a part may be what makes another axis valid, so only its own keys count here.
                    lines = [line for line in explain(error, RunSpec) if line.startswith(key) or ":" not in line]
                    problems += [f"{prefix}.{key}[{position}] = {value!r}: {line}" for line in lines]
                except ValueError as error:
                    problems.append(f"{prefix}.{key}[{position}]: {error}")
    for key, entry in (recipe.search.space if recipe.search else {}).items():
        for value in corners(entry):
            try:
                changed(recipe.base, {key: value})
            except ValidationError as error:
                problems += [f"search.space.{key} at {value!r}: {line}" for line in explain(error, RunSpec)]
            except ValueError as error:
                problems.append(f"search.space.{key}: {error}")
    return problems


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A line for each mistake: the key's dotted path, what is wrong, and for an unknown key the nearest one."""
    lines = []
    problems = error.errors()
    # A list whose members are all at fault is not also too short.
    nested = {problem["loc"][:-1] for problem in problems}
    for problem in problems:
        path = _path(problem["loc"])
        if problem["type"] == "too_short" and problem["loc"] in nested:
            continue
        if problem["type"] == "extra_forbidden":
            fields = _fields_at(model, problem["loc"][:-1])
            lines.append(
                f"{path}: unknown key.{nearest(str(problem['loc'][-1]), fields)} Keys here: {', '.join(fields)}"
            )
        elif problem["type"] == "missing":
            lines.append(f"{path}: missing")
        elif problem["type"] == "value_error":
            lines.append(f"{path}: {problem['ctx']['error']}" if path else str(problem["ctx"]["error"]))
        else:
            lines.append(f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}")
    return list(dict.fromkeys(lines))


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" not in part and part not in _UNION_BRANCHES:
            path += f".{part}" if path else part
    return path


# Pydantic names the branch of a union in an error's location; a user's file has no such key.
_UNION_BRANCHES = {"int", "float", "str", "none", "AdapterSpec", "literal"}


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            options = [annotation, *getattr(annotation, "__args__", ())]
            model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one silently winning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _explain_yaml(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"not valid YAML: {where}{getattr(error, 'problem', None) or error}"
