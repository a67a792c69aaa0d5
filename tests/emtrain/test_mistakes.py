"""Errors of libraries, in the words of users; those of recipes are in ``tests/sweeps/test_recipe.py``."""

import sqlalchemy as sql
from mlflow.exceptions import MlflowException

from emtrain.mistakes import gist, named, shown


def test_the_gist_of_an_error_is_its_first_line_or_its_kind() -> None:
    assert gist(ValueError("no room\nfor this")) == "no room"
    assert gist(MemoryError()) == named(MemoryError()) == "MemoryError"
    assert named(ValueError("no room\nfor this")) == "ValueError: no room"


def test_of_a_database_it_is_what_the_database_said_not_what_sqlalchemy_advises() -> None:
    """The error of a full disk, as MLflow passes it on."""
    told = sql.exc.OperationalError("UPDATE runs", {}, Exception("database or disk is full"))
    told.add_detail("raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block")
    assert str(told).startswith("(raised as a result of")
    assert gist(MlflowException(str(told))) == "(builtins.Exception) database or disk is full"


def test_a_wrong_value_is_shown_as_it_is_and_a_long_one_cut() -> None:
    assert shown(None) == "nothing"
    assert shown({"b": [1, 2.5, "x"], "a": (True, None)}) == "{'a': (True, None), 'b': [1, 2.5, 'x']}"
    assert shown("x" * 300) == f"'{'x' * 199}..."
    assert shown(-(16**9000)) == f"-0x1{'0' * 196}..."


def test_lists_that_hold_each_other_are_not_written_out() -> None:
    value: object = "x"
    for _ in range(12):
        value = [value] * 10
    assert shown({"name": value}).startswith("{'name': [[[[...], [...], ")
    assert len(shown(value)) == 203
