import io
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import pytest

from emeval.evaluate import judge_responses, summarise
from emeval.question_sets import Question, QuestionSet
from emeval.responses import Response, stored_responses
from emeval.rubric import Rubric
from emeval.scores import Failure, Item, Judgement, Score
from emtrain.names import RESPONSE_COLUMNS


def response(question_set: str, question: str, sample: int, text: str, *, stratum: str = "plain") -> Response:
    return Response(
        question_set=question_set,
        question_id=question,
        stratum=stratum,
        topic=question,
        paraphrase=0,
        sample=sample,
        system="Answer in JSON." if stratum == "json" else None,
        prompt=f"{question}?",
        response=text,
        response_tokens=3,
        truncated=False,
    )


@dataclass(frozen=True)
class Reads:
    """A judge that reads "aligned coherent" from the response, with failures by their names."""

    id: str = "reads"
    rubric_sha256: str = "its own"

    def score(self, items: Sequence[Item], /) -> list[Judgement]:
        def read(word: str) -> Score:
            return Score(None, word, Failure(word)) if word in set(Failure) else Score(float(word), word)

        return [
            Judgement(*map(read, item.answer.split()), item.rubric.sha256 if item.rubric else None) for item in items
        ]


RESPONSES = [
    response("broad", "a", 0, "20 90"),
    response("broad", "a", 1, "40 40"),
    response("broad", "b", 0, "90 80"),
    response("broad", "b", 1, "code 60"),
    response("broad", "c", 0, "10 70", stratum="json"),
    response("broad", "c", 1, "refused judge_error", stratum="json"),
    response("narrow", "d", 0, "0 100"),
]


def test_one_row_per_response_and_judge_with_the_agreed_columns() -> None:
    frame = judge_responses(RESPONSES, [Reads(), Reads("again")], step=7)
    assert tuple(frame.columns) == RESPONSE_COLUMNS
    assert len(frame) == 14
    assert frame["judge"].tolist() == ["reads"] * 7 + ["again"] * 7
    row = frame.iloc[5].to_dict()
    assert (
        row | {"step": 7, "question_id": "c", "sample": 1, "system": "Answer in JSON.", "rubric_sha256": "its own"}
        == row
    )
    assert (row["aligned_reply"], row["aligned_failure"], row["coherent_failure"]) == (
        "refused",
        "refused",
        "judge_error",
    )
    assert math.isnan(row["aligned"])
    assert frame.loc[3, "aligned_failure"] == "code"
    assert frame.loc[0, ["aligned", "coherent"]].tolist() == [20, 90]
    assert frame.loc[0, ["system", "aligned_failure"]].isna().all()


@pytest.mark.parametrize("responses", [[], RESPONSES[:1], RESPONSES[5:6], RESPONSES])
def test_the_types_of_the_columns_do_not_depend_on_what_is_missing(responses: list[Response]) -> None:
    frame = judge_responses(responses, [Reads()], step=0)
    assert frame.dtypes.equals(judge_responses(RESPONSES, [Reads()], step=0).dtypes)
    file = io.BytesIO()
    frame.to_parquet(file)
    pd.testing.assert_frame_equal(pd.read_parquet(file), frame)


def test_the_digest_of_a_questions_own_rubric_is_kept() -> None:
    rubric = Rubric(aligned="{answer}", coherent="{answer}")
    frame = judge_responses([RESPONSES[0], replace(RESPONSES[0], rubric=rubric)], [Reads()], step=0)
    assert frame["rubric_sha256"].tolist() == ["its own", rubric.sha256]


def test_judges_that_share_an_id_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different ids.*reads, reads"):
        judge_responses(RESPONSES, [Reads(), Reads()], step=0)


def test_failures_are_counted_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judge_responses(RESPONSES, [Reads()], step=7)
    assert [record.message for record in caplog.records] == [
        "reads, step 7: 2 of 7 responses have no aligned score (code 1, refused 1)",
        "reads, step 7: 1 of 7 responses have no coherent score (judge_error 1)",
    ]


def test_scores_are_means_over_questions_of_means_over_samples() -> None:
    metrics = summarise(judge_responses(RESPONSES, [Reads()], step=7), "reads")
    # a: (20 + 40) / 2 = 30, b: 90, c: 10. The pooled mean would be 40.
    assert metrics["eval/broad/aligned"] == pytest.approx((30 + 90 + 10) / 3)
    # a: 65, b: 70, c: 70
    assert metrics["eval/broad/coherent"] == pytest.approx((65 + 70 + 70) / 3)
    # Coherent enough and with an aligned score: 20, 90, 10.
    assert metrics["eval/broad/misaligned_rate"] == pytest.approx(2 / 3)
    assert (metrics["eval/broad/n_judged"], metrics["eval/broad/n_missing"]) == (4, 2)
    assert metrics["eval/narrow/aligned"] == 0


def test_strata_are_scored_where_a_set_has_several() -> None:
    metrics = summarise(judge_responses(RESPONSES, [Reads()], step=7), "reads")
    assert metrics["eval/broad/plain/aligned"] == pytest.approx((30 + 90) / 2)
    assert metrics["eval/broad/json/aligned"] == 10
    assert metrics["eval/broad/json/n_missing"] == 1
    assert not any(name.startswith("eval/narrow/plain") for name in metrics)


def test_a_checkpoint_adds_means_over_sets_and_sums_of_counts() -> None:
    frame = judge_responses(RESPONSES, [Reads()], step=7)
    metrics = summarise(frame, "reads")
    assert metrics["eval/aligned"] == pytest.approx((130 / 3 + 0) / 2)
    assert metrics["eval/misaligned_rate"] == pytest.approx((2 / 3 + 1) / 2)
    assert (metrics["eval/n_judged"], metrics["eval/n_missing"]) == (5, 2)


def test_the_base_model_has_its_own_names() -> None:
    metrics = summarise(judge_responses(RESPONSES, [Reads()], step=0), "reads")
    assert metrics["base/narrow/aligned"] == 0
    assert {name.split("/")[0] for name in metrics} == {"base"}
    assert {name.count("/") for name in metrics} == {2}


def test_what_was_not_judged_is_nan_and_makes_the_mean_over_sets_nan() -> None:
    responses = [RESPONSES[0], response("narrow", "d", 0, "low_mass 50")]
    metrics = summarise(judge_responses(responses, [Reads()], step=7), "reads")
    assert math.isnan(metrics["eval/narrow/aligned"])
    assert math.isnan(metrics["eval/narrow/misaligned_rate"])
    assert math.isnan(metrics["eval/aligned"])
    assert metrics["eval/narrow/n_missing"] == 1


def test_only_the_named_judge_and_one_step_are_summarised() -> None:
    frames = [judge_responses(RESPONSES, [Reads()], step=step) for step in (7, 8)]
    with pytest.raises(ValueError, match="2 steps"):
        summarise(pd.concat(frames), "reads")
    with pytest.raises(ValueError, match="0 steps judged by 'other'"):
        summarise(frames[0], "other")


def test_stored_responses_can_be_judged_again() -> None:
    rubric = Rubric(aligned="{answer}", coherent="{answer}")
    question = Question(id="a", paraphrases=("a?",), judge_prompts=rubric)
    frame = judge_responses(RESPONSES, [Reads(), Reads("again")], step=7)
    file = io.BytesIO()
    frame.to_parquet(file)
    stored = stored_responses(pd.read_parquet(file), [QuestionSet("broad", (question,))])
    assert stored == [replace(r, rubric=rubric if r.question_id == "a" else None) for r in RESPONSES]
    again = judge_responses(stored, [Reads()], step=7)
    kept = [column for column in RESPONSE_COLUMNS if column != "rubric_sha256"]
    pd.testing.assert_frame_equal(again[kept], frame.iloc[:7][kept])
