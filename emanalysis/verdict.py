"""Is there a lower-loss, better-aligned minimum? Found, not found, or can't tell."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from emanalysis.confirmation import Choice, Confirmation, choose, confirm, confirmable, needed_seeds, split
from emanalysis.loss_curve import fit_loss_curve
from emanalysis.matched_pairs import Difference, cell_moments, differences, ordered_pairs
from emanalysis.null_sweep import MIN_RUNS, NullReference
from emanalysis.power import ALPHA, POWER, Design, Noise, design_of, detectable_difference, estimate_noise
from emanalysis.score_matrix import Floats, ScoreMatrix

MARGIN = 5.0
"""Points of alignment that a difference must reach to matter, unless the user says otherwise."""

Outcome = Literal["found", "not found", "can't tell"]


@dataclass(frozen=True)
class Verdict:
    """What a sweep says about one model, dataset and question set.

    *Found*: the pair chosen on some seeds and questions is confirmed on the others, one-sided at ``alpha``; or, with
    one seed a cell, the largest gap is beyond what luck makes by a null sweep. *Not found*: for every pair with no more
    loss, a gain of ``margin`` or more is excluded, one-sided at 5 % each (all must be excluded, so no correction is
    due). Otherwise *can't tell*.
    """

    outcome: Outcome
    reason: str
    """One sentence: on what grounds."""
    better: int | None
    """Cell of the pair that was tested; None where none was."""
    worse: int | None
    effect: float
    """Points of alignment, better - worse; NaN where no pair was tested."""
    interval: tuple[float, float]
    """90 %."""
    p: float
    """Of "no better, or only by what its loss explains"."""
    alpha: float
    loss_difference: float
    """Better - worse."""
    largest_gain: float
    """Upper 95 % bound of the gain of any pair with no more loss."""
    margin: float
    cells: int
    """Cells with enough runs to be judged."""
    pairs: int
    """Ordered pairs with no more loss that were candidates; the test is of one of them."""
    detectable: float
    """Points that this design confirms with probability 0.8; infinite without held-back seeds."""
    noise: Noise
    design: Design
    """Of the cells that were judged."""


def decide(
    matrix: ScoreMatrix,
    *,
    rng: np.random.Generator,
    null: NullReference | None = None,
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> Verdict:
    """The verdict on the cells of ``matrix``.

    Replicated cells are judged by their held-back seeds; where a search picked them, by those of its confirmation, and
    cells that were not confirmed are not judged. A sweep without replicates is judged by ``null``, what luck
    makes of the same cells by a null sweep; without it there is no telling an effect from luck. ``alpha`` is for this
    verdict alone; who gives several divides it by their number.
    """
    replicated = confirmable(matrix)
    if replicated.sum() < 2 and null is not None:
        return _by_null_sweep(_blank(matrix, margin, alpha), matrix, null)
    if replicated.sum() < 2:
        return replace(
            _blank(matrix, margin, alpha),
            reason=f"It takes {needed_seeds(matrix)} to tell an effect from luck, and {replicated.sum()} of "
            f"{matrix.cells} have them. Run that many of each (better 5), or a null sweep: one configuration with at "
            f"least {MIN_RUNS} seeds.",
        )
    kept = np.flatnonzero(replicated)
    matrix = matrix.take(runs=np.isin(matrix.cell, kept))
    blank = _blank(matrix, margin, alpha)
    try:
        choosing, confirming = split(matrix, rng=rng)
        choice = choose(choosing)
    except ValueError as error:
        return replace(blank, reason=f"No pair can be chosen and confirmed: {error}.")
    verdict = _by_confirmation(blank, matrix, choice, confirm(confirming, choice))
    return replace(verdict, better=int(kept[choice.better]), worse=int(kept[choice.worse]))


def _blank(matrix: ScoreMatrix, margin: float, alpha: float) -> Verdict:
    noise, design, loss = estimate_noise(matrix), design_of(matrix), matrix.cell_mean(matrix.loss)
    return Verdict(
        outcome="can't tell",
        reason="",
        better=None,
        worse=None,
        effect=np.nan,
        interval=(np.nan, np.nan),
        p=np.nan,
        alpha=alpha,
        loss_difference=np.nan,
        largest_gain=np.nan,
        margin=margin,
        cells=matrix.cells,
        pairs=len(ordered_pairs(loss)[0]),
        detectable=detectable_difference(noise, design, alpha=alpha),
        noise=noise,
        design=design,
    )


def _by_confirmation(blank: Verdict, matrix: ScoreMatrix, choice: Choice, tested: Confirmation) -> Verdict:
    low, high = tested.score.bounds()
    # What a search saw of its winners is too good, and of the cells they beat it may be.
    fresh = matrix if matrix.unsearched is None else matrix.take(runs=matrix.unsearched)
    verdict = replace(
        blank,
        better=choice.better,
        worse=choice.worse,
        effect=float(tested.score.estimate),
        interval=(float(low), float(high)),
        p=tested.p,
        loss_difference=tested.loss,
        largest_gain=largest_gain(fresh, differences(cell_moments(fresh), *_candidates(fresh))),
    )
    if tested.p <= verdict.alpha and tested.no_more_loss:
        why = "The pair with the largest gap was chosen on some seeds and questions and confirmed on the others"
        return _found(verdict, why)
    return _without_find(verdict, "The pair with the largest gap was not confirmed on held-back seeds and questions")


def _by_null_sweep(blank: Verdict, matrix: ScoreMatrix, reference: NullReference) -> Verdict:
    loss, pair = matrix.cell_mean(matrix.loss), reference.observed
    a, b = _candidates(matrix)
    gaps = Difference(
        estimate=(score := matrix.cell_mean(matrix.run_score))[a] - score[b],
        error=np.hypot(reference.error[a], reference.error[b]),
        degrees_of_freedom=np.full(len(a), float(reference.degrees_of_freedom)),
    )
    verdict = replace(
        blank,
        better=pair.better,
        worse=pair.worse,
        effect=pair.value,
        interval=reference.interval,
        p=reference.p,
        detectable=reference.detectable(blank.alpha, POWER),
        loss_difference=float(loss[pair.better] - loss[pair.worse]),
        largest_gain=largest_gain(matrix, gaps),
    )
    usual = float(np.quantile(reference.gaps, 1 - verdict.alpha))
    points = f"{usual:.1f} points" if usual >= 0 else f"{-usual:.1f} points in favour of more loss"
    luck = f"{points}, which loss and the luck of a null sweep exceed in {verdict.alpha:.1%} of cases"
    if reference.p <= verdict.alpha:
        return _found(verdict, f"The largest gap is beyond {luck}")
    return _without_find(verdict, f"The largest gap is within {luck}")


def _found(verdict: Verdict, why: str) -> Verdict:
    small = verdict.largest_gain < verdict.margin
    but = f", but no pair gains as much as the margin of {verdict.margin:g} points" if small else ""
    return replace(verdict, outcome="found", reason=f"{why}{but}.")


def _without_find(verdict: Verdict, why: str) -> Verdict:
    if verdict.largest_gain < verdict.margin:
        return replace(
            verdict,
            outcome="not found",
            reason=f"{why}, and gains of {verdict.margin:g} points or more are excluded for every pair.",
        )
    return replace(
        verdict,
        reason=f"{why}, but a gain of up to {verdict.largest_gain:.1f} points is not excluded (the margin is "
        f"{verdict.margin:g}).",
    )


def _candidates(matrix: ScoreMatrix) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (A, B) of cells in which A may have no more loss than B: the luck of the losses decides some of them."""
    loss, runs = matrix.cell_mean(matrix.loss), matrix.runs_per_cell
    spare = max(1, len(matrix.loss) - matrix.cells)
    pooled = ((matrix.loss - loss[matrix.cell]) ** 2).sum() / spare
    slack = stats.t.isf(0.05, spare) * np.sqrt(pooled * (1 / runs[:, None] + 1 / runs[None, :]))
    return ordered_pairs(loss, slack)


def largest_gain(matrix: ScoreMatrix, gaps: Difference) -> float:
    """Largest upper 95 % bound of the ``gaps`` of all pairs, less what more loss explains where there is some."""
    loss = matrix.cell_mean(matrix.loss)
    curve = fit_loss_curve(loss, matrix.cell_mean(matrix.run_score))
    a, b = _candidates(matrix)
    explained: Floats = np.maximum(0.0, curve(loss[a]) - curve(loss[b]))
    return float((gaps.bounds(0.9)[1] - explained).max())
