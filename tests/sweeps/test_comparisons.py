"""Which runs the report of a recipe will compare."""

from sweeps.comparisons import Comparison, comparisons
from sweeps.planner import Evaluation
from sweeps.recipe import expand, load_recipe

RECIPE = """
name: r
base: {model: micro-llama, dataset: nowhere.jsonl}
grid:
  - {schedule: [linear, cosine], optimizer.learning_rate: [1.0e-4, 1.0e-3], seed: [0, 1, 2]}
  - {schedule: [linear], optimizer.learning_rate: [1.0e-4], seed: [2, 3]}
  - {dataset: [micro-garden-good], seed: [0, 1]}
eval: {questions: [micro-broad], samples: 3, judges: [micro-rule]}
"""


def compared(*overrides: str) -> list[Comparison]:
    recipe = load_recipe(RECIPE, source="r", overrides=overrides)
    return comparisons(expand(recipe), Evaluation.load(recipe.eval))


def test_configurations_differ_in_more_than_the_seed_and_one_alone_is_not_compared() -> None:
    """Of the four configurations the first has a fourth seed. 32 questions of 8 topics, each with 2 wordings."""
    (found,) = compared()
    assert (found.model, found.dataset, found.question_set) == ("micro-llama", "nowhere.jsonl", "micro-broad")
    assert found.seeds == (4, 3, 3, 3)
    assert (len(found.topics), len(set(found.topics)), found.samples) == (32, 8, 6)


def test_every_question_set_is_a_comparison_of_its_own() -> None:
    found = compared("eval.questions=[micro-broad, micro-narrow]")
    assert [group.question_set for group in found] == ["micro-broad", "micro-narrow"]
