"""Formats of published runs, one per file: ``def NAME(path, *, ...) -> Published``. They read; nothing is written."""
