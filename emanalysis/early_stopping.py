"""When runs became misaligned, when they had learnt their task, and what stopping in between would have kept."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

ONSET_DROP = 10.0
"""Points of alignment below the base model from which a checkpoint counts as misaligned."""
PLATEAU_SHARE = 0.95
"""Share of a run's fall in held-out loss after which its loss counts as settled."""

CHECKPOINT = ["run_id", "step", "heldout_loss", "aligned"]


def onsets(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """One row per run: when it became misaligned, and when its held-out loss settled.

    ``checkpoints`` has the columns ``CHECKPOINT``, one row per run and scored step. ``onset_after, onset_by``: the last
    step before and the first step at which alignment was ``ONSET_DROP`` points below step 0, so that the onset lies
    between; NaN for a run that never was. ``plateau_by``: the first step with ``PLATEAU_SHARE`` of the fall in loss
    from step 0 to the run's lowest; NaN where it never fell. Runs not scored at step 0 are left out: there is nothing
    to fall from.

    The noise of the scores is in these steps: an onset is an observation, not a test.
    """
    rows: list[dict[str, Any]] = []
    for run_id, points in checkpoints.sort_values("step").groupby("run_id", sort=False):
        base = points.iloc[0]
        if base["step"] != 0 or len(points) < 2:
            continue
        by = points.loc[points["aligned"] <= base["aligned"] - ONSET_DROP, "step"].min()
        fall = base["heldout_loss"] - points["heldout_loss"]
        settled = points.loc[fall >= PLATEAU_SHARE * fall.max(), "step"].min() if fall.max() > 0 else np.nan
        rows.append(
            {
                "run_id": run_id,
                "onset_after": points.loc[points["step"] < by, "step"].max(),
                "onset_by": by,
                "plateau_by": settled,
                "last_step": points["step"].max(),
            }
        )
    return pd.DataFrame(rows, columns=["run_id", "onset_after", "onset_by", "plateau_by", "last_step"])


def earlier_checkpoints(checkpoints: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``checkpoints`` between a run's step 0 and its last, with what each had of the last.

    ``loss_kept``: the fall in held-out loss from step 0 to the checkpoint over that to the last one (1 is all of it;
    more than 1 where the loss rose again). ``aligned_gain``: its alignment minus the last checkpoint's, in points. Runs
    not scored at step 0, or whose loss did not fall, are left out.
    """
    ordered = checkpoints.sort_values(["run_id", "step"])
    by_run = ordered.groupby("run_id")
    first, last = by_run[CHECKPOINT[1:]].transform("first"), by_run[CHECKPOINT[1:]].transform("last")
    fall = first["heldout_loss"] - last["heldout_loss"]
    between = (first["step"] == 0) & (fall > 0) & (ordered["step"] > 0) & (ordered["step"] < last["step"])
    kept = (first["heldout_loss"] - ordered["heldout_loss"]) / fall.where(fall > 0)
    table = ordered.assign(loss_kept=kept, aligned_gain=ordered["aligned"] - last["aligned"])
    return table[between].reset_index(drop=True)


def stopped_at(earlier: pd.DataFrame, share: float) -> dict[str, Any]:
    """The mean gain in alignment, over runs, of stopping at the first checkpoint that keeps ``share`` of the learning.

    ``earlier`` is what ``earlier_checkpoints`` returned. The checkpoint is chosen by loss alone, so the gain is not the
    largest of several. ``runs`` of the ``of_runs`` have such a checkpoint. ``low, high``: 95 % t interval with runs
    taken as independent; None with fewer than 3 runs or no variation.
    """
    kept = earlier[earlier["loss_kept"] >= share].sort_values("step").groupby("run_id").first()
    gains = kept["aligned_gain"].dropna()
    low = high = None
    if len(gains) >= 3 and gains.std() > 0:
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
    return {
        "loss_kept_at_least": share,
        "runs": len(gains),
        "of_runs": int(earlier["run_id"].nunique()),
        "aligned_gain": float(gains.mean()) if len(gains) else None,
        "low": low,
        "high": high,
    }


def by_optimizer(trajectories: pd.DataFrame, began: pd.DataFrame) -> pd.DataFrame:
    """One row per model, dataset and optimiser: runs, their last losses and alignment, how many fell and when.

    ``aligned_low, aligned_high``: 95 % t interval with runs taken as independent, NaN below three. ``onset_fraction``:
    median share of the steps at which the runs that fell were first seen to have fallen.
    """
    last = trajectories.sort_values("step").groupby("run_id").last()
    began = began.set_index("run_id").reindex(last.index)
    last = last.assign(fell=began["onset_by"].notna(), onset_fraction=began["onset_by"] / began["last_step"])
    rows = []
    for key, runs in last.groupby(["model", "dataset", "optimizer"]):
        aligned = runs["aligned"]
        low = high = np.nan
        if len(aligned) >= 3 and aligned.std() > 0:
            low, high = stats.t.interval(0.95, len(aligned) - 1, aligned.mean(), stats.sem(aligned))
        rows.append(
            {
                **dict(zip(("model", "dataset", "optimizer"), key, strict=True)),
                "runs": len(runs),
                "heldout_loss": runs["heldout_loss"].median(),
                "aligned": aligned.mean(),
                "aligned_low": low,
                "aligned_high": high,
                "fell": int(runs["fell"].sum()),
                "onset_fraction": runs["onset_fraction"].median(),
            }
        )
    return pd.DataFrame(rows)
