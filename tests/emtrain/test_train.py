"""Claims about when a run is evaluated."""

import pytest

from emtrain.train import evaluation_steps


@pytest.mark.parametrize(
    ("total_steps", "fractions", "expected"),
    [
        (60, (0.25, 0.5, 1.0), (15, 30, 60)),
        (10, (0.3,), (3, 10)),  # 0.3 * 10 is 3.0000000000000004 in floating point
        (10, (0.31,), (4, 10)),  # rounded up
        (1, (0.1, 0.2), (1,)),
        (3, (0.5, 0.6, 1.0), (2, 3)),  # points that fall together count once
    ],
)
def test_fractions_become_steps(total_steps: int, fractions: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert evaluation_steps(total_steps, fractions) == expected
