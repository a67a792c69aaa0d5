"""Text of others on a terminal."""

import io

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sweeps.terminal import literal, visible


def test_what_a_terminal_would_act_on_is_written_out() -> None:
    assert visible("\x1b[31mred\x07\x9b2J\u202e") == r"\x1b[31mred\x07\x9b2J\u202e"
    assert visible("plain, ünïcode 漢字 [red]\nnext") == "plain, ünïcode 漢字 [red]\nnext"


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=50) | st.text(alphabet="\\[]/a", max_size=6))
def test_rich_shows_any_text_as_it_is(text: str) -> None:
    written = io.StringIO()
    console = Console(file=written, color_system=None, width=10_000)
    console.print(f"[bold]{literal(text)}[/]", highlight=False, end="", emoji=False, soft_wrap=True)
    assert written.getvalue() == visible(text)
