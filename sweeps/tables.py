"""What commands print of their findings: tables and lines, in rich's markup."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sweeps.progress import duration
from sweeps.terminal import literal

if TYPE_CHECKING:
    from sweeps.verify import Verdict


def plan(facts: Mapping[str, Any]) -> Iterator[Table | str]:
    """What a recipe would take, with what stands behind the estimates."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if key in {"unknown", "assumptions", "detectable_difference"} or (key == "duplicates" and not value):
            continue
        shown = f"unknown: {facts['unknown'][key]}" if key in facts["unknown"] and not value else _measure(key, value)
        name = key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")
        name = f"{name} time" if key.endswith("_seconds") else name
        table.add_row(f"[dim]{name}[/]", literal(shown))
        if key in facts["unknown"] and value:
            table.add_row("", literal(f"unknown for {facts['unknown'][key]}"))
    detectable = [
        f"{compared}: {_detectable_text(found)}" for compared, found in facts["detectable_difference"].items()
    ]
    table.add_row("[dim]detectable difference[/]", literal("\n".join(detectable) or "nothing is compared in the grid"))
    yield table
    for line in facts["assumptions"]:
        yield f"[dim]-[/] {literal(line)}"


def _measure(key: str, value: Any) -> str:
    """A figure as people read it; its unit is in its key."""
    if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        return "\n".join(f"{name}: {_measure(key, inner)}" for name, inner in value.items())
    if isinstance(value, dict):
        return ", ".join(f"{_measure(key, inner)} {name.replace('_', ' ')}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    if key.endswith("_bytes"):
        return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"
    if key.endswith("_seconds"):
        return f"about {duration(value)}"
    if key == "dollars":
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _detectable_text(found: dict[str, Any]) -> str:
    from emanalysis.confirmation import MIN_SEEDS

    points = "nothing" if found["points"] is None else f"{found['points']:.0f} points"
    if found["seeds"] < MIN_SEEDS:
        points = f"nothing without {MIN_SEEDS} seeds of each or a null sweep"
    seeds = f"{found['seeds']} seed{'s' if found['seeds'] > 1 else ''}"
    return f"{points} ({found['configurations']} configurations, {seeds})"


def ways(found: Mapping[str, Any]) -> Table:
    """What a comparison finds as it is, and what finds more."""
    lines = [f"{found['compared']}: {found['configurations']} configurations", f"variances from {found['variances']}"]
    if found["assumed"]:
        lines.append(f"(but {', '.join(found['assumed'])}, which it does not show, from the published runs)")
    table = Table(title=literal("\n".join(lines)), title_justify="left", box=None, pad_edge=False)
    for column in found["ways"][0]:
        table.add_column(column, justify="left" if column == "change" else "right")
    for row in found["ways"]:
        sizes = [f"{row[column]:,.0f}" for column in ("seeds", "questions", "topics", "samples", "responses")]
        table.add_row(row["change"], *sizes, "nothing" if row["detects"] is None else f"{row['detects']:.1f}")
    return table


def verdicts(verdicts: "Sequence[Verdict]") -> Iterator[Table | str]:
    """How packed runs compare with the same runs alone."""
    table = Table(box=None, pad_edge=False, title="largest relative differences between packed and alone")
    table.add_column("run", overflow="fold", ratio=1)
    for column in ("steps", "loss", "held-out", "grad norm", "LR", "update", "tokens", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for verdict in verdicts:
        found = verdict.comparison
        if found is None:
            continue
        differences = (found.loss, found.heldout, found.grad_norm, found.learning_rate, found.update)
        table.add_row(
            literal(verdict.name),
            str(found.steps),
            *(f"{difference:.0e}" if difference else "0" for difference in differences),
            "equal" if found.tokens_equal else "[red]differ[/]",
            "[green]same[/]" if verdict.passed else "[red]differs[/]",
        )
    if table.row_count:
        yield table
    for allowed in dict.fromkeys(verdict.tolerance for verdict in verdicts if verdict.tolerance):
        named = ", ".join(dict.fromkeys(verdict.optimizer for verdict in verdicts if verdict.tolerance == allowed))
        yield (
            f"allowed ({literal(named)}): loss {allowed.loss:.0e}, gradient norm {allowed.grad_norm:.0e}, "
            f"update {allowed.update:.0e}; all else exactly"
        )
    for verdict in verdicts:
        if verdict.unpackable:
            yield f"trained alone anyway: {literal(verdict.name)}: {literal(verdict.unpackable)}"


def status(sweep: str, counts: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> Iterator[Table | str]:
    """The runs of a sweep, and why those failed that did."""
    summary = ", ".join(f"{count} {state.lower()}" for state, count in counts.items())
    table = Table(title=f"{literal(sweep)}: {summary}")
    table.add_column("run", overflow="fold")
    for column in ("status", "held-out loss", "aligned"):
        table.add_column(column, justify="right")
    for row in rows:
        ended = "stopped early" if row["stopped_early_by"] else row["status"].lower()
        cells = (ended, _number(row["heldout_loss"], 3), _number(row["aligned"], 1))
        table.add_row(literal(str(row["run"])), *cells)
    yield table
    for row in rows:
        if row["failure"]:
            yield f"[red]failed[/] {literal(str(row['run']))}: {literal(row['failure'])}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
