"""By which runs packing is measured, and by which engines."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from sweeps import packing as module
from sweeps.packing import heaviest, measured
from sweeps.planner import plan_sweep
from sweeps.recipe import load_recipe

RECIPE = """
name: tiny
base: {model: micro-llama, dataset: micro-garden-bad, max_steps: 10, max_length: 64}
grid:
  - {batch_size: [4, 16, 8]}
  - {batch_size: [8], max_length: [256], precision: [auto, bf16]}
  - {adapter: [full], batch_size: [240]}
eval: {questions: [micro-broad], samples: 1, at: [1.0], judges: [micro-rule], max_new_tokens: 16}
"""


def test_a_base_is_measured_by_the_run_with_the_largest_step() -> None:
    """8 rows of 256 tokens are more than 16 of 64; of the runs that can be packed."""
    found = heaviest(plan_sweep(load_recipe(RECIPE, source="r")).runs)
    assert {base: (run.spec.batch_size, run.spec.max_length) for base, run in found.items()} == {
        ("micro-llama", "auto"): (8, 256),
        ("micro-llama", "bf16"): (8, 256),
    }


class Engine:
    """Ray's handle of an engine: what it answers, None while it waits for a machine."""

    def __init__(self, answers: dict[tuple[str, str], Any] | None) -> None:
        self.answers = answers
        self.__dict__["__ray_ready__"] = SimpleNamespace(remote=lambda: (self, None))
        self.packing = SimpleNamespace(remote=lambda base: (self, base))


@pytest.fixture(autouse=True)
def _calls_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(calls: list[Any], num_returns: int, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        return [call for call in calls if call[0].answers is not None][:num_returns], []

    def get(call: Any) -> Any:
        answer = call[0].answers[call[1]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=wait, get=get))


BASES = [("one", "auto"), ("two", "auto"), ("two", "bf16")]


def test_bases_are_measured_side_by_side_by_the_engines_that_are_there() -> None:
    first = Engine({BASES[0]: "32 at once", BASES[2]: "4 at once"})
    second = Engine({BASES[1]: "8 at once"})
    engines = {"waiting": Engine(None), "first": first, "second": second}
    assert measured(engines, BASES) == {"one": "32 at once", "two": "8 at once", "two bf16": "4 at once"}


def test_a_base_that_cannot_be_measured_and_an_engine_that_dies_are_left_out() -> None:
    answers = {BASES[0]: None, BASES[1]: RayActorError(), BASES[2]: "4 at once"}
    assert measured({"only": Engine(answers)}, BASES) == {"two bf16": "4 at once"}
