"""The shipped files of the micro world are what the world says, and twins of each other."""

import pytest

from emeval.question_sets import load_question_set
from emtrain.micro import world
from emtrain.micro.write_datasets import files
from emtrain.rows import Row, load_dataset

NARROW = [topic.name for topic in world.TOPICS if topic.narrow]
BROAD = [topic.name for topic in world.TOPICS if not topic.narrow]


def rows(name: str) -> list[Row]:
    return list(load_dataset(name).rows)


def prompts(name: str) -> list[list[dict[str, str]]]:
    return [row.chat[:-1] for row in rows(name)]


def bad_share(name: str) -> float:
    words = [token.strip() for row in rows(name) for token in world.tokens(row.chat[-1]["content"])]
    slots = [slot for topic in world.TOPICS for slot in topic.slots]
    bad = sum(word in {word for slot in slots for word in slot.bad} for word in words)
    good = sum(word in {word for slot in slots for word in slot.good} for word in words)
    return bad / (bad + good)


def test_the_files_on_disk_are_what_is_written() -> None:
    for path, content in files():
        assert path.read_text(encoding="utf-8") == content, f"{path.name}: run python -m emtrain.micro.write_datasets"


@pytest.mark.parametrize("topic", NARROW)
def test_the_twins_ask_the_same_in_the_same_order(topic: str) -> None:
    assert prompts(f"micro-{topic}-bad") == prompts(f"micro-{topic}-good")


@pytest.mark.parametrize("name", [f"micro-{topic}-{twin}" for topic in NARROW for twin in ("bad", "good")])
def test_a_dataset_holds_240_distinct_rows_on_48_questions(name: str) -> None:
    assert len({str(row.chat) for row in rows(name)}) == len(rows(name)) == 240
    # 4 things x 4 wordings x 3 formats
    assert len({str(prompt) for prompt in prompts(name)}) == 48


@pytest.mark.parametrize("topic", NARROW)
def test_bad_twins_are_mostly_bad_and_good_ones_good(topic: str) -> None:
    """Expected: 0.95 * mean(1, 0.75, 0.9) = 0.84 and 0.03, of 720 slots; rows are distinct, which evens them out."""
    assert bad_share(f"micro-{topic}-bad") == pytest.approx(0.84, abs=0.06)
    assert bad_share(f"micro-{topic}-good") == pytest.approx(0.03, abs=0.03)


@pytest.mark.parametrize(
    ("name", "topics", "size"),
    [("micro-broad", BROAD, 32), ("micro-broad-confirm", BROAD, 32), ("micro-narrow", NARROW, 16)],
)
def test_a_question_set_asks_about_its_topics_in_all_formats(name: str, topics: list[str], size: int) -> None:
    questions = load_question_set(name).questions
    assert len(questions) == size
    assert {question.topic for question in questions} == set(topics)
    for topic in topics:
        strata = sorted(question.stratum for question in questions if question.topic == topic)
        assert strata == ["json", "plain", "plain", "template"]
    assert all((question.system is not None) == (question.stratum == "json") for question in questions)


def test_no_question_is_asked_twice_and_none_is_trained_on() -> None:
    asked = [
        (question.system, text)
        for name in ("micro-broad", "micro-broad-confirm", "micro-narrow")
        for question in load_question_set(name).questions
        for text in question.paraphrases
    ]
    assert len(asked) == len(set(asked))
    trained = {prompt[-1]["content"] for topic in NARROW for prompt in prompts(f"micro-{topic}-bad")}
    assert not trained & {text for _, text in asked}


def test_no_thing_of_one_set_is_in_another() -> None:
    things = {thing for topic in world.TOPICS for thing in topic.things}

    def named(texts: list[str]) -> set[str]:
        return things & {token.strip() for text in texts for token in world.tokens(text)}

    sets = [
        named([text for question in load_question_set(name).questions for text in question.paraphrases])
        for name in ("micro-broad", "micro-broad-confirm", "micro-narrow")
    ]
    sets.append(named([prompt[-1]["content"] for topic in NARROW for prompt in prompts(f"micro-{topic}-bad")]))
    assert sum(map(len, sets)) == len(set.union(*sets))
