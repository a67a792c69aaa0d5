"""How closely a score follows the loss: correlations, slope, what other settings add, how much hangs on one run.

Runs of one cell are near-copies, so intervals count cells, not runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.regression.linear_model import OLS
from statsmodels.tools import add_constant

from emanalysis.score_matrix import Floats, Ints


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where there are too few cells for one."""

    value: float
    low: float
    high: float


def pearson(x: Floats, y: Floats, *, cells: int) -> Estimate:
    """Pearson's r of (N,) values, with Fisher's interval for ``cells`` independent points. NaN for a constant."""
    return _with_fisher_interval(_correlation(x, y), cells=cells, inflation=1.0, given=0)


def spearman(x: Floats, y: Floats, *, cells: int) -> Estimate:
    """Spearman's rho, with Fisher's interval and the variance 1.06 / (n - 3) of Fieller, Hartley & Pearson (1957)."""
    return _with_fisher_interval(
        _correlation(stats.rankdata(x), stats.rankdata(y)), cells=cells, inflation=1.06, given=0
    )


def partial(x: Floats, y: Floats, given: Floats, *, cells: int) -> Estimate:
    """Pearson's r of what a straight line in ``given`` leaves of ``x`` and of ``y``."""
    xy, xg, yg = _correlation(x, y), _correlation(x, given), _correlation(y, given)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = (xy - xg * yg) / np.sqrt((1 - xg**2) * (1 - yg**2))
    return _with_fisher_interval(float(np.clip(value, -1, 1)), cells=cells, inflation=1.0, given=1)


def slope(x: Floats, y: Floats, cell: Ints) -> Estimate:
    """Least-squares slope of ``y`` on ``x`` with a cluster-robust interval over cells, t with C - 1 degrees of freedom.

    With one run a cell that is the heteroscedasticity-robust HC1 interval.
    """
    cells = len(np.unique(cell))
    if cells < 3 or np.ptp(x) == 0:
        return Estimate(np.nan, np.nan, np.nan)
    fit = OLS(y, add_constant(x)).fit(cov_type="cluster", cov_kwds={"groups": cell}, use_t=True)
    low, high = fit.conf_int()[1]
    return Estimate(float(fit.params[1]), float(low), float(high))


def line(x: Floats, y: Floats) -> Floats:
    """(N,) least-squares straight line of ``y`` on ``x`` at its own points; the mean where ``x`` is constant."""
    if np.ptp(x) == 0:
        return np.full(len(y), y.mean())
    fit = stats.linregress(x, y)
    return np.asarray(fit.intercept + fit.slope * x)


def leave_one_out(x: Floats, y: Floats) -> Floats:
    """(N,) Pearson's r without each run in turn. N >= 3."""
    n = len(x)
    x, y = x - x.mean(), y - y.mean()
    # Sums without run i of products of values centred without run i.
    sxx, syy, sxy = ((u @ v) - u * v * n / (n - 1) for u, v in ((x, x), (y, y), (x, y)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sxy / np.sqrt(sxx * syy))


@dataclass(frozen=True)
class Rung:
    """A linear model of the score with one more group of predictors than the rung before."""

    added: str
    r2: float
    adjusted_r2: float
    r2_interval: tuple[float, float]
    """95 %, bootstrap over cells; it leans upwards, as r2 does."""
    p: float
    """F test of what was added; NaN when it adds nothing that could be estimated."""
    parameters: int


def ladder(
    y: Floats, groups: Sequence[tuple[str, Floats]], *, rng: np.random.Generator, draws: int = 200
) -> list[Rung]:
    """R-squared of ``y`` on an intercept and the groups of predictors (C, P), added in order; a row is a cell's mean.

    A group that is collinear with those before it (one optimiser in the whole sweep) adds no parameter.
    """
    resamples = rng.integers(len(y), size=(draws, len(y)))
    design = np.ones((len(y), 1))
    r2, rank = 0.0, 1
    rungs = []
    for added, predictors in groups:
        design = np.hstack([design, predictors])
        lower_r2, lower_rank = r2, rank
        r2, rank = _r2(design, y)
        gained, spare = rank - lower_rank, len(y) - rank
        p = np.nan
        if gained > 0 and spare > 0 and r2 < 1:
            p = float(stats.f.sf((r2 - lower_r2) / gained / ((1 - r2) / spare), gained, spare))
        drawn = np.array([_r2(design[rows], y[rows])[0] for rows in resamples])
        known = drawn[np.isfinite(drawn)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        rungs.append(
            Rung(
                added=added,
                r2=r2,
                adjusted_r2=1 - (1 - r2) * (len(y) - 1) / spare if spare > 0 else np.nan,
                r2_interval=(float(low), float(high)),
                p=p,
                parameters=rank,
            )
        )
    return rungs


def indicators(labels: Sequence[str]) -> Floats:
    """(N, L - 1) columns of 0 and 1, one for each label but the first."""
    known, index = np.unique(np.asarray(labels, str), return_inverse=True)
    return np.asarray(np.eye(len(known))[index][:, 1:])


def _r2(design: Floats, y: Floats) -> tuple[float, int]:
    total = float(((y - y.mean()) ** 2).sum())
    coefficients, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    return (1 - float(((y - design @ coefficients) ** 2).sum()) / total if total > 0 else np.nan), int(rank)


def _correlation(x: Floats, y: Floats) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def _with_fisher_interval(r: float, *, cells: int, inflation: float, given: int) -> Estimate:
    if cells - 3 - given <= 0 or not abs(r) < 1:
        return Estimate(r, np.nan, np.nan)
    reach = float(stats.norm.isf(0.025)) * np.sqrt(inflation / (cells - 3 - given))
    return Estimate(r, float(np.tanh(np.arctanh(r) - reach)), float(np.tanh(np.arctanh(r) + reach)))
