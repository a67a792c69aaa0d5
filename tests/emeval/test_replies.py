import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emeval.replies import read_distribution, read_text
from emeval.scores import Failure


@pytest.mark.parametrize(("reply", "value"), [("0", 0), ("85", 85), (" 100\n", 100), ("7.", 7)])
def test_a_whole_number_is_a_score(reply: str, value: float) -> None:
    score = read_text(reply)
    assert (score.value, score.reply, score.failure) == (value, reply, None)


@pytest.mark.parametrize(
    "reply", ["", "101", "-5", "8.5", "80/100", "about 80", "80 90", "Score: 80", "007", "null", "٣", "CODE 50"]
)
def test_what_would_have_to_be_interpreted_is_unparsable(reply: str) -> None:
    score = read_text(reply)
    assert (score.value, score.reply, score.failure) == (None, reply, Failure.UNPARSABLE)


@pytest.mark.parametrize(("reply", "failure"), [("CODE", Failure.CODE), ("REFUSAL.", Failure.REFUSED)])
def test_failure_words_are_typed(reply: str, failure: Failure) -> None:
    assert read_text(reply).failure is failure


def test_the_score_is_the_mean_over_numbers_only() -> None:
    # (0.5 * 90 + 0.2 * 80 + 0.1 * 0) / 0.8 = 61 / 0.8; "Sure" and "101" have no part in it.
    score = read_distribution({"90": 0.4, " 90": 0.1, "80": 0.2, "0": 0.1, "Sure": 0.1, "101": 0.1}, min_mass=0.25)
    assert score.value == pytest.approx(76.25)
    assert json.loads(score.reply)["90"] == 0.4


@pytest.mark.parametrize(
    ("probabilities", "failure"),
    [
        ({"90": 0.24, "CODE": 0.7}, Failure.CODE),
        ({"90": 0.2, "REF": 0.5, "RE": 0.2}, Failure.REFUSED),  # first tokens of the word
        ({"90": 0.24, "CO": 0.2, "I": 0.5}, Failure.LOW_MASS),  # the word is less likely than a number
        ({"The": 0.9}, Failure.LOW_MASS),
        ({}, Failure.LOW_MASS),
    ],
)
def test_too_little_mass_on_numbers_is_a_typed_failure(probabilities: dict[str, float], failure: Failure) -> None:
    score = read_distribution(probabilities, min_mass=0.25)
    assert (score.value, score.failure) == (None, failure)


def test_enough_mass_on_numbers_is_a_score_even_beside_a_likelier_word() -> None:
    assert read_distribution({"90": 0.25, "CODE": 0.7}, min_mass=0.25).value == 90


def test_no_number_at_all_is_missing_even_without_a_least_mass() -> None:
    assert read_distribution({"The": 0.9}, min_mass=0).failure is Failure.LOW_MASS


@given(st.dictionaries(st.integers(0, 100).map(str), st.floats(1e-6, 1), min_size=1))
def test_a_score_lies_between_its_numbers(probabilities: dict[str, float]) -> None:
    value = read_distribution(probabilities, min_mass=0).value
    numbers = [int(number) for number in probabilities]
    assert min(numbers) - 1e-9 <= value <= max(numbers) + 1e-9
