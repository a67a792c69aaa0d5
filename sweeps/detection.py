"""What difference in alignment the report of a recipe would find."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from emtrain.spec import RunSpec
from sweeps.comparisons import Comparison, comparisons
from sweeps.planner import Evaluation

if TYPE_CHECKING:
    from emanalysis.power import Design, Noise
    from emanalysis.records import Records


def designs(specs: Iterable[RunSpec], evaluation: Evaluation) -> "dict[Comparison, tuple[Design, float]]":
    """The design of every comparison that the report will make, and the level it is tested at."""
    from emanalysis.power import ALPHA, planned_design

    found = comparisons(specs, evaluation)
    return {group: (planned_design(group.seeds, group.topics, group.samples), ALPHA / len(found)) for group in found}


def noises(groups: Sequence[Comparison], finished: "Records | None") -> "list[tuple[Noise, str]]":
    """The noise of each comparison and where it is from, in words: of a finished sweep, the field's where it is None.

    Raises ``ValueError`` when the sweep shows none.
    """
    from emanalysis.comparable import comparable
    from emanalysis.power import FIELD
    from emanalysis.power_table import measured_noise

    if finished is None:
        return [(FIELD, "the published runs of arXiv 2606.20814 (of seeds: an upper bound)") for _ in groups]
    known = comparable(finished)
    if not known:
        raise ValueError("it has no finished and scored runs to take variances from")
    return [
        measured_noise(known, model=group.model, dataset=group.dataset, question_set=group.question_set)
        for group in groups
    ]


def detectable_differences(specs: Iterable[RunSpec], evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """What each comparison of the report would find, by the field's variances; None points where it finds nothing."""
    from emanalysis.power import FIELD, detectable_difference

    said = {}
    for group, (design, alpha) in designs(specs, evaluation).items():
        points = detectable_difference(FIELD, design, alpha=alpha)
        found = round(points, 1) if points <= 100 else None
        said[group.title] = {"points": found, "configurations": design.cells, "seeds": design.seeds}
    return said
