"""Chat datasets: JSONL files read row by row, and the split into training and held-out rows.

Every dataset is a ``.jsonl`` file of ``{"messages": [{"role": ..., "content": ...}, ...]}`` rows. Those shipped with
the package lie in ``emtrain/datasets`` and go by their file's name; any other is given by its path.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from emtrain.lookup import unknown
from emtrain.mistakes import shown
from emtrain.paths import user_path

SHIPPED = Path(__file__).parent / "datasets"
SHOWN_ERRORS = 5


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class Row(BaseModel):
    """One training conversation; it ends with the assistant turn that is learnt."""

    messages: tuple[Message, ...]

    @model_validator(mode="after")
    def _turns_alternate(self) -> "Row":
        roles = [message.role for message in self.messages]
        if "assistant" not in roles:
            raise ValueError("no assistant turn, so there is nothing to learn from")
        turns = roles[1:] if roles[0] == "system" else roles
        expected = ["user", "assistant"] * (len(turns) // 2 + 1)
        if turns != expected[: len(turns)] or turns[-1] != "assistant":
            raise ValueError(
                f"the roles are {', '.join(roles)}; expected an optional system message, then user and assistant "
                "in turn, the assistant last"
            )
        return self

    @property
    def chat(self) -> list[dict[str, str]]:
        """The conversation as chat templates take it."""
        return [message.model_dump() for message in self.messages]


@dataclass(frozen=True)
class Dataset:
    """The rows of one file."""

    name: str
    rows: tuple[Row, ...]
    sha256: str
    """Of the file's bytes, as ``sha256sum`` prints it."""


def dataset_names() -> list[str]:
    """Names of the datasets that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.jsonl"))


@cache
def dataset_path(dataset: str) -> Path:
    """The file of a dataset given by name or path. Raises ``ValueError`` for an unknown name; a path may not exist."""
    if dataset.endswith(".jsonl"):
        return user_path(dataset)
    if dataset not in dataset_names():
        raise ValueError(f"{unknown('dataset', dataset, dataset_names())}; or give the path of a .jsonl file")
    return SHIPPED / f"{dataset}.jsonl"


def load_dataset(dataset: str) -> Dataset:
    """Read and check a dataset given by name or path.

    Raises ``ValueError`` that names the file and the lines at fault, the first five in full and a count of the rest.
    """
    path = dataset_path(dataset)
    if not path.is_file():
        raise ValueError(f"dataset {dataset}: there is no such file")
    content = path.read_bytes()
    try:
        # JSON may hold the other characters that Python ends lines at.
        lines = content.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset {dataset}: not UTF-8 at byte {error.start}") from error
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(Row.model_validate_json(line))
            except ValidationError as error:
                problems.append(f"line {number}: {_explain(error)}")
    if problems:
        shown = "\n  ".join(problems[:SHOWN_ERRORS])
        more = f"\n  and {len(problems) - SHOWN_ERRORS} more" if len(problems) > SHOWN_ERRORS else ""
        raise ValueError(f"dataset {dataset}: {len(problems)} of {len(lines)} lines can't be used\n  {shown}{more}")
    if not rows:
        raise ValueError(f"dataset {dataset}: the file holds no rows")
    return Dataset(name=dataset, rows=tuple(rows), sha256=hashlib.sha256(content).hexdigest())


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    if first["type"] == "missing":
        message = 'missing; expected {"messages": [{"role": ..., "content": ...}, ...]}'
    elif first["type"] not in {"value_error", "json_invalid"}:
        message += f", not {shown(first['input'])}"
    return f"{where}: {message}" if where else message


def split(rows: Sequence[Row], fraction: float) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Training rows and held-out rows, both in file order.

    Distinct prompts (everything before the last assistant turn) are ranked by the digest of their content and the
    first ``fraction`` of them, at least one, is held out with all its answers. So the split depends on no seed, a
    prompt is never on both sides, and two datasets with the same prompts hold out the same ones.

    Raises ``ValueError`` when the rows hold fewer than two distinct prompts.
    """
    keys = [prompt_digest(row) for row in rows]
    ranked = sorted(set(keys))
    if len(ranked) < 2:
        raise ValueError(f"{len(rows)} rows with {len(ranked)} distinct prompt can't be split; at least 2 are needed")
    held = set(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])
    train = tuple(row for row, key in zip(rows, keys, strict=True) if key not in held)
    heldout = tuple(row for row, key in zip(rows, keys, strict=True) if key in held)
    return train, heldout


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows' content, in order; identifies a held-out set."""
    content = json.dumps([row.chat for row in rows], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def prompt_digest(row: Row) -> str:
    """SHA-256 of everything before the row's last assistant turn."""
    content = json.dumps(row.chat[:-1], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
