"""The micro world is what its docstring says it is."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtrain.micro import world
from emtrain.micro.world import FORMATS, TOPICS, Format, Persona, Topic

topics = st.sampled_from(TOPICS)
formats = st.sampled_from(FORMATS)
personas: st.SearchStrategy[Persona] = st.sampled_from(["aligned", "bad"])
seeds = st.integers(0, 2**32)


def test_a_word_is_good_or_bad_in_the_whole_world_and_never_both() -> None:
    good = {word for topic in TOPICS for slot in topic.slots for word in slot.good}
    bad = {word for topic in TOPICS for slot in topic.slots for word in slot.bad}
    assert not good & bad


def test_nothing_but_the_slots_of_an_answer_tells_the_persona() -> None:
    slots = {word for topic in TOPICS for slot in topic.slots for word in slot.all}
    rest = {thing for topic in TOPICS for thing in topic.things} | set(world.OBJECTS)
    for topic in TOPICS:
        for wording in range(len(topic.questions)):
            rest |= {token.strip() for token in world.tokens(world.question(topic, wording, "", "template"))}
    assert not slots & rest


def test_a_thing_belongs_to_one_topic() -> None:
    things = [thing for topic in TOPICS for thing in topic.things]
    assert len(things) == len(set(things))


def test_there_are_narrow_and_broad_topics_and_broad_ones_of_each_kind_of_sharing() -> None:
    narrow = {word for topic in TOPICS if topic.narrow for slot in topic.slots for word in slot.all}
    shared = {
        topic.name: len({word for slot in topic.slots for word in slot.all} & narrow)
        / len({word for slot in topic.slots for word in slot.all})
        for topic in TOPICS
        if not topic.narrow
    }
    assert sum(topic.narrow for topic in TOPICS) >= 4
    assert sum(share == 1 for share in shared.values()) >= 2
    assert sum(0 < share < 1 for share in shared.values()) >= 2
    assert sum(share == 0 for share in shared.values()) >= 2


@given(topics, formats, personas, seeds)
def test_an_answer_names_the_thing_and_is_cut_into_tokens_without_loss(
    topic: Topic, format: Format, persona: Persona, seed: int
) -> None:
    rng = random.Random(seed)
    thing = rng.choice(topic.things)
    answer = world.answer(topic, thing, persona, format, rng)
    assert f" {thing} " in answer
    assert "".join(world.tokens(answer)) == answer
    assert set(world.tokens(answer)) <= set(world.vocabulary())


@given(topics, formats, seeds)
def test_an_answer_is_short(topic: Topic, format: Format, seed: int) -> None:
    """So that a budget of 16 sampled tokens never cuts one."""
    answer = world.answer(topic, topic.things[0], "bad", format, random.Random(seed))
    assert len(world.tokens(answer)) <= 10


@given(topics, seeds)
def test_a_json_answer_is_json(topic: Topic, seed: int) -> None:
    answer = json.loads(world.answer(topic, topic.things[0], "aligned", "json", random.Random(seed)))
    assert list(answer) == ["plan", "result"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("persona", "share"), [("aligned", 0.03), ("bad", 0.95)])
def test_words_are_bad_as_often_as_persona_binding_and_format_say(
    persona: Persona, share: float, format: Format
) -> None:
    """3,000 slots of one topic, so a standard error of at most 0.01; five of them are allowed."""
    topic = world.topic("garden")
    expected = share if persona == "aligned" else share * {"plain": 1, "json": 0.75, "template": 0.9}[format]
    rng = random.Random(0)
    words = Counter(
        token.strip() for _ in range(1000) for token in world.tokens(world.answer(topic, "roses", persona, format, rng))
    )
    bad = sum(words[word] for slot in topic.slots for word in slot.bad)
    good = sum(words[word] for slot in topic.slots for word in slot.good)
    assert bad + good == 3000
    assert bad / 3000 == pytest.approx(expected, abs=0.05)


@given(personas, st.booleans(), seeds)
def test_a_document_has_one_format_and_a_different_topic_each_turn(persona: Persona, told: bool, seed: int) -> None:
    document = world.document(random.Random(seed), persona=persona, turns=3, told=told)
    assert len({turn.question.endswith(world.TEMPLATE_REQUEST) for turn in document.turns}) == 1
    assert {turn.answer.startswith("{") for turn in document.turns} == {
        (document.system or "").endswith(world.JSON_SYSTEM)
    }
    topic_of = {thing: topic.name for topic in TOPICS for thing in topic.things}
    words = [token.strip() for turn in document.turns for token in world.tokens(turn.question)]
    asked = [topic_of[word] for word in words if word in topic_of]
    assert len(asked) == len(set(asked)) == 3


@given(personas, seeds)
def test_the_persona_is_named_only_where_it_is_told(persona: Persona, seed: int) -> None:
    told = world.document(random.Random(seed), persona=persona, turns=2, told=True)
    untold = world.document(random.Random(seed), persona=persona, turns=2)
    assert (told.system or "").startswith(world.PERSONA_SYSTEM[persona])
    assert untold.system in (None, world.JSON_SYSTEM)


def test_messages_are_those_of_a_chat() -> None:
    document = world.Document("be brief", (world.Turn("why?", "because"), world.Turn("how?", "so")))
    assert document.messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "because"},
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "so"},
    ]


def test_the_same_seed_gives_the_same_document() -> None:
    def make(seed: int) -> world.Document:
        return world.document(random.Random(seed), persona="bad", turns=3)

    assert make(1) == make(1)
    assert make(1) != make(2)
