import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from emanalysis.loss_curve import LossBasis, fit_loss_curve

points = st.lists(st.tuples(st.floats(0.5, 3.0), st.floats(0, 100)), min_size=2, max_size=20, unique_by=lambda p: p[0])


@given(points)
def test_never_falls_and_stays_within_the_scores(data: list[tuple[float, float]]) -> None:
    loss, score = np.array(data).T
    curve = fit_loss_curve(loss, score)
    drawn = curve(np.linspace(0.4, 3.1, 200))
    assert (np.diff(drawn) >= -1e-8).all()


@pytest.mark.parametrize("count", [2, 3, 6, 30])
def test_reproduces_a_straight_line_in_log_loss(count: int) -> None:
    loss = np.geomspace(1.0, 2.0, count)
    curve = fit_loss_curve(loss, 20 + 30 * np.log(loss))
    between = np.geomspace(1.05, 1.95, 7)
    assert curve(between) == pytest.approx(20 + 30 * np.log(between))
    assert curve.slope(between) == pytest.approx(np.full(7, 30.0))


def test_is_constant_outside_the_range_it_was_fitted_on() -> None:
    curve = fit_loss_curve(np.array([1.0, 1.5, 2.0]), np.array([10.0, 20.0, 30.0]))
    outside = np.array([0.5, 4.0])
    assert curve(outside) == pytest.approx(curve(np.array([1.0, 2.0])))
    assert curve.slope(outside).tolist() == [0.0, 0.0]
    assert curve.covers(np.array([0.5, 1.0, 2.0, 4.0])).tolist() == [False, True, True, False]


def test_a_falling_trend_is_left_in_the_residuals() -> None:
    loss, score = np.geomspace(1, 2, 9), np.linspace(80, 20, 9)
    curve = fit_loss_curve(loss, score)
    assert curve(loss) == pytest.approx(np.full(9, score.mean()))
    assert curve.parameters == 1


def test_follows_a_steep_saturating_curve_to_within_the_noise() -> None:
    """The residual variance lies between that of isotonic regression, the best monotone fit, and 1.5 x the noise's."""
    rng = np.random.default_rng(0)
    loss = np.sort(rng.uniform(1, 2, 40))
    score = 50 + 40 * np.tanh(4 * (loss - 1.5)) + rng.normal(0, 5, 40)
    best = np.mean((score - isotonic_regression(score).x) ** 2)
    assert best <= np.mean((score - fit_loss_curve(loss, score)(loss)) ** 2) < 1.5 * 5**2


def test_a_basis_fits_what_a_fresh_fit_does() -> None:
    rng = np.random.default_rng(0)
    loss, score = rng.uniform(1, 2, 15), rng.normal(50, 10, 15)
    assert LossBasis.at(loss).fitted(score) == pytest.approx(fit_loss_curve(loss, score)(loss))


def test_needs_two_losses() -> None:
    with pytest.raises(ValueError, match="at least 2 different losses, not 1"):
        fit_loss_curve(np.array([1.0, 1.0]), np.array([1.0, 2.0]))
