"""Which runs of a recipe the report will compare with each other, and how many seeds each configuration has."""

from collections.abc import Iterable
from dataclasses import dataclass

from emtrain.spec import RunSpec
from sweeps.planner import Evaluation


@dataclass(frozen=True)
class Comparison:
    """Configurations of one model and dataset, asked one question set. The verdict is given for each of these."""

    model: str
    dataset: str
    question_set: str
    seeds: tuple[int, ...]
    """Of each configuration; configurations are the runs that differ in more than the seed."""
    topics: tuple[str, ...]
    """Of each question."""
    samples: float
    """Responses per question, on average."""

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.model} on {self.dataset}, asked {self.question_set}"


def comparisons(specs: Iterable[RunSpec], evaluation: Evaluation) -> list[Comparison]:
    """The comparisons among runs that are asked the same, those of a single configuration left out."""
    seeds: dict[tuple[str, str], dict[str, set[int]]] = {}
    for spec in specs:
        configuration = spec.model_dump_json(exclude={"seed"})
        seeds.setdefault((spec.model, spec.dataset), {}).setdefault(configuration, set()).add(spec.seed)
    return [
        Comparison(
            model,
            dataset,
            questions.name,
            tuple(len(own) for own in configurations.values()),
            tuple(question.topic for question in questions.questions),
            questions.responses(evaluation.spec.samples) / len(questions.questions),
        )
        for (model, dataset), configurations in seeds.items()
        if len(configurations) > 1
        for questions in evaluation.question_sets
    ]
