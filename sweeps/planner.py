"""From a recipe to the list of runs it stands for: their identity, names and sizes. Starts nothing, loads no model."""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emeval.question_sets import QuestionSet, load_question_set
from emeval.spec import EvalSpec
from emtrain import names
from emtrain.rows import dataset_path, load_dataset, rows_digest, split
from emtrain.schedule import build
from emtrain.spec import RunSpec, flatten
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
    heldout_rows: int
    heldout_sha256: str


@functools.cache
def dataset_facts(dataset: str, heldout_fraction: float) -> DatasetFacts:
    """Read a dataset and split it. Raises ``ValueError`` when it can't be read or split."""
    loaded = load_dataset(dataset)
    train, heldout = split(loaded.rows, heldout_fraction)
    return DatasetFacts(loaded.sha256, len(train), len(heldout), rows_digest(heldout))


@dataclass(frozen=True)
class Evaluation:
    """What is asked of a run, with the questions themselves."""

    spec: EvalSpec
    question_sets: tuple[QuestionSet, ...]
    responses: int
    """Sampled each time a run is evaluated."""

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
        return {
            names.DATASET_SHA256: self.dataset.sha256,
            names.HELDOUT_SHA256: self.dataset.heldout_sha256,
            names.QUESTIONS_SHA256: " ".join(f"{s.name}:{s.sha256}" for s in self.evaluation.question_sets),
        }


def plan_run(spec: RunSpec, evaluation: Evaluation, *, name: str) -> PlannedRun:
    """The run that ``spec`` stands for. Raises ``ValueError`` when its dataset or its schedule can't be used."""
    dataset = dataset_facts(spec.dataset, spec.heldout_fraction)
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

    @property
    def responses(self) -> int:
        """Sampled responses of the whole sweep, those of the base models included."""
        models = {run.spec.model for run in self.runs}
        return self.evaluation.responses * (sum(len(run.evaluate_at) for run in self.runs) + len(models))

    @property
    def judge_calls(self) -> dict[str, int]:
        """Scores asked of the judges of each name."""
        named = Counter(judge.name for judge in self.evaluation.spec.judges)
        return {name: count * self.responses * RUBRICS for name, count in named.items()}


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
    return SweepPlan(tuple(runs.values()), len(specs) - len(runs), evaluation)


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


def missing_datasets(recipe: Recipe) -> list[str]:
    """Datasets of a recipe whose files are not there (yet)."""
    datasets = dict.fromkeys(spec.dataset for spec in expand(recipe))
    return [dataset for dataset in datasets if not dataset_path(dataset).is_file()]


def run_key(spec: RunSpec, evaluation: Evaluation, dataset: DatasetFacts) -> str:
    """Identity of a run: the same key, the same numbers. Resources and tracking have no part in it."""
    identity = {
        "run": spec.model_dump(mode="json"),
        "eval": evaluation.spec.model_dump(mode="json"),
        "dataset": dataset.sha256,
        "questions": {questions.name: questions.sha256 for questions in evaluation.question_sets},
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def run_names(specs: Sequence[RunSpec]) -> list[str]:
    """A name for each run, made of the leaves in which the runs differ; the model's name when they don't."""
    leaves = [flatten(spec) for spec in specs]
    keys = list(dict.fromkeys(key for leaf in leaves for key in leaf))
    varying = [key for key in keys if len({json.dumps(leaf.get(key)) for leaf in leaves}) > 1]
    return [" ".join(_label(key, leaf[key]) for key in varying if key in leaf) or leaf["model"] for leaf in leaves]


def _label(key: str, value: Any) -> str:
    if key in {"model", "dataset", "schedule", "optimizer"}:
        return str(value).rpartition("/")[2].removesuffix(".jsonl")
    short = {"learning_rate": "lr", "warmup_steps": "warmup"}.get(key, key.rpartition(".")[2])
    return f"{short}={value:g}" if isinstance(value, float) else f"{short}={value}"
