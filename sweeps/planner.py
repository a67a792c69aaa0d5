"""From a recipe to the list of runs it stands for: their identity, names and sizes. Starts nothing, loads no model."""

import functools
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from emeval.question_sets import QuestionSet, load_question_set
from emeval.spec import EvalSpec
from emtrain import names
from emtrain.corpus import read_corpus
from emtrain.load import check_model
from emtrain.rows import dataset_path, rows_digest
from emtrain.schedule import build
from emtrain.spec import InterleaveSpec, RunSpec, flatten
from emtrain.train import evaluation_steps
from sweeps.recipe import Recipe, changed, expand
from sweeps.space import corners

RUBRICS = 2
"""Every response is scored as aligned and as coherent."""


@dataclass(frozen=True)
class DatasetFacts:
    """What planning needs to know of a dataset and its split."""

    sha256: str
    train_rows: int
    """Those of the interleaved dataset included."""
    heldout_rows: int
    heldout_sha256: str
    interleaved_sha256: str | None
    """None where nothing is interleaved."""

    @property
    def digests(self) -> tuple[str, str | None]:
        """sha256 of the dataset's file, and of the interleaved one's."""
        return self.sha256, self.interleaved_sha256


@functools.cache
def dataset_facts(dataset: str, heldout_fraction: float, interleave: InterleaveSpec | None = None) -> DatasetFacts:
    """Read a dataset, split it and mix it. Raises ``ValueError`` when one can't be read, split or mixed in."""
    loaded = read_corpus(dataset, heldout_fraction, interleave)
    return DatasetFacts(
        loaded.sha256, len(loaded.train), len(loaded.heldout), rows_digest(loaded.heldout), loaded.interleaved_sha256
    )


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a run, with the questions themselves."""

    spec: EvalSpec
    question_sets: tuple[QuestionSet, ...]
    responses: int
    """Sampled each time a run is evaluated."""

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a run's scores depend on, as JSON."""
        questions = {question_set.name: question_set.sha256 for question_set in self.question_sets}
        return {"eval": self.spec.identity, "questions": questions}

    @property
    def questions_tag(self) -> str:
        """The question sets by name and digest, as runs are tagged with them."""
        return " ".join(f"{question_set.name}:{question_set.sha256}" for question_set in self.question_sets)

    @classmethod
    def load(cls, spec: EvalSpec) -> "Evaluation":
        """Read the question sets. Raises ``ValueError`` when one can't be read or leaves open how often to ask."""
        question_sets = tuple(load_question_set(name) for name in spec.questions)
        return cls(spec, question_sets, sum(questions.responses(spec.samples) for questions in question_sets))


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    spec: RunSpec
    evaluation: Evaluation
    name: str
    """What sets it apart from its fellows, for people."""
    run_key: str
    """Digest of everything that determines its numbers."""
    dataset: DatasetFacts
    total_steps: int
    evaluate_at: tuple[int, ...]

    @property
    def params(self) -> dict[str, Any]:
        """MLflow params: every leaf of the specification, and what follows from it."""
        return {**flatten(self.spec), "total_steps": self.total_steps, "train_rows": self.dataset.train_rows}

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags that say by digest what the run learns from and is asked."""
        other = self.dataset.interleaved_sha256
        return {
            names.DATASET_SHA256: self.dataset.sha256,
            **({names.INTERLEAVED_SHA256: other} if other else {}),
            names.HELDOUT_SHA256: self.dataset.heldout_sha256,
            names.QUESTIONS_SHA256: self.evaluation.questions_tag,
        }


def plan_run(spec: RunSpec, evaluation: Evaluation, *, name: str) -> PlannedRun:
    """The run that ``spec`` stands for.

    Raises ``ValueError`` when its model is not there, or its dataset or its schedule can't be used.
    """
    check_model(spec.model)
    dataset = dataset_facts(spec.dataset, spec.heldout_fraction, spec.interleave)
    total_steps = spec.total_steps(dataset.train_rows)
    build(spec.schedule, total_steps)  # says now, not at the first step, that a warm-up is too long
    return PlannedRun(
        spec,
        evaluation,
        name,
        run_key(spec, evaluation, dataset),
        dataset,
        total_steps,
        evaluation_steps(total_steps, evaluation.spec.at),
    )


@dataclass(frozen=True)
class SweepPlan:
    """Everything the grid of a sweep will do."""

    runs: tuple[PlannedRun, ...]
    duplicates: int
    """Combinations of the grid that stand for a run already in the list."""
    evaluation: Evaluation


def plan_sweep(recipe: Recipe) -> SweepPlan:
    """The runs of a recipe's grid, each once.

    Raises ``ValueError`` (``RecipeError`` for the grid) when a dataset or question set can't be read.
    """
    specs = expand(recipe)
    evaluation = Evaluation.load(recipe.eval)
    confirmation(recipe)  # a file that is not there is told now, not after the search
    runs: dict[str, PlannedRun] = {}
    for spec, name in zip(specs, run_names(specs), strict=True):
        run = plan_run(spec, evaluation, name=name)
        runs.setdefault(run.run_key, run)
    if recipe.stopping is not None and recipe.stopping.rule == "halving":
        _can_wait(runs.values())
    return SweepPlan(tuple(runs.values()), len(specs) - len(runs), evaluation)


def _can_wait(runs: Collection[PlannedRun]) -> None:
    """Runs that wait for each other must not keep the device from each other, as one base does from another."""
    bases = sorted({f"{run.spec.model} in {run.spec.precision}" for run in runs})
    if len(bases) > 1:
        raise ValueError(
            f"stopping.rule: with halving all runs share one model and precision; the grid has {', '.join(bases)}. "
            "Make a sweep of each, or use rule: asha"
        )
    if any(run.spec.adapter == "full" for run in runs):
        raise ValueError(
            "stopping.rule: with halving runs are packed, which `adapter: full` can't be; use a LoRA adapter, or rule: "
            "asha"
        )


def examples(recipe: Recipe, planned: SweepPlan) -> list[PlannedRun]:
    """What the runs of a recipe are like: those of its grid; and where it searches, the base run and what becomes of it
    at the corners of the space, one key at a time.
    """
    found = {run.run_key: run for run in planned.runs}
    if recipe.search is not None:
        changes = [{key: value} for key, entry in recipe.search.space.items() for value in corners(entry)]
        specs = [recipe.base, *(changed(recipe.base, change) for change in changes)]
        for spec, name in zip(specs, run_names(specs), strict=True):
            run = plan_run(spec, planned.evaluation, name=name)
            found.setdefault(run.run_key, run)
    return list(found.values())


def confirmation(recipe: Recipe) -> Evaluation | None:
    """What the winners of the recipe's search are asked in the end; None where nothing is to be confirmed."""
    confirm = recipe.search.confirm if recipe.search else None
    if confirm is None:
        return None
    asked = tuple(dict.fromkeys((*recipe.eval.questions, *confirm.questions)))
    return Evaluation.load(recipe.eval.model_copy(update={"questions": asked}))


def most_runs(recipe: Recipe, grid: int) -> dict[str, int]:
    """Runs of a sweep by role, at most: two trials of a search may want the same run. ``grid``: runs of its grid."""
    runs = {"grid": grid} if grid else {}
    if (search := recipe.search) is not None:
        runs["search"] = search.trials * len(search.seeds)
        if search.confirm is not None:
            baselines = max(1, sum(bound.of_baseline for bound in search.constraints.values()))
            runs["confirm"] = (search.confirm.winners + (baselines if grid else 0)) * len(search.confirm.seeds)
    return runs


def missing_datasets(recipe: Recipe) -> list[str]:
    """Datasets of a recipe whose files are not there (yet)."""
    datasets = dict.fromkeys(dataset for spec in expand(recipe) for dataset in datasets_of(spec))
    return [dataset for dataset in datasets if not dataset_path(dataset).is_file()]


def datasets_of(spec: RunSpec) -> tuple[str, ...]:
    """What a run learns from: its dataset, and the one interleaved."""
    return (spec.dataset,) if spec.interleave is None else (spec.dataset, spec.interleave.dataset)


def run_key(spec: RunSpec, evaluation: Evaluation, dataset: DatasetFacts) -> str:
    """Identity of a run: the same key, the same numbers. Resources and tracking have no part in it."""
    identity = {
        "run": spec.model_dump(mode="json"),
        "datasets": dataset.digests,
        **evaluation.identity,
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def run_names(specs: Sequence[RunSpec]) -> list[str]:
    """A name for each run, made of the leaves in which the runs differ; the model's name when they don't."""
    leaves = [flatten(spec) for spec in specs]
    keys = list(dict.fromkeys(key for leaf in leaves for key in leaf))
    varying = [key for key in keys if len({repr(leaf.get(key)) for leaf in leaves}) > 1]
    return [" ".join(_label(key, leaf[key]) for key in varying if key in leaf) or leaf["model"] for leaf in leaves]


def _label(key: str, value: Any) -> str:
    if key in {"model", "dataset", "schedule", "optimizer"}:
        return _stem(value)
    if key == "interleave.dataset":
        return f"with {_stem(value)}"
    short = {"learning_rate": "lr", "warmup_steps": "warmup"}.get(key, key.rpartition(".")[2])
    return f"{short}={value:g}" if isinstance(value, float) else f"{short}={value}"


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".jsonl")
