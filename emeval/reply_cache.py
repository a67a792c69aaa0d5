"""Replies that were paid for, kept in one SQLite file that many processes may use at once."""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

UNUSABLE = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
"""Errors that stay until someone looks after the file; a full disk is none of them."""


@dataclass(frozen=True)
class Reply:
    """What a judge said to one prompt and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class ReplyCache:
    """Replies by a digest of all that determines them. A reply, once written, is never changed.

    Both ways raise ``ValueError`` that names a file which is no such database.
    """

    path: Path

    def get(self, keys: Sequence[str]) -> dict[str, Reply]:
        """The replies that are there."""
        found: dict[str, Reply] = {}
        with self._open() as connection:
            for start in range(0, len(keys), 500):  # SQLite's limit on placeholders was long 999
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                rows = connection.execute(f"SELECT * FROM replies WHERE key IN ({marks})", some)
                found.update({row[0]: Reply(*row[1:]) for row in rows})
        return found

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply; it is on disk when this returns, so a killed process asks for it no second time."""
        row = (key, reply.text, reply.prompt_tokens, reply.completion_tokens)
        with self._open() as connection, connection:
            connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", row)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies "
                    "(key TEXT PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INT, completion_tokens INT) WITHOUT ROWID"
                )
                yield connection
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in UNUSABLE:  # the low byte is the kind of the error
                raise
            raise ValueError(
                f"{self.path}: a judge's kept replies can't be read or written ({error}); bring the file back, or "
                "delete it, and the judge is asked again"
            ) from error
