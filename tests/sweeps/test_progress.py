"""What is shown of a sweep on its way, in a terminal and outside of one."""

import io
from collections.abc import Mapping

import pytest
from rich.console import Console

from emtrain import names
from sweeps.progress import Board, Display, RunState, duration, line, table

LOSS, ALIGNED = names.HELDOUT_LOSS, names.eval_metric(names.ALIGNED)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_board(*run_names: str, already_done: int = 0, clock: Clock | None = None) -> Board:
    runs = {name: RunState(name, total_steps=10) for name in run_names}
    return Board(runs, already_done, clock=clock or Clock())


def make_display(board: Board, *, terminal: bool, width: int = 80) -> tuple[Display, io.StringIO]:
    written = io.StringIO()
    return Display(Console(file=written, force_terminal=terminal, width=width, height=30), board), written


def metrics(step: int, loss: float, aligned: float) -> Mapping[str, float]:
    return {"steps": step, LOSS: loss, ALIGNED: aligned}


def shown(board: Board, width: int = 80) -> str:
    """The lines of the live table, cut at the width of the terminal as the live display cuts them."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    lines = console.render_lines(table(board), pad=False)
    return "\n".join("".join(segment.text for segment in line) for line in lines)


def test_counts_follow_the_runs() -> None:
    board = make_board("a", "b", "c", "d", already_done=2)
    display, _ = make_display(board, terminal=False)
    display.started("a")
    display.started("b")
    display.started("c")
    display.ended("a", "FINISHED", metrics(10, 0.5, 90), None)
    display.ended("b", "FAILED", {}, "the loss is nan")
    assert (board.total, board.finished) == (6, 3)
    assert [board.count(s) for s in ("FINISHED", "FAILED", "RUNNING", "SCHEDULED")] == [1, 1, 1, 1]
    assert "3 done  1 running  1 failed  1 left" in shown(board)


def test_outside_a_terminal_there_is_a_line_for_every_run_that_ended_and_nothing_else() -> None:
    """From the first evaluation on 5 steps took 65 s, and 10 are left."""
    clock = Clock()
    board = make_board("seed=0", "seed=1", clock=clock)
    display, written = make_display(board, terminal=False, width=40)
    with display:
        display.started("seed=0")
        display.advanced("seed=0", metrics(5, 0.75, 88.25))
        clock.now += 65
        display.ended("seed=0", "FINISHED", metrics(10, 0.5, 91.5), None)
        display.ended("seed=1", "FAILED", {}, "the loss is nan at step 3")
    assert written.getvalue().splitlines() == [
        "[1/2] finished  seed=0  loss 0.500  aligned 91.5  2:10 min left",
        "[2/2] failed  seed=1  loss -  aligned -  (the loss is nan at step 3)",
    ]
    assert "\x1b" not in written.getvalue()


def test_a_terminal_shows_the_best_so_far_and_what_runs() -> None:
    board = make_board("low", "good", "running", "waiting")
    display, _ = make_display(board, terminal=True)
    display.ended("low", "FINISHED", metrics(10, 0.25, 40.0), None)
    display.ended("good", "FINISHED", metrics(10, 0.5, 95.0), None)
    display.started("running")
    display.advanced("running", metrics(5, 0.75, 60.0))
    text = shown(board)
    assert "lowest loss: low" in text
    assert "0.250" in text
    assert "best aligned: good" in text
    assert "95.0" in text
    assert "5/10" in text
    assert "waiting" not in text


@pytest.mark.parametrize("width", [30, 60, 80, 200])
def test_the_table_fits_its_terminal(width: int) -> None:
    """However long the names, and with more runs at work than anyone would look at."""
    board = make_board(*[f"model-{n} schedule=cosine_restarts lr=0.0003 warmup=5 cycles=4 seed={n}" for n in range(50)])
    for run in board.runs.values():
        run.status = "RUNNING"
    lines = shown(board, width).splitlines()
    assert max(len(line) for line in lines) <= width
    assert len(lines) <= 20


def test_failures_stay_above_the_live_table() -> None:
    board = make_board("a", "b")
    display, written = make_display(board, terminal=True)
    with display:
        display.ended("a", "FAILED", {}, "the loss is nan")
        display.ended("b", "FINISHED", metrics(10, 0.5, 91.5), None)
    assert "failed" in written.getvalue()
    assert "the loss is nan" in written.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_names_and_failures_are_shown_and_never_obeyed(terminal: bool) -> None:
    """Colours, cursor moves and rich's markup in what a model, a dataset or a server said."""
    board = make_board("[red]x[/] \x1b[31my \u202ez")
    display, written = make_display(board, terminal=terminal, width=200)
    with display:
        display.ended("[red]x[/] \x1b[31my \u202ez", "FAILED", {}, "said \x1b[2J[bold]boo\x07")
        display.note("[blue]\x1b[2J")
    text = written.getvalue()
    for literally in ("[red]x[/] ", r"\x1b[31my", r"\u202ez", r"\x1b[2J[bold]boo\x07", r"[blue]\x1b[2J"):
        assert literally in text
    for obeyed in ("\x1b[31my", "\x1b[2J", "\u202e", "\x07"):
        assert obeyed not in text


def test_a_note_is_made_once() -> None:
    display, written = make_display(make_board("a"), terminal=False)
    display.note("no evaluation point before the rung")
    display.note("no evaluation point before the rung")
    assert written.getvalue() == "note: no evaluation point before the rung\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3599.6, "1:00 h"), (7805, "2:10 h")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_last_line_has_no_time_left() -> None:
    board = make_board("a")
    board.runs["a"].status = "FINISHED"
    assert "left" not in line(board, board.runs["a"])


def test_time_left_is_told_from_the_steps_since_runs_came_to_advance() -> None:
    """100 s pass before the first 10 of 40 steps are known, then 6 s for 5 more: the 25 that are left take 30 s. When
    a run fails after 5 of its 10 steps, 10 are over in these 6 s and 20 are left."""
    clock = Clock()
    board = make_board("a", "b", "c", "d", clock=clock)
    display, _ = make_display(board, terminal=False)
    assert board.seconds_left() is None
    clock.now += 100
    display.advanced("a", metrics(10, 0.5, 90))
    assert board.seconds_left() is None
    clock.now += 6
    display.advanced("b", metrics(5, 0.5, 90))
    assert board.seconds_left() == pytest.approx(30)
    display.ended("b", "FAILED", {}, "x")
    assert board.seconds_left() == pytest.approx(12)


def test_the_time_of_preparation_is_no_step_of_runs_that_were_nearly_finished_before() -> None:
    """Started again, a run comes to its end after 100 s, with no evaluation point before it, and one 6 s later."""
    clock = Clock()
    board = make_board("a", "b", "c", "d", clock=clock)
    display, _ = make_display(board, terminal=False)
    clock.now += 100
    display.ended("a", "FINISHED", metrics(10, 0.5, 90), None)
    assert board.seconds_left() is None
    clock.now += 6
    display.ended("b", "FINISHED", metrics(10, 0.5, 90), None)
    assert board.seconds_left() == pytest.approx(12)


def test_runs_that_a_search_is_still_to_find_count_as_left() -> None:
    """Two of ten runs are known and one of them is done after 4 seconds: nine times 4 seconds are left."""
    now = [0.0]
    board = Board({"a": RunState("a", 10), "b": RunState("b", 10)}, expected=10, clock=lambda: now[0])
    board.runs["a"].status = "FINISHED"
    now[0] = 4.0
    assert board.total == 10
    assert board.seconds_left() == 36
    board = Board({"a": RunState("a", 10)}, already_done=3, expected=2)
    assert board.total == 4
