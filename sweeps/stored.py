"""What can be had of a sweep that is in MLflow: the recipe that it was last run with, and its report."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emtrain import names
from emtrain.tracking import SweepLog
from sweeps.recipe import AnalysisSpec, Recipe, kept_analysis, kept_overrides, load_recipe
from sweeps.store import data_directory, report_directory

if TYPE_CHECKING:
    from emanalysis.records import Records


def stored_recipe(sweep: SweepLog) -> Recipe | None:
    """The recipe that a sweep was last run with, what was set on the command line included; None for imported runs."""
    text = _recipe_text(sweep)
    return None if text is None else load_recipe(text, source=names.RECIPE, overrides=kept_overrides(text))


def write_report(
    sweep: str,
    *,
    uri: str,
    directory: Path | None = None,
    margin: float | None = None,
    null_sweep: str | None = None,
    judge: str | None = None,
) -> Path:
    """Write the report of the sweep of this name, and keep it with the sweep; returns the directory that it is in.

    None: ``directory`` is below the data directory, ``margin`` (points of alignment) and ``null_sweep`` are what the
    recipe states, ``judge`` (an id, as it stands in the tables) is the one that the recipe names first. Raises
    ``ValueError`` when there is no such sweep, or no score of such a judge in it.
    """
    from emanalysis import records, report
    from emanalysis.verdict import MARGIN

    log = SweepLog.find(sweep, uri=uri)
    text = _recipe_text(log)
    stated = AnalysisSpec() if text is None else kept_analysis(text)

    def load(name: str) -> "Records":
        return records.load(name, tracking_uri=uri, cache=data_directory() / "records")

    loaded = replace(load(sweep), judge=judge)
    judges = sorted(loaded.questions["judge"].dropna().unique())
    if judge is not None and judge not in judges:
        raise ValueError(
            f"there is no score by the judge {judge!r} in {sweep}; its judges: {', '.join(judges) or 'none'}"
        )
    held_to: dict[str, Any] = {"margin": margin or stated.margin or MARGIN}
    if reference := null_sweep or stated.null_sweep:
        held_to["null"] = load(reference)
    target = directory or report_directory(sweep)
    report.write(loaded, target, title=sweep, arguments={"better_minima": held_to})
    log.write_directory(target, names.REPORT)
    return target


def _recipe_text(sweep: SweepLog) -> str | None:
    with tempfile.TemporaryDirectory() as scratch:
        kept = sweep.download(sweep.parent_run_id, names.RECIPE, Path(scratch))
        return None if kept is None else kept.read_text(encoding="utf-8")
