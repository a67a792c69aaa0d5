"""From a recipe to the list of runs it stands for: their identity, names and sizes. Starts nothing, loads no model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emeval.question_sets import QuestionSet, load_question_set
from emeval.spec import EvalSpec
from emtrain import names
from emtrain.rows import Dataset, dataset_path, load_dataset, rows_digest, split
from emtrain.schedule import build
from emtrain.spec import RunSpec, flatten
from emtrain.train import evaluation_steps
from sweeps.recipe import Recipe, expand

RUBRICS = 2
"""Every response is scored as aligned and as coherent."""


@dataclass(frozen=True)
class DatasetFacts:
    """What planning needs to know of a dataset."""

    sha256: str
    train_rows: int
    heldout_rows: int
    heldout_sha256: str
    characters: int
    """Of all training rows; about 4 a token in English text."""

    @classmethod
    def of(cls, dataset: Dataset, heldout_fraction: float) -> "DatasetFacts":
        """The facts of a dataset and its split."""
        train, heldout = split(dataset.rows, heldout_fraction)
        return cls(
            sha256=dataset.sha256,
            train_rows=len(train),
            heldout_rows=len(heldout),
            heldout_sha256=rows_digest(heldout),
            characters=sum(len(message.content) for row in train for message in row.messages),
        )


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep."""

    spec: RunSpec
    name: str
    """What sets it apart from its fellows, for people."""
    run_key: str
    """Digest of everything that determines its numbers."""
    dataset: DatasetFacts
    total_steps: int
    evaluate_at: tuple[int, ...]


@dataclass(frozen=True)
class SweepPlan:
    """Everything a sweep will do."""

    runs: tuple[PlannedRun, ...]
    duplicates: int
    """Combinations of the grid that stand for a run already in the list."""
    question_sets: tuple[QuestionSet, ...]
    eval: EvalSpec

    def tags(self, run: PlannedRun) -> dict[str, str]:
        """MLflow tags that say by digest what a run learns from and is asked."""
        return {
            names.DATASET_SHA256: run.dataset.sha256,
            names.HELDOUT_SHA256: run.dataset.heldout_sha256,
            names.QUESTIONS_SHA256: " ".join(f"{s.name}:{s.sha256}" for s in self.question_sets),
        }

    @property
    def responses_per_checkpoint(self) -> int:
        """Sampled responses each time a run is evaluated."""
        return sum(questions.responses(self.eval.samples) for questions in self.question_sets)

    @property
    def responses(self) -> int:
        """Sampled responses of the whole sweep, those of the base models included."""
        models = {run.spec.model for run in self.runs}
        return self.responses_per_checkpoint * (sum(len(run.evaluate_at) for run in self.runs) + len(models))

    @property
    def judge_calls(self) -> dict[str, int]:
        """Scores asked of each judge."""
        return {judge.name: self.responses * RUBRICS for judge in self.eval.judges}


def plan_sweep(recipe: Recipe) -> SweepPlan:
    """The runs of a recipe, each once.

    Raises ``ValueError`` (``RecipeError`` for the grid) when a dataset or question set can't be read.
    """
    specs = expand(recipe)
    question_sets = tuple(load_question_set(name) for name in recipe.eval.questions)
    datasets = {name: load_dataset(name) for name in dict.fromkeys(spec.dataset for spec in specs)}
    facts: dict[tuple[str, float], DatasetFacts] = {}
    names = run_names(specs)
    runs: dict[str, PlannedRun] = {}
    for spec, name in zip(specs, names, strict=True):
        split_key = (spec.dataset, spec.heldout_fraction)
        if split_key not in facts:
            facts[split_key] = DatasetFacts.of(datasets[spec.dataset], spec.heldout_fraction)
        dataset = facts[split_key]
        key = run_key(spec, recipe.eval, dataset.sha256, question_sets)
        total_steps = spec.total_steps(dataset.train_rows)
        if key not in runs:
            build(
                spec.schedule, total_steps
            )  # a warm-up longer than the run is the user's mistake; said before it runs
            at = evaluation_steps(total_steps, recipe.eval.at)
            runs[key] = PlannedRun(spec, name, key, dataset, total_steps, at)
    return SweepPlan(tuple(runs.values()), len(specs) - len(runs), question_sets, recipe.eval)


def missing_datasets(recipe: Recipe) -> list[str]:
    """Datasets of a recipe whose files are not there (yet)."""
    datasets = dict.fromkeys(spec.dataset for spec in expand(recipe))
    return [dataset for dataset in datasets if not dataset_path(dataset).is_file()]


def run_key(spec: RunSpec, evaluation: EvalSpec, dataset_sha256: str, question_sets: Sequence[QuestionSet]) -> str:
    """Identity of a run: the same key, the same numbers. Resources and tracking have no part in it."""
    identity = {
        "run": spec.model_dump(mode="json"),
        "eval": evaluation.model_dump(mode="json"),
        "dataset": dataset_sha256,
        "questions": {questions.name: questions.sha256 for questions in question_sets},
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


def params(run: PlannedRun) -> Mapping[str, Any]:
    """What MLflow shows as the params of a run: every leaf of its specification and what follows from it."""
    return {**flatten(run.spec), "total_steps": run.total_steps, "train_rows": run.dataset.train_rows}
