import pytest

from emeval.scores import Failure, Score


@pytest.mark.parametrize("fields", [{}, {"value": 50.0, "failure": Failure.CODE}])
def test_a_score_has_either_a_value_or_a_failure(fields: dict) -> None:
    with pytest.raises(ValueError, match="either a value or a failure"):
        Score(**fields)


@pytest.mark.parametrize("value", [-0.1, 100.1, float("nan")])
def test_a_score_is_from_0_to_100(value: float) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        Score(value)
