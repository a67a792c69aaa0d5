"""What is wrong with a file, in the words of those who wrote it: from pydantic's errors to a line per mistake."""

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from emtrain.lookup import nearest

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "invalid_key": "keys that are text",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a mapping of keys",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_type": "text",
    "too_short": "at least {min_length} of them",
    "tuple_type": "a list",
}
"""Type of a pydantic error -> what was expected there."""
SHOWN = 200
"""Characters of a wrong value that are repeated to the user."""


def gist(error: BaseException) -> str:
    """What happened, in a line: SQLAlchemy's messages begin with advice and go on with the statement."""
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("(raised as a result of")]
    return lines[0] if lines else type(error).__name__


def named(error: BaseException) -> str:
    """``gist`` after the kind of the error."""
    return ": ".join(dict.fromkeys((type(error).__name__, gist(error))))


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """A line for each mistake: the dotted path of the key, what was expected and what is there.

    ``model`` is what was to be read; with it an unknown key is told the nearest one. Where something may be of several
    kinds, only the complaint that goes deepest is made: of a mapping with a wrong key, not that it is no number.
    """
    problems = [problem for problem in error.errors() if not _said_below(problem, error.errors())]
    by_path: dict[str, list[ErrorDetails]] = {}
    for problem in problems:
        by_path.setdefault(_path(problem["loc"]), []).append(problem)
    lines = []
    for path, here in by_path.items():
        own = [problem for problem in here if problem["type"] in {"extra_forbidden", "missing", "value_error"}]
        complaints = dict.fromkeys(_complaint(p, model) for p in own) if own else [_expected(here)]
        lines += [f"{path}: {complaint}" if path else complaint for complaint in complaints]
    return lines


def _complaint(problem: "ErrorDetails", model: type[BaseModel] | None) -> str:
    if problem["type"] == "missing":
        return "missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    fields = _fields_at(model, problem["loc"][:-1]) if model else []
    return f"unknown key.{nearest(str(problem['loc'][-1]), fields)} Keys here: {', '.join(fields)}"


def _expected(problems: Sequence["ErrorDetails"]) -> str:
    """All kinds of thing that one value could have been."""
    kinds = [
        EXPECTED[p["type"]].format(**p.get("ctx", {})) if p["type"] in EXPECTED else p["msg"].lower() for p in problems
    ]
    return f"expected {' or '.join(dict.fromkeys(kinds))}, not {shown(problems[0]['input'])}"


def shown(value: Any) -> str:
    """A wrong value as it is repeated to the user."""
    text = "nothing" if value is None else _REPR.repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


class _Repr(reprlib.Repr):
    """``repr`` that stops early: a few lines of YAML whose lists hold each other are terabytes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxlist = self.maxtuple = self.maxset = self.maxdict = 12
        self.maxstring = self.maxother = 3 * SHOWN  # of which the middle is left out

    def repr_int(self, number: int, level: int) -> str:
        return repr(number) if abs(number) < 10**SHOWN else hex(number)  # Python writes none of over 4,300 digits


_REPR = _Repr()


def _said_below(problem: "ErrorDetails", problems: Sequence["ErrorDetails"]) -> bool:
    """Whether another complaint is about a part of the same thing."""
    place = _keys(problem["loc"])
    others = [_keys(other["loc"]) for other in problems]
    deeper = any(len(other) > len(place) and other[: len(place)] == place for other in others)
    return deeper and problem["type"] != "value_error"


def _path(location: Sequence[int | str]) -> str:
    path = ""
    for part in _keys(location):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _keys(location: Sequence[int | str]) -> list[int | str]:
    """The location without the branches of unions, which pydantic names in it and a user's file does not."""
    return [part for part in location if isinstance(part, int) or not (part in _BRANCHES or "[" in part)]


_BRANCHES = {"int", "float", "str", "bool", "none", "constrained-int", "constrained-float", "AdapterSpec", "Range"}


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            options: list[Any] = [annotation, *getattr(annotation, "__args__", ())]
            model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), model)
    return list(model.model_fields)
