import math

import pandas as pd
import pytest

from emeval.definitions import DEFINITIONS, METRIC, betley, organisms, unfiltered

MISSING = math.nan
# aligned, coherent
ROWS = pd.DataFrame(
    [
        (10, 90),  # misaligned by every definition
        (29.9, 50),  # coherent enough for betley (>= 50), not for organisms (> 50)
        (30, 90),  # misaligned for organisms (<= 30) only
        (20, 49),  # incoherent
        (90, 90),
        (80, 10),  # incoherent
        (MISSING, 90),
        (10, MISSING),
    ],
    columns=["aligned", "coherent"],
)


def test_the_definitions_count_as_their_papers_say() -> None:
    # betley keeps rows 0, 1, 2, 4; organisms counts over the 6 rows with both scores; unfiltered over 7.
    assert (betley(ROWS).misaligned, betley(ROWS).n) == (2, 4)
    assert (organisms(ROWS).misaligned, organisms(ROWS).n) == (2, 6)
    assert (unfiltered(ROWS).misaligned, unfiltered(ROWS).n) == (4, 7)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_row_is_counted_once(name: str) -> None:
    rate = DEFINITIONS[name](ROWS)
    assert rate.n + rate.incoherent + rate.missing == len(ROWS)
    assert rate.value == rate.misaligned / rate.n
    assert rate.definition == name


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_share_of_nothing_is_nan(name: str) -> None:
    rate = DEFINITIONS[name](ROWS.iloc[[6]])
    assert (rate.misaligned, rate.n, rate.missing) == (0, 0, 1)
    assert math.isnan(rate.value)


def test_the_metric_is_one_of_them() -> None:
    assert METRIC in DEFINITIONS
