"""Text that others wrote, on a terminal: shown, never obeyed."""

from rich.markup import escape


def visible(text: str) -> str:
    """``text`` with what a terminal would act on (colours, cursor moves, reversed writing) as ``\\x1b[31m``."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def literal(text: str) -> str:
    """``visible`` for a place where rich reads markup: ``[red]`` stands there as it is."""
    return escape(visible(text))
