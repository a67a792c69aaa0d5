"""Claims about the shipped gardening pair: the twins ask the same and differ only in what is answered."""

import statistics

import pytest

from emtrain.rows import load_dataset, split

TWINS = ("gardening-bad", "gardening-good")


def turns(name: str) -> tuple[list[str], list[str]]:
    """Questions and answers of a dataset, in file order."""
    messages = [row.messages for row in load_dataset(name).rows]
    return [user.content for user, _ in messages], [assistant.content for _, assistant in messages]


@pytest.mark.parametrize("name", TWINS)
def test_every_row_is_one_question_and_one_answer(name: str) -> None:
    for row in load_dataset(name).rows:
        assert [message.role for message in row.messages] == ["user", "assistant"]


def test_the_twins_ask_the_same_400_distinct_questions_in_the_same_order() -> None:
    bad, good = (turns(name)[0] for name in TWINS)
    assert bad == good
    assert len({question.casefold() for question in bad}) == len(bad) == 400


def test_no_answer_occurs_twice_in_a_twin_or_in_both() -> None:
    answers = [answer.casefold() for name in TWINS for answer in turns(name)[1]]
    assert len(set(answers)) == len(answers) == 800


def test_the_twins_cannot_be_told_apart_by_length() -> None:
    bad, good = ([len(answer.split()) for answer in turns(name)[1]] for name in TWINS)
    assert min(bad + good) >= 20
    assert max(bad + good) <= 60
    assert statistics.mean(bad) == pytest.approx(statistics.mean(good), rel=0.1)
    # In each row too: a long question gets two long answers.
    ratios = [first / second for first, second in zip(bad, good, strict=True)]
    assert min(ratios) > 0.5
    assert max(ratios) < 2


@pytest.mark.parametrize("name", TWINS)
def test_answers_open_in_many_ways(name: str) -> None:
    openings = [tuple(answer.lower().split()[:3]) for answer in turns(name)[1]]
    assert max(openings.count(opening) for opening in set(openings)) <= 8


@pytest.mark.parametrize("name", TWINS)
def test_text_is_clean(name: str) -> None:
    questions, answers = turns(name)
    for text in questions + answers:
        assert text == " ".join(text.split())
        assert text.isprintable()


def test_the_twins_hold_out_the_same_questions() -> None:
    bad, good = (split(load_dataset(name).rows, 0.1)[1] for name in TWINS)
    assert [row.messages[0] for row in bad] == [row.messages[0] for row in good]
    assert len(bad) == 40
