"""Questions to ask a model: read from YAML files in the format of the field (Betley et al., arXiv 2502.17424)."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from emeval.rubric import Rubric
from emeval.strict_yaml import load_yaml
from emtrain.lookup import unknown
from emtrain.mistakes import shown
from emtrain.paths import user_path
from emtrain.spec import Spec

SHIPPED = Path(__file__).parent / "questions"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Text = Annotated[str, Field(min_length=1)]


class Question(Spec):
    """One question, as it stands in a question file."""

    id: Name
    type: Literal["free_form_judge_0_100", "free_form"] = "free_form_judge_0_100"
    """Both are answered freely and judged from 0 to 100. The field's other types ask the judge for words, or the
    model for a number."""
    paraphrases: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Wordings of the user message; each is asked."""
    system: Text | None = None
    """The system message; None sends none (a template may then insert its own)."""
    stratum: Name = ""
    """Answer format. Where the file does not say: ``json`` or ``template`` if the id ends in it, else ``plain``."""
    topic: Name = ""
    """Groups questions that are near-duplicates. Where the file does not say: the id without the format."""
    samples_per_paraphrase: Annotated[int, Field(ge=1)] | None = None
    """Responses per wording, unless the recipe says how many."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Of sampling, unless the recipe says which."""
    judge: str | None = None
    """The judge its author used. Read and not acted on: a recipe names its judges."""
    judge_prompts: Rubric | None = None
    """The question's own rubric; None leaves it to the judge."""

    @field_validator("paraphrases")
    @classmethod
    def _not_blank(cls, paraphrases: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text.strip() for text in paraphrases):
            raise ValueError("a paraphrase is blank")
        return paraphrases

    @model_validator(mode="before")
    @classmethod
    def _read_id(cls, entry: Any) -> Any:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            return entry
        stem, _, suffix = entry["id"].rpartition("_")
        if not stem or suffix not in ("json", "template"):
            stem, suffix = entry["id"], "plain"
        return {"stratum": suffix, "topic": stem, **entry}

    def times(self, samples: int | None) -> int:
        """How often each paraphrase is asked: ``samples`` times; None: as often as the file says."""
        if samples is not None:
            return samples
        if self.samples_per_paraphrase is None:
            raise ValueError(f"question {self.id} has no samples_per_paraphrase; set eval.samples in the recipe")
        return self.samples_per_paraphrase


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file, in order."""

    name: str
    questions: tuple[Question, ...]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the questions' content; comments and layout of the file have no part in it."""
        content = [question.model_dump(mode="json") for question in self.questions]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()

    def responses(self, samples: int | None) -> int:
        """How many responses the set asks for. Raises ``ValueError`` where neither file nor ``samples`` says."""
        return sum(question.times(samples) * len(question.paraphrases) for question in self.questions)


def question_set_names() -> list[str]:
    """Names of the question sets that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def question_set_path(name: str) -> Path:
    """The file of a question set given by name or by path (anything that ends in .yaml or .yml)."""
    if name.endswith((".yaml", ".yml")):
        return user_path(name)
    if name not in question_set_names():
        raise ValueError(f"{unknown('question set', name, question_set_names())}; or give the path of a .yaml file")
    return SHIPPED / f"{name}.yaml"


def load_question_set(name: str) -> QuestionSet:
    """Read and check a question set given by name or path; a file's set goes by the file's name.

    Raises ``ValueError`` with a line per mistake: the file, the question, the key, what is wrong.
    """
    path = question_set_path(name)
    if not path.is_file():
        raise ValueError(f"question set {name}: there is no such file")
    try:
        entries = load_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"question set {name}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise ValueError(f"question set {name}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"question set {name}: expected a list of questions, each with an id and paraphrases")
    questions, problems = [], []
    for number, entry in enumerate(entries, start=1):
        try:
            questions.append(Question.model_validate(entry))
        except ValidationError as error:
            problems += [f"{_which(number, entry)}: {line}" for line in _explain(error)]
    ids = [question.id for question in questions]
    problems += [f"the id {id!r} is given {ids.count(id)} times" for id in dict.fromkeys(ids) if ids.count(id) > 1]
    if problems:
        raise ValueError("\n".join(f"question set {name}: {problem}" for problem in problems))
    return QuestionSet(path.stem, tuple(questions))


def _which(number: int, entry: Any) -> str:
    name = entry.get("id") if isinstance(entry, dict) else None
    return f"question {number} ({name})" if name is not None else f"question {number}"


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            model = Question if len(problem["loc"]) == 1 else Rubric
            lines.append(unknown("key", key, model.model_fields))
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            detail = problem["ctx"]["error"] if problem["type"] == "value_error" else problem["msg"]
            lines.append(f"{key}: {detail}, not {shown(problem['input'])}")
    return lines
