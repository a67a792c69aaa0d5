"""What a recipe can name, with a sentence on each; nothing is loaded for it that costs time."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emeval.question_sets import load_question_set, question_set_names
from emtrain.lookup import names, source
from emtrain.rows import dataset_names, load_dataset
from sweeps.recipe import recipe_names, recipe_path


@dataclass(frozen=True)
class Entry:
    """One thing a recipe can name."""

    name: str
    summary: str


def entries(kind: str) -> list[Entry]:
    """Everything of a kind, by name. Raises ``KeyError`` for a kind that is not in ``KINDS``."""
    return KINDS[kind]()


def _parts(package: str) -> Callable[[], list[Entry]]:
    return lambda: [Entry(name, _summary(source(package, name))) for name in names(package)]


def _summary(path: Path) -> str:
    """The first sentence of the file's docstring, else of the function's that it is named after.

    Read without importing the file: a judge or a model may need torch.
    """
    module = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == path.stem]
    docstrings = [ast.get_docstring(module), *(ast.get_docstring(function) for function in functions)]
    first = next((docstring.partition("\n\n")[0] for docstring in docstrings if docstring), "")
    return first.replace("\n", " ").replace("``", "")


def _datasets() -> list[Entry]:
    found = []
    for name in dataset_names():
        rows = load_dataset(name).rows
        found.append(Entry(name, f"{len(rows)} rows, e.g. {rows[0].messages[-1].content[:70]!r}"))
    return found


def _questions() -> list[Entry]:
    found = []
    for name in question_set_names():
        questions = load_question_set(name).questions
        topics = ", ".join(dict.fromkeys(question.topic.replace("_", " ") for question in questions))
        found.append(Entry(name, f"{len(questions)} questions: {topics}"))
    return found


def _recipes() -> list[Entry]:
    found = []
    for name in recipe_names():
        text = recipe_path(name).read_text(encoding="utf-8")
        comment = text.partition("\n")[0].removeprefix("#").strip()
        found.append(Entry(name, comment))
    return found


KINDS: dict[str, Callable[[], list[Entry]]] = {
    "schedules": _parts("emtrain.schedules"),
    "optimizers": _parts("emtrain.optimizers"),
    "datasets": _datasets,
    "models": _parts("emtrain.models"),
    "questions": _questions,
    "judges": _parts("emeval.judges"),
    "analyses": _parts("emanalysis.analyses"),
    "recipes": _recipes,
}
