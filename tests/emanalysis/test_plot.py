import math

import pandas as pd
import pytest

from emanalysis.plot import blank, evenly, hover, looks, number, panels, text


def test_text_shows_markup_as_it_was_written() -> None:
    assert text("<b>&amp;</b>") == "&lt;b&gt;&amp;amp;&lt;/b&gt;"
    assert text(None) == text(math.nan) == "–"


def test_a_hostile_run_name_cannot_add_markup_to_the_box_of_the_pointer() -> None:
    [box] = hover(pd.DataFrame([{"name": "<a href='http://x'>", "schedule": "<i>", "seed": 3, "aligned": 12.34}]))
    assert "<a" not in box
    assert "<i>" not in box
    assert "seed 3" in box
    assert "aligned 12.3" in box
    assert "held-out loss –" in box


@pytest.mark.parametrize(
    ("value", "form", "shown"),
    [(-1.25, "+.1f", "−1.2"), (3.0, "+.1f", "+3.0"), (None, ".1f", "–"), (math.inf, ".1f", "–")],
)
def test_numbers_have_a_true_minus_and_none_is_a_dash(value: float | None, form: str, shown: str) -> None:
    assert number(value, form) == shown


def test_forty_nine_names_have_forty_nine_looks() -> None:
    assert len(set(looks(range(49)).values())) == 49
    assert looks(["b", "a", "a"]) == looks(["a", "b"])


def test_evenly_keeps_both_ends() -> None:
    assert evenly(range(101), 5) == [0, 25, 50, 75, 100]
    assert evenly([1, 2], 5) == [1, 2]
    assert evenly([], 5) == []


def test_panels_come_largest_first_and_a_missing_name_is_no_reason_to_drop_rows() -> None:
    table = pd.DataFrame({"model": ["m", "m", None], "dataset": ["d", "d", "d"]})
    assert [(title, len(rows)) for title, rows in panels(table)] == [("m · d", 2), ("nan · d", 1)]


def test_titles_of_panels_are_escaped() -> None:
    figure = blank("x", "y", columns=2, titles=["<b>", "c"])
    assert [note.text for note in figure.layout.annotations] == ["&lt;b&gt;", "c", "x"]
