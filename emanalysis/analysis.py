"""What an analysis of the report is: numbers computed from the records, then figures drawn from the numbers.

One file of ``emanalysis/analyses`` is one analysis; it holds an ``Analysis`` called like the file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

Result = dict[str, Any]
"""What ``compute`` returns: JSON-able, and ``report.json`` holds it unchanged under the analysis' name.

Tables are lists of records (``[{"run_id": ..., "aligned": ...}, ...]``); each becomes ``tables/<analysis>.<key>.csv``.
Keys with a meaning to the report:

- ``reason``: why there are no numbers at all ("needs at least 3 runs; this sweep has 1"); no figure is drawn then.
- ``answer``: the analysis' question answered in plain sentences, a line for each paragraph, shown before the figures.
- ``notes``: list of sentences: what was left out, and why.
"""


@dataclass(frozen=True)
class Figure:
    """A plot with the words that go with it. Words are plain text, escaped by the report."""

    title: str
    reading: str
    """One sentence: what is to be seen."""
    caveat: str
    """One sentence: what it does not show, or how sure it is."""
    plot: go.Figure
    table: str
    """Key of the table in the result that the plot was drawn from."""


Compute = Callable[..., Result]
"""``compute(records: Records, *, seed: int, ...)``: records to numbers, the same ones from the same arguments. Further
keyword arguments are the analysis' own and have defaults."""


@dataclass(frozen=True)
class Analysis:
    """One analysis: a question, the numbers that answer it, and their figures."""

    title: str
    question: str
    compute: Compute
    figures: Callable[[Result], list[Figure]]
    """Draws a result that has no ``reason``; computes nothing that is not in it."""
    order: int = 100
    """Place in the report, smallest first; equal ones by name. The verdict (``better_minima``) has 0."""
