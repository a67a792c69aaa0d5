"""What a recipe would take: runs, tokens, time, memory, disk, judge calls and dollars. Starts nothing, loads no model.

Every figure is counted, measured, or computed from something at hand. One that can't be had is None; why, and how to
get it, is in ``unknown``. What stands behind an estimate is a line of ``assumptions``.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from emtrain.corpus import read_corpus
from emtrain.load import files_at_hand
from emtrain.rows import dataset_path
from emtrain.spec import InterleaveSpec, RunSpec
from emtrain.token_count import count_tokens
from emtrain.train import evaluation_steps
from sweeps import judge_cost, throughput
from sweeps.estimate import BYTES_PER_TOKEN, FP32, TEMPLATE_TOKENS, ModelShape, memory, state_bytes, text_tokens
from sweeps.judge_cost import Price
from sweeps.planner import (
    RUBRICS,
    Evaluation,
    SweepPlan,
    confirmation,
    dataset_facts,
    datasets_of,
    missing_datasets,
    most_runs,
)
from sweeps.recipe import Recipe, expand

RESPONSE_BYTES, STEP_BYTES = 40, 1500
"""Of a judged response in ``responses.parquet`` beside its text, and of a step's four metrics in SQLite, indexes
included; measured on a sweep of 87 runs."""
ITEMSIZE = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Kind:
    """Runs that cost the same."""

    role: str
    """``grid``, ``search`` or ``confirm``."""
    spec: RunSpec
    """Of one of them."""
    runs: int
    steps: int | None
    """Of each; None where the dataset is not there to count its rows."""
    evaluations: int
    """Of each."""


@dataclass(frozen=True)
class RowTokens:
    """Tokens of a dataset's training rows, as one model reads them."""

    mean: float
    longest: int
    counted: bool
    """False where they are estimated from bytes."""


@dataclass
class Outlook:
    """The figures of a recipe. ``plan`` is None while files of datasets are missing.

    ``tokens_per_second``: of training, all devices together; None takes what this machine has measured. ``prices`` of
    judges by model go before the price list.
    """

    recipe: Recipe
    plan: SweepPlan | None
    tokens_per_second: float | None = None
    prices: Mapping[str, Price] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unknown: dict[str, str] = {}
        self.assumptions: list[str] = []
        self.specs = [run.spec for run in self.plan.runs] if self.plan else list(dict.fromkeys(expand(self.recipe)))
        self.kinds = _kinds(self.recipe, self.specs)
        self.models = list(dict.fromkeys(kind.spec.model for kind in self.kinds))
        self.missing = [] if self.plan else missing_datasets(self.recipe)
        asked = Evaluation.load(self.recipe.eval)
        self.asked = {"grid": asked, "search": asked, "confirm": confirmation(self.recipe) or asked}
        """By role."""

    def facts(self) -> dict[str, Any]:
        """Everything, by name; the unit is in the name where it is no count."""
        recipe, kinds = self.recipe, self.kinds
        runs = most_runs(recipe, len(self.specs))
        if recipe.search is not None:
            self.assumptions.append("a run of the search is taken to have the base run's size")
        if recipe.stopping is not None:
            self.assumptions.append("no run is stopped early; every one that is takes less")
        steps = self._steps()
        responses = self._responses()
        return {
            "sweep": recipe.name,
            "runs": sum(runs.values()),
            **({"of_these": runs} if recipe.search else {}),
            "duplicates": self.plan.duplicates if self.plan else len(expand(recipe)) - len(self.specs),
            "models": self.models,
            **({"datasets": datasets} if (datasets := self._datasets()) else {}),
            **({"missing_datasets": self.missing} if self.missing else {}),
            "steps": steps,
            "rows_trained_on": self._rows_trained_on(),
            "tokens": self._tokens(),
            "evaluations": sum(kind.runs * kind.evaluations for kind in kinds),
            "responses": responses,
            "judge_calls": self._judge_calls(responses),
            "dollars": self._dollars(),
            **self._seconds(),
            "device_memory_bytes": self._device_memory(),
            "disk_bytes": self._disk(steps),
            "unknown": self.unknown,
            "assumptions": self.assumptions,
        }

    def _datasets(self) -> dict[str, dict[str, int]]:
        found = {}
        for kind in self.kinds:
            if not set(datasets_of(kind.spec)) & set(self.missing):
                facts = dataset_facts(kind.spec.dataset, kind.spec.heldout_fraction, kind.spec.interleave)
                found[_data_name(kind.spec)] = {"train_rows": facts.train_rows, "heldout_rows": facts.heldout_rows}
        return found

    def _steps(self) -> int | None:
        if any(kind.steps is None for kind in self.kinds):
            self.unknown["steps"] = f"epochs of {', '.join(self.missing)} can't be counted before the file is there"
            self.unknown["rows_trained_on"] = "as steps"
            return None
        return sum(kind.runs * (kind.steps or 0) for kind in self.kinds)

    def _rows_trained_on(self) -> int | None:
        if "steps" in self.unknown:
            return None
        return sum(kind.runs * (kind.steps or 0) * kind.spec.batch_size for kind in self.kinds)

    def _tokens(self) -> int | None:
        if self.missing:
            self.unknown["tokens"] = f"{', '.join(self.missing)} is not there yet"
            return None
        if guessed := sorted({k.spec.model for k in self.kinds if not row_tokens_of(k.spec).counted}):
            self.assumptions.append(
                f"tokens: {', '.join(guessed)} has no tokenizer on this machine, so {BYTES_PER_TOKEN:g} bytes are "
                f"taken for a token, and {TEMPLATE_TOKENS} tokens added a message"
            )
        return round(sum(self._tokens_of(model) for model in self.models))

    def _tokens_of(self, model: str) -> float:
        """Trained on: the mean row times the rows of all steps."""
        return sum(
            kind.runs * (kind.steps or 0) * kind.spec.batch_size * row_tokens_of(kind.spec).mean
            for kind in self.kinds
            if kind.spec.model == model
        )

    def _evaluations(self) -> list[tuple[str, Evaluation, int]]:
        """Model, what it is asked, how often; the bases included, which all runs with the same questions share."""
        found = Counter(
            {(k.spec.model, "grid" if k.role == "search" else k.role): 1 for k in self.kinds}  # the base, once
        )
        for kind in self.kinds:
            found[kind.spec.model, "grid" if kind.role == "search" else kind.role] += kind.runs * kind.evaluations
        return [(model, self.asked[role], count) for (model, role), count in found.items()]

    def _responses(self) -> int:
        return sum(count * evaluation.responses for _, evaluation, count in self._evaluations())

    def _judge_calls(self, responses: int) -> dict[str, int]:
        """Scores asked of the judges of each name."""
        named = Counter(judge.name for judge in self.recipe.eval.judges)
        return {name: count * responses * RUBRICS for name, count in named.items()}

    def _dollars(self) -> float | None:
        total = 0.0
        for judge in self.recipe.eval.judges:
            if judge.name != "openai":
                continue
            model = judge.arguments["model"]
            price = self.prices.get(model)
            if price is None and (price := judge_cost.list_price(judge)) is not None:
                self.assumptions.append(
                    f"dollars: {model} at its list price of {price.day}, {price.input:g} in and {price.output:g} out a "
                    "million tokens; --price states another"
                )
            if price is None:
                self.unknown["dollars"] = f"there is no list price of {model}; state it: --price {model}=IN,OUT"
                return None
            for _, evaluation, count in self._evaluations():
                read, written = judge_cost.most_tokens(judge, evaluation)
                total += count * price.dollars(read, written)
        if total:
            longest = self.recipe.eval.max_new_tokens
            self.assumptions.append(f"dollars: at most, with every response {longest} tokens long and no prompt twice")
        return round(total, 2)

    def _seconds(self) -> dict[str, float | None]:
        """Of training and of sampling, which take turns on a device; judging behind an endpoint goes on meanwhile."""
        training = sampling = 0.0
        measured = {model: throughput.known(model) for model in self.models}
        for model, speed in measured.items():
            rate = self.tokens_per_second or (speed and speed.tokens_per_second)
            if rate and not self.missing:
                training += self._tokens_of(model) / rate
            if speed is not None:
                asked = sum(count * e.responses for name, e, count in self._evaluations() if name == model)
                sampling += asked / speed.responses_per_second
                self.assumptions.append(f"time: {model} at {speed} on this machine")
        if any(judge.name == "local" for judge in self.recipe.eval.judges):
            self.assumptions.append("time: without that of the local judge")
        lacking = [model for model, speed in measured.items() if speed is None]
        how = f"no sweep of {', '.join(lacking)} has finished on this machine to measure it by; run a short one"
        if self.missing:
            self.unknown["training_seconds"] = f"{', '.join(self.missing)} is not there yet"
        elif lacking and not self.tokens_per_second:
            self.unknown["training_seconds"] = f"{how}, or state --tokens-per-second"
        if lacking:
            self.unknown["sampling_seconds"] = how
        return {
            "training_seconds": None if "training_seconds" in self.unknown else round(training, 1),
            "sampling_seconds": None if lacking else round(sampling, 1),
        }

    def _device_memory(self) -> dict[str, Any]:
        """By model and precision, what the run needs that needs most."""
        found: dict[str, Any] = {}
        for kind in self.kinds:
            spec = kind.spec
            shape = self._shape(spec, "device_memory_bytes")
            alone = self.recipe.resources.backend == "trl" or spec.adapter == "full"
            precisions = ITEMSIZE if spec.precision == "auto" else {spec.precision: ITEMSIZE[spec.precision]}
            for precision, itemsize in precisions.items() if shape else ():
                assert shape is not None
                needed = memory(
                    shape,
                    spec.adapter,
                    spec.optimizer,
                    itemsize=itemsize,
                    rows=spec.micro_rows if alone else 1,
                    row_tokens=spec.max_length
                    if set(datasets_of(spec)) & set(self.missing)
                    else row_tokens_of(spec).longest,
                    sampled_tokens=self.recipe.eval.max_new_tokens + _longest_prompt(self.asked[kind.role]),
                )
                of_model = found.setdefault(spec.model, {})
                if precision not in of_model or needed.least > of_model[precision]["least"]:
                    of_model[precision] = {"least": needed.least, **asdict(needed)}
        if found:
            self.assumptions.append(
                "device memory: `least` is for one run and its smallest pass; each further run packed on the same base "
                "adds `run`, and on a GPU passes grow into half of what is free"
            )
        return found

    def _disk(self, steps: int | None) -> dict[str, int]:
        keep = self.recipe.resources.keep_weights
        kept = states = responses = 0
        for kind in self.kinds:
            # Every run keeps the responses of its base, too.
            responses += kind.runs * (kind.evaluations + 1) * self.asked[kind.role].responses
            shape = self._shape(kind.spec, "disk_bytes")
            if shape is not None:
                adapter = kind.spec.adapter != "full"
                # Adapters of every evaluation point may be kept, of whole models the last one only.
                points = {"all": kind.evaluations if adapter else 1, "last": 1, "none": 0}[keep]
                weights = shape.trained(kind.spec.adapter) * FP32
                kept += kind.runs * points * weights
                # Beside its state a run in work has its newest adapter and, to tell its turn, the one before.
                beside = min(kind.evaluations, 2) if adapter else 1
                state = state_bytes(shape, kind.spec.adapter, kind.spec.optimizer)
                states = max(states, state + beside * weights)
        text = self.recipe.eval.max_new_tokens * BYTES_PER_TOKEN
        found = {"responses": round(responses * len(self.recipe.eval.judges) * (RESPONSE_BYTES + text))}
        if "disk_bytes" not in self.unknown:
            found = {"adapters": kept, "state_of_each_run_in_work": states, **found}
        if steps is not None:
            found["metrics"] = steps * STEP_BYTES
        self.assumptions.append(
            f"disk: with resources.keep_weights: {keep}; at most, with every response as long as allowed and none "
            "compressed"
        )
        return found

    def _shape(self, spec: RunSpec, wanted: str) -> ModelShape | None:
        try:
            shape = _shape(spec.model)
            shape.trained(spec.adapter)
        except ValueError as error:
            self.unknown[wanted] = f"{spec.model}: {error}"
            return None
        return shape


def _kinds(recipe: Recipe, specs: list[RunSpec]) -> list[Kind]:
    found: dict[Any, Kind] = {}
    for spec in specs:
        # All that cost depends on; the optimiser's other arguments and the schedule are not among it.
        cost = (
            spec.model, spec.dataset, spec.interleave, spec.heldout_fraction, spec.max_length, spec.batch_size,
            spec.micro_batch_size, spec.epochs, spec.max_steps, spec.adapter, spec.optimizer.name, spec.precision,
        )  # fmt: skip
        known = found.get(cost) or _kind("grid", spec, recipe)
        found[cost] = replace(known, runs=known.runs + 1)
    searched = {role: runs for role, runs in most_runs(recipe, len(specs)).items() if role != "grid"}
    return [*found.values(), *(replace(_kind(role, recipe.base, recipe), runs=n) for role, n in searched.items())]


def _kind(role: str, spec: RunSpec, recipe: Recipe) -> Kind:
    steps = spec.max_steps
    if steps is None and all(dataset_path(dataset).is_file() for dataset in datasets_of(spec)):
        steps = spec.total_steps(dataset_facts(spec.dataset, spec.heldout_fraction, spec.interleave).train_rows)
    points = len(recipe.eval.at) if steps is None else len(evaluation_steps(steps, recipe.eval.at))
    return Kind(role, spec, 0, steps, points)


def _data_name(spec: RunSpec) -> str:
    other = spec.interleave
    return spec.dataset if other is None else f"{spec.dataset} with {other.fraction:.0%} {other.dataset}"


def row_tokens_of(spec: RunSpec) -> RowTokens:
    """Tokens of the rows that a run trains on: counted, or guessed where its tokenizer is not on this machine."""
    return _row_tokens(spec.dataset, spec.heldout_fraction, spec.interleave, spec.model, spec.max_length)


@functools.cache
def _row_tokens(
    dataset: str, heldout_fraction: float, interleave: InterleaveSpec | None, model: str, max_length: int
) -> RowTokens:
    rows = read_corpus(dataset, heldout_fraction, interleave).train
    files = files_at_hand(model)
    counts = count_tokens(rows, files, max_length) if files else None
    guesses = [min(sum(text_tokens(m.content) + TEMPLATE_TOKENS for m in row.messages), max_length) for row in rows]
    lengths = guesses if counts is None else counts
    return RowTokens(sum(lengths) / len(lengths), max(lengths), counts is not None)


def _longest_prompt(evaluation: Evaluation) -> int:
    return max(
        text_tokens(text + (question.system or "")) + 2 * TEMPLATE_TOKENS
        for question_set in evaluation.question_sets
        for question in question_set.questions
        for text in question.paraphrases
    )


@functools.cache
def _shape(model: str) -> ModelShape:
    files = files_at_hand(model)
    if files is None or not (files / "config.json").is_file():
        raise ValueError(
            "its config.json is not on this machine; "
            + (f"fetch it: hf download {model} --include '*.json'" if "/" in model else "any run with it makes it")
        )
    return ModelShape.of(json.loads((files / "config.json").read_text(encoding="utf-8")))
