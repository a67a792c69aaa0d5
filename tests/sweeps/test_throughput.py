"""What a sweep measures of the machine, and what the next plan finds."""

from pathlib import Path

import pytest

from sweeps.throughput import Throughput, Work, keep, known, measure


def test_engines_side_by_side_add_up() -> None:
    """One trains 100 tokens/s and samples 4 responses/s, the other 300 and 2; the third had hardly begun."""
    one, other = Work(), Work()
    one.train(500, 5.0)
    one.train(500, 5.0)
    one.sample(16, 4.0)
    other.train(1200, 4.0)
    other.sample(10, 5.0)
    measured = measure([one, other, Work(3, 0.1, 1, 9.0)], sweep="s")
    assert measured is not None
    assert (measured.tokens_per_second, measured.responses_per_second) == (400, 6)
    assert measured.measured.endswith("by s")


def test_from_too_little_work_nothing_is_measured() -> None:
    assert measure([Work(), Work(500, 9.0), Work(500, 9.0, 10, 0.1)], sweep="s") is None


def test_the_newest_of_each_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    assert known("m") is None
    old, new = Throughput(1.0, 2.0, "yesterday"), Throughput(3.0, 4.0, "today")
    keep("m", old)
    keep("n", old)
    keep("m", new)
    assert (known("m"), known("n"), known("o")) == (new, old, None)


def test_a_file_that_was_tampered_with_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path))
    (tmp_path / "throughput.json").write_text("not JSON")
    assert known("m") is None
