"""Pairs of runs: how two runs differ, and which pairs are worth measuring what lies between them."""

from collections.abc import Iterator
from itertools import chain, zip_longest

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from emanalysis.comparable import cells, settings
from emanalysis.records import Records

SEEDS = "same settings, other seed"
SCHEDULES = "other schedule"
OTHERS = "other settings"
RELATIONS = (SEEDS, SCHEDULES, OTHERS)

CALIPER = 0.02
"""Held-out losses within this share of each other count as equal."""
WHY = (
    "equal loss, other settings",
    "same settings, other seed",
    "other schedule, else the same",
    "best aligned against lowest loss",
)
"""Why a pair is chosen, in the order of turns."""
COLUMNS = ("model", "dataset", "run_a", "step_a", "run_b", "step_b", "relation", "same_seed", "why")


def relations(runs: pd.DataFrame, columns: list[str]) -> NDArray[np.object_]:
    """(R, R) how any two of the ``runs`` differ, of ``RELATIONS``, where configurations differ in ``columns``."""
    schedule = [column for column in columns if column.partition(".")[0] in {"schedule", "warmup_steps"}]
    cell, _ = cells(runs, columns)
    rest, _ = cells(runs, [column for column in columns if column not in schedule])
    same_cell, same_rest = cell[:, None] == cell, rest[:, None] == rest
    return np.where(same_cell, SEEDS, np.where(same_rest, SCHEDULES, OTHERS)).astype(object)


def without_adapters(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs whose updates can't be measured, ``run_id, name``, and each one's ``reason``."""
    full = runs["adapter"].eq("full") if "adapter" in runs else pd.Series(False, runs.index)
    reason = pd.Series(None, runs.index, object)
    for hit, why in (
        (runs["status"] != "FINISHED", "it is not finished"),
        (full, "all its weights were trained, so it has no adapter"),
        (runs["weights_kept"].eq("none"), "its adapter was not kept (resources.keep_weights: none)"),
        (runs["imported_from"].notna(), "it was imported, without an adapter"),
    ):
        reason = reason.mask(hit, why)
    return runs[["run_id", "name"]].assign(reason=reason)[reason.notna()]


def choose(records: Records, *, per_group: int, seed: int) -> pd.DataFrame:
    """Up to ``per_group`` pairs of finished runs with adapters in each model and dataset, at their last steps.

    Taken in turn from the lists that ``WHY`` names, a pair from the first that has it: pairs of equal loss by their
    gap in alignment, the largest first; pairs of the second and third kind in an order drawn by ``seed``; the run
    with the best alignment and that with the lowest loss. Columns: ``COLUMNS``; of the two runs of a pair the one with
    the smaller id is first, whatever was the reason to choose them.
    """
    runs = records.runs[~records.runs["run_id"].isin(without_adapters(records.runs)["run_id"])]
    rng = np.random.default_rng(seed)
    chosen = []
    for (model, dataset), group in runs.groupby(["model", "dataset"], sort=True):
        own = group.reset_index(drop=True)
        relation = relations(own, settings(records))
        # Of twice as many as are wanted half may be known from the lists before; no list needs more.
        turns = chain.from_iterable(zip_longest(*_lists(own, relation, rng, most=2 * per_group)))
        pairs: dict[tuple[int, int], str] = {}
        for turn in turns:
            if turn is not None and len(pairs) < per_group:
                pairs.setdefault((turn[0], turn[1]), turn[2])
        for (a, b), why in pairs.items():
            ends = sorted((own["run_id"][place], int(own["total_steps"][place])) for place in (a, b))
            same_seed = bool(own["seed"][a] == own["seed"][b])
            chosen.append((model, dataset, *ends[0], *ends[1], relation[a, b], same_seed, why))
    return pd.DataFrame(chosen, columns=list(COLUMNS))


def _lists(
    runs: pd.DataFrame, relation: NDArray[np.object_], rng: np.random.Generator, *, most: int
) -> Iterator[list[tuple[int, int, str]]]:
    """The first ``most`` of each list of ``WHY``: places of two runs, the first before the second, and why."""
    first, second = np.triu_indices(len(runs), k=1)
    kind = relation[first, second]
    loss, aligned = np.log(runs["heldout_loss"].to_numpy(float)), runs["aligned"].to_numpy(float)
    gap = np.nan_to_num(np.abs(aligned[first] - aligned[second]), nan=-1.0)
    equal = np.flatnonzero((kind != SEEDS) & (np.abs(loss[first] - loss[second]) <= CALIPER))
    ordered = [equal[np.argsort(-gap[equal], kind="stable")]]
    ordered += [rng.permutation(np.flatnonzero(kind == wanted)) for wanted in (SEEDS, SCHEDULES)]
    for why, places in zip(WHY, ordered, strict=False):
        yield [(int(first[place]), int(second[place]), why) for place in places[:most]]
    if np.isfinite(aligned).any() and np.isfinite(loss).any():
        ends = sorted((int(np.nanargmax(aligned)), int(np.nanargmin(loss))))
        yield [(ends[0], ends[1], WHY[-1])] if ends[0] != ends[1] else []
