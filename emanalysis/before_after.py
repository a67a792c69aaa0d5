"""Tests of a fine-tuned model's scores against its base model's, paired by question.

The unit is the question, its score the mean over responses. The tests are those of the field, so that rates compare;
they take questions as independent, which near-duplicates (one topic in several answer formats) are not.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

MIN_QUESTIONS = 6
"""A signed-rank test of five questions can never reach p < 0.05 (two-sided)."""

TESTS = {
    "mean_shift": "Mean moved (Wilcoxon signed-rank)",
    "spread_shift": "Spread of answers moved (Wilcoxon signed-rank)",
    "distribution": "Distribution of means (Kolmogorov-Smirnov)",
    "mean_unpaired": "Mean, unpaired (Welch)",
    "spread_of_means": "Spread of means (Brown-Forsythe)",
    "pearson": "Before predicts after (Pearson)",
    "spearman": "Before predicts after (Spearman)",
}
"""The tests by name, with a label for people."""


def compare(before: Floats, after: Floats, before_sd: Floats, after_sd: Floats) -> dict[str, tuple[float, float]]:
    """Statistic and two-sided p-value of each of ``TESTS``.

    Arrays are (Q,), one value per question, 0-100: means over responses and their standard deviations, NaN where there
    is none. A question without both means is left out; ``spread_shift`` is of the standard deviations, all others are
    of the means.

    Statistics: mean differences after - before in points for ``mean_shift, spread_shift, mean_unpaired``, the
    difference of standard deviations for ``spread_of_means``, the largest distance between distribution functions,
    correlations. Both numbers are NaN where a test needs more questions (``MIN_QUESTIONS``) or values that vary.
    """
    known = np.isfinite(before) & np.isfinite(after)
    b, a = before[known], after[known]
    spread = np.isfinite(before_sd) & np.isfinite(after_sd)
    b_sd, a_sd = before_sd[spread], after_sd[spread]
    results = {
        "mean_shift": _signed_rank(b, a),
        "spread_shift": _signed_rank(b_sd, a_sd),
        "distribution": (np.nan, np.nan),
        "mean_unpaired": (np.nan, np.nan),
        "spread_of_means": (np.nan, np.nan),
        "pearson": (np.nan, np.nan),
        "spearman": (np.nan, np.nan),
    }
    if len(b) < MIN_QUESTIONS:
        return results
    ks = stats.ks_2samp(a, b)
    results["distribution"] = (float(ks.statistic), float(ks.pvalue))
    if np.ptp(a) > 0 or np.ptp(b) > 0:
        results["mean_unpaired"] = (float(a.mean() - b.mean()), float(stats.ttest_ind(a, b, equal_var=False).pvalue))
        brown_forsythe = stats.levene(a, b, center="median")
        results["spread_of_means"] = (float(a.std(ddof=1) - b.std(ddof=1)), float(brown_forsythe.pvalue))
    if np.ptp(a) > 0 and np.ptp(b) > 0:
        for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            r = correlate(b, a)
            results[name] = (float(r.statistic), float(r.pvalue))
    return results


def _signed_rank(before: Floats, after: Floats) -> tuple[float, float]:
    """Mean difference and p-value; pairs without a difference are dropped (Wilcoxon's own rule)."""
    if len(before) < MIN_QUESTIONS:
        return np.nan, np.nan
    difference = after - before
    if not difference.any():
        return 0.0, 1.0
    return float(difference.mean()), float(stats.wilcoxon(difference, zero_method="wilcox").pvalue)


def adjusted(p_values: pd.Series) -> pd.Series:
    """Benjamini-Hochberg q-values of all p-values given; NaN stays NaN and counts for nothing."""
    known = p_values.notna()
    q_values = pd.Series(np.nan, index=p_values.index)
    if known.any():
        q_values[known] = stats.false_discovery_control(p_values[known])
    return q_values


def question_shift(after: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
    """Welch's t test of one question's responses, after against before, for every row.

    Both frames have ``aligned, aligned_sd, n_judged`` by row. Returns ``shift`` (points) and ``p``, NaN with fewer than
    two responses or no variance on either side.
    """
    shift = after["aligned"] - before["aligned"]
    variance = [frame["aligned_sd"] ** 2 / frame["n_judged"] for frame in (after, before)]
    total = variance[0] + variance[1]
    freedom = total**2 / (variance[0] ** 2 / (after["n_judged"] - 1) + variance[1] ** 2 / (before["n_judged"] - 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2 * stats.t.sf(np.abs(shift) / np.sqrt(total), freedom)
    return pd.DataFrame({"shift": shift, "p": np.where(total > 0, p, np.nan)}, index=after.index)
