"""What a sweep to come would find, and what a smaller difference takes, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emanalysis.power import (
    ALPHA,
    MOST_QUESTIONS,
    MOST_SEEDS,
    Design,
    Noise,
    designs_for,
    detectable_difference,
    estimate_noise,
)

if TYPE_CHECKING:
    from emanalysis.comparable import Comparable

NAMES = {
    "seeds": "seeds of each configuration",
    "questions": "questions",
    "topics": "topics",
    "samples": "responses to each question",
}


def ways_table(noise: Noise, design: Design, difference: float, *, alpha: float = ALPHA) -> list[dict[str, Any]]:
    """``design`` as it is (``now``) and the different ways of ``designs_for``, those with the fewest responses first.

    Columns: ``change, seeds`` (per configuration), ``questions, topics`` (groups of near-duplicate questions),
    ``samples`` (per question), ``responses`` (of all configurations, at one evaluation point), ``detects`` (points;
    None where none of up to 100 is).
    """
    now = detectable_difference(noise, design, alpha=alpha)
    ways = designs_for(noise, design, difference, alpha=alpha) if now > difference else {}
    names = {size: (change, detects) for change, (size, detects) in reversed(ways.items())}
    cheapest_first = sorted(names.items(), key=lambda way: way[0].responses)
    return [
        {"change": change, "seeds": size.seeds, "questions": size.questions, "topics": size.clusters}
        | {"samples": size.samples, "responses": size.responses, "detects": detects if np.isfinite(detects) else None}
        for size, (change, detects) in [(design, ("now", now)), *cheapest_first]
    ]


def smallest_change(ways: Sequence[dict[str, Any]], difference: float) -> str:
    """The way of ``ways_table`` with the fewest responses, in a sentence."""
    now, *others = ways
    if now["detects"] is not None and now["detects"] <= difference:
        return f"As it is, the recipe finds {difference:g} points."
    if not others:
        return (
            f"Even {MOST_SEEDS} seeds of each configuration and {MOST_QUESTIONS} times the questions do not find "
            f"{difference:g} points: compare fewer configurations, or ask for a larger difference."
        )
    best = others[0]
    changed = [f"{best[key]:,.0f} {name} (now {now[key]:,.0f})" for key, name in NAMES.items() if best[key] != now[key]]
    return f"The smallest change that finds {difference:g} points: {', '.join(changed)}."


def measured_noise(groups: "Sequence[Comparable]", *, model: str, dataset: str, question_set: str) -> tuple[Noise, str]:
    """The noise of the group of a finished sweep that is most like the one to come, and which that is, in words.

    The question set counts before the model, and the model before the dataset; of equals the largest group is taken.
    """
    wanted = {"question_set": question_set, "model": model, "dataset": dataset}

    def likeness(group: "Comparable") -> list[bool]:
        return [group.key[key] == value for key, value in wanted.items()]

    group = max(groups, key=likeness)
    return estimate_noise(group.matrix), f"{group.model} on {group.dataset}, asked {group.question_set}"
