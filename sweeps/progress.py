"""How far a sweep has come, as a live table in a terminal and as plain lines anywhere else."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from emtrain import names
from sweeps.planner import PlannedRun
from sweeps.terminal import literal, visible

SHOWN_RUNNING = 12


@dataclass
class RunState:
    """A run as the progress display knows it."""

    name: str
    total_steps: int
    status: str = "SCHEDULED"
    step: int = 0
    heldout_loss: float | None = None
    aligned: float | None = None
    failure: str | None = None


@dataclass
class Board:
    """All runs of a sweep and when they began; fed by the runner, read by the displays."""

    runs: dict[str, RunState]
    already_done: int = 0
    """Runs a former call finished."""
    expected: int = 0
    """All runs of the sweep, at most; a search comes up with its own as it goes."""
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.measured_from = self.began, 0
        """Time and steps done; later than the beginning once runs advance, since models and workers come first."""

    @classmethod
    def of(cls, runs: Sequence[PlannedRun], *, already_done: int, expected: int = 0) -> "Board":
        """A board of runs that have not begun."""
        return cls({run.run_key: RunState(run.name, run.total_steps) for run in runs}, already_done, expected)

    def count(self, status: str) -> int:
        """Runs in ``status``."""
        return sum(run.status == status for run in self.runs.values())

    @property
    def total(self) -> int:
        """All runs of the sweep, finished by this call or a former one, and those that are still to be found."""
        return max(self.already_done + len(self.runs), self.expected)

    @property
    def finished(self) -> int:
        """Runs that are done and good."""
        return self.already_done + self.count("FINISHED")

    @property
    def steps(self) -> tuple[int, int]:
        """Steps done and all steps; a run that is over has none left, however it ended, and one still to be found is
        taken to be as long as the others."""
        over = {"FINISHED", "FAILED", "KILLED"}
        runs = self.runs.values()
        done = sum(run.total_steps if run.status in over else run.step for run in runs)
        known = sum(run.total_steps for run in runs)
        return done, round(known * (self.total - self.already_done) / max(len(runs), 1))

    def advanced(self) -> None:
        """A run came to an evaluation point, or to its end. The first to do so ends the time of preparation."""
        if self.measured_from[1] == 0:
            self.measured_from = self.clock(), self.steps[0]

    def seconds_left(self) -> float | None:
        """From the steps done so far; None before there is something to measure."""
        done, total = self.steps
        since, before = self.measured_from
        return (self.clock() - since) * (total - done) / (done - before) if done > before else None

    def best(self) -> list[tuple[str, RunState]]:
        """The lowest held-out loss and the highest alignment among finished runs, each with its label."""
        finished = [run for run in self.runs.values() if run.status == "FINISHED"]
        with_loss = [run for run in finished if run.heldout_loss is not None]
        with_score = [run for run in finished if run.aligned is not None]
        best = []
        if with_loss:
            best.append(("lowest loss", min(with_loss, key=lambda run: run.heldout_loss or 0.0)))
        if with_score:
            best.append(("best aligned", max(with_score, key=lambda run: run.aligned or 0.0)))
        return best


class Display:
    """Shows a board on a console: live where it is a terminal, a line per ended run where it is not."""

    def __init__(self, console: Console, board: Board) -> None:
        self.console, self.board = console, board
        self._notes: set[str] = set()
        self._live = (
            Live(get_renderable=lambda: table(board), console=console, refresh_per_second=2, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> "Display":
        self._context: AbstractContextManager[object] = self._live or nullcontext()
        self._context.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)  # type: ignore[arg-type]

    def planned(self, run: PlannedRun) -> None:
        """The run was given out; a search comes up with runs as it goes."""
        self.board.runs.setdefault(run.run_key, RunState(run.name, run.total_steps))

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._notes:
            self._notes.add(text)
            self.console.print(f"note: {visible(text)}", highlight=False, markup=False, soft_wrap=True)

    def started(self, run_key: str) -> None:
        """A worker took the run."""
        self.board.runs[run_key].status = "RUNNING"

    def advanced(self, run_key: str, metrics: Mapping[str, float]) -> None:
        """The run came to an evaluation point."""
        run = self.board.runs[run_key]
        run.step = int(metrics["steps"])
        self.board.advanced()
        _read(run, metrics)

    def ended(self, run_key: str, status: str, metrics: Mapping[str, float], failure: str | None) -> None:
        """The run is over; ``failure`` says why, where that is before its end."""
        run = self.board.runs[run_key]
        run.status, run.failure = status, failure
        # A run that a former call had nearly finished has no evaluation point but its end.
        self.board.advanced()
        _read(run, metrics)
        if self._live is None:
            self.console.print(visible(line(self.board, run)), highlight=False, markup=False, soft_wrap=True)
        elif status == "FAILED":
            text = f"[red]failed[/] {literal(run.name)}: {literal(failure or '')}"
            self._live.console.print(text, highlight=False)


def _read(run: RunState, metrics: Mapping[str, float]) -> None:
    run.heldout_loss = metrics.get(names.HELDOUT_LOSS, run.heldout_loss)
    run.aligned = metrics.get(names.eval_metric(names.ALIGNED), run.aligned)


def line(board: Board, run: RunState) -> str:
    """One ended run: its place in the sweep, its result, the time left."""
    ended = board.finished + board.count("FAILED") + board.count("KILLED")
    result = f"loss {_number(run.heldout_loss, 3)}  aligned {_number(run.aligned, 1)}"
    if run.failure:
        result += f"  ({run.failure})"
    left = board.seconds_left()
    time_left = f"  {duration(left)} left" if left is not None and ended < board.total else ""
    return f"[{ended}/{board.total}] {run.status.lower()}  {run.name}  {result}{time_left}"


def table(board: Board) -> Group:
    """The whole sweep: a bar, the counts, the runs in work and the best so far."""
    left = board.seconds_left()
    waiting = board.count("SCHEDULED")
    counts = Text.assemble(
        (f"{board.finished} done", "green"),
        f"  {board.count('RUNNING')} running  ",
        (f"{board.count('FAILED')} failed", "red" if board.count("FAILED") else "dim"),
        f"  {board.count('KILLED')} stopped early" if board.count("KILLED") else "",
        f"  {waiting} left   {duration(board.clock() - board.began)} gone, ",
        f"about {duration(left)} to go" if left is not None else "time left not known yet",
    )
    done, steps = board.steps
    runs = Table(box=None, pad_edge=False, header_style="dim")
    runs.add_column("run", overflow="ellipsis", no_wrap=True)
    for column in ("step", "held-out loss", "aligned"):
        runs.add_column(column, justify="right", no_wrap=True)
    for run in [run for run in board.runs.values() if run.status == "RUNNING"][:SHOWN_RUNNING]:
        _add(runs, run.name, run)
    for label, run in board.best():
        _add(runs, f"{label}: {run.name}", run, style="green")
    # The bar alone ends without a line break, and what follows would be cut off at its right.
    bar = Padding(ProgressBar(total=max(steps, 1), completed=done), 0)
    return Group(bar, counts, runs)


def _add(runs: Table, label: str, run: RunState, style: str = "") -> None:
    cells = (f"{run.step}/{run.total_steps}", _number(run.heldout_loss, 3), _number(run.aligned, 1))
    runs.add_row(literal(label), *cells, style=style)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """``42 s``, ``3:05 min`` or ``2:10 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
