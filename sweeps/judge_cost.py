"""What a judge behind an endpoint costs: tokens of its prompts and replies times a price."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emeval.rubric import STANDARD
from emeval.spec import JudgeSpec
from sweeps.estimate import text_tokens
from sweeps.planner import RUBRICS, Evaluation

CATALOG = "utils/model_catalog/openai.json"
"""In MLflow: OpenAI's models with their prices."""
REPLY_TOKENS = {"logprobs": 1, "text": 4}
"""By the judge's mode; what a reasoning judge thinks before it replies is not counted."""


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    day: str | None = field(default=None, kw_only=True)
    """When it was looked up; None for one that the user states."""

    def dollars(self, input_tokens: float, output_tokens: float) -> float:
        """What so many tokens cost."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


def read_price(text: str) -> tuple[str, Price]:
    """Model and price of ``MODEL=INPUT,OUTPUT``. Raises ``ValueError``."""
    model, _, figures = text.rpartition("=")
    try:
        price = Price(*(float(figure) for figure in figures.split(",")))
    except (TypeError, ValueError):
        price = Price(-1, -1)
    if not model or not (price.input >= 0 and price.output >= 0):
        raise ValueError(f"--price {text}: expected MODEL=INPUT,OUTPUT in dollars per million tokens (gpt-4o=2.5,10)")
    return model, price


def list_price(judge: JudgeSpec) -> Price | None:
    """The maker's price of a judge, asked at the maker's endpoint; None for any other.

    None, too, for one that thinks before it replies: what that will cost can't be known.
    """
    if judge.name != "openai" or judge.arguments.get("base_url") is not None:
        return None
    try:
        model = _catalog()[judge.arguments["model"]]
        thinks, pricing, day = model["capabilities"]["reasoning"], model["pricing"], model["last_updated_at"]
        price = Price(pricing["input_per_million_tokens"], pricing["output_per_million_tokens"], day=day)
    except KeyError:
        return None
    return None if thinks else price


def most_tokens(judge: JudgeSpec, evaluation: Evaluation) -> tuple[int, int]:
    """Tokens that the judge reads and writes each time a model is evaluated, every response as long as allowed."""
    read = 0
    for question_set in evaluation.question_sets:
        for question in question_set.questions:
            rubric = question.judge_prompts or STANDARD
            fixed = text_tokens(rubric.aligned) + text_tokens(rubric.coherent)
            for text in question.paraphrases:
                texts = RUBRICS * (text_tokens(text) + evaluation.spec.max_new_tokens)
                read += question.times(evaluation.spec.samples) * (fixed + texts)
    return read, evaluation.responses * RUBRICS * REPLY_TOKENS[judge.arguments.get("mode", "logprobs")]


@cache
def _catalog() -> Mapping[str, Any]:
    """By model; empty where this MLflow has none. Read without importing MLflow, which takes a second."""
    mlflow = find_spec("mlflow")
    folders = mlflow.submodule_search_locations if mlflow else None
    files = [path for folder in folders or () if (path := Path(folder) / CATALOG).is_file()]
    models: Mapping[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))["models"] if files else {}
    return models
