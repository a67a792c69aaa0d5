from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from emanalysis.table_cache import cached, save


class Reader:
    """Reads two rows a run and remembers which runs it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, runs: pd.DataFrame) -> pd.DataFrame:
        self.asked.append(runs["run_id"].tolist())
        with_rows = [run_id for run_id in runs["run_id"] if run_id != "empty"]
        return pd.DataFrame({"run_id": np.repeat(with_rows, 2), "value": np.tile([1.0, 2.0], len(with_rows))})


def runs(**ended: float) -> pd.DataFrame:
    return pd.DataFrame({"run_id": list(ended), "end_time": list(ended.values())})


def test_each_run_is_read_once_a_run_without_rows_too(tmp_path: Path) -> None:
    read, path = Reader(), tmp_path / "table.parquet"
    first = cached(path, runs(a=1.0, empty=2.0), read)
    assert first["run_id"].tolist() == ["a", "a"]
    pd.testing.assert_frame_equal(cached(path, runs(a=1.0, empty=2.0), read), first)
    assert read.asked == [["a", "empty"]]


def test_a_run_that_has_not_ended_or_has_ended_anew_is_read_again(tmp_path: Path) -> None:
    read, path = Reader(), tmp_path / "table.parquet"
    cached(path, runs(a=1.0, b=np.nan, c=3.0), read)
    table = cached(path, runs(a=1.0, b=np.nan, c=4.0), read)
    assert read.asked == [["a", "b", "c"], ["b", "c"]]
    assert sorted(table["run_id"]) == ["a", "a", "b", "b", "c", "c"]


def test_rows_of_runs_that_are_gone_are_not_returned(tmp_path: Path) -> None:
    read, path = Reader(), tmp_path / "table.parquet"
    cached(path, runs(a=1.0, b=2.0), read)
    assert cached(path, runs(b=2.0), read)["run_id"].tolist() == ["b", "b"]


def test_without_a_path_all_is_read_every_time() -> None:
    read = Reader()
    for _ in range(2):
        cached(None, runs(a=1.0), read)
    assert read.asked == [["a"], ["a"]]


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    save(path, pd.DataFrame({"x": [1]}))
    with pytest.raises(pa.ArrowInvalid):
        save(path, pd.DataFrame({"x": [object()]}))
    assert pd.read_parquet(path)["x"].tolist() == [1]
