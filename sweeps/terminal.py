"""Text that others wrote, on a terminal: shown, never obeyed."""

import re

from rich.markup import escape

NO_TAG = re.compile(r"\[(?![a-z#/@][^[]*?\])")
"""A bracket that rich takes for no tag. From a backslash before it rich would take that away."""


def visible(text: str) -> str:
    """``text`` with what a terminal would act on (colours, cursor moves, reversed writing) as ``\\x1b[31m``."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def literal(text: str) -> str:
    """``visible`` for a place where rich reads markup: ``[red]`` stands there as it is."""
    shown = visible(text)
    body = shown.rstrip("\\")
    # Of the backslashes before a tag, which may follow the text, rich shows half; its own ``escape`` doubles but one.
    return escape(NO_TAG.sub(r"\\[", body)) + 2 * shown[len(body) :]
