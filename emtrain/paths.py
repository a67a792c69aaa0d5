"""Paths as users write them into recipes and on the command line."""

from pathlib import Path


def user_path(text: str) -> Path:
    """``text`` as a path, its ``~`` expanded; there may be nothing. Raises ``ValueError`` where it can't be a path."""
    if "\0" in text:
        raise ValueError(f"{text!r} holds a zero byte, so it is no path; take that out")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{text}: this machine knows no home directory {text.partition('/')[0]}; give the path without ~"
        ) from None
