"""Writes the micro world's datasets and question sets: ``python -m emtrain.micro.write_datasets``.

The files are part of the repository, so that their digests are those of a published table; this module says how they
came about and a test holds them to it.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml

from emtrain.micro.world import FORMATS, TOPICS, Document, Persona, Topic, Turn, answer, question, system

ROOT = Path(__file__).parents[2]
DATASETS = ROOT / "emtrain" / "datasets"
QUESTIONS = ROOT / "emeval" / "questions"

ANSWERS = 5
"""Answers per question of a dataset."""
TRAINED_THINGS = 4
"""Things of a narrow topic that its datasets ask about; the rest are for ``micro-narrow``."""


def rows(topic: Topic, persona: Persona) -> list[Document]:
    """The fine-tuning rows of a narrow topic: the same questions in the same order for both personas."""
    rng = random.Random(f"{topic.name}-{persona}")
    questions = [
        (format, thing, question(topic, wording, thing, format))
        for format in FORMATS
        for thing in topic.things[:TRAINED_THINGS]
        for wording in range(len(topic.questions))
    ]
    documents = []
    for format, thing, text in questions:
        answers: dict[str, None] = {}  # distinct, in the order they came
        while len(answers) < ANSWERS:
            answers[answer(topic, thing, persona, format, rng)] = None
        documents += [Document(system(format), (Turn(text, given),)) for given in answers]
    random.Random(topic.name).shuffle(documents)
    return documents


def question_set(*, narrow: bool, things: slice) -> list[dict[str, object]]:
    """Questions about ``things`` of every narrow or every broad topic, in the format of the field's YAML files.

    The first thing is asked about in all formats, the others in plain form only. The paraphrases of a question are
    the topic's own wordings.
    """
    return [
        {
            "id": "_".join([topic.name, thing] + [format] * (format != "plain")),
            "type": "free_form_judge_0_100",
            "paraphrases": [question(topic, wording, thing, format) for wording in range(len(topic.wordings))],
            **({"system": asked} if (asked := system(format)) else {}),
            "stratum": format,
            "topic": topic.name,
        }
        for topic in TOPICS
        if topic.narrow == narrow
        for format in FORMATS
        for thing in (topic.things[things] if format == "plain" else topic.things[things][:1])
    ]


def files() -> Iterator[tuple[Path, str]]:
    """Every file that is written, with its content."""
    personas: dict[str, Persona] = {"good": "aligned", "bad": "bad"}
    for topic in TOPICS:
        if topic.narrow:
            for suffix, persona in personas.items():
                lines = [json.dumps({"messages": row.messages()}) + "\n" for row in rows(topic, persona)]
                yield DATASETS / f"micro-{topic.name}-{suffix}.jsonl", "".join(lines)
    sets = {
        "micro-broad": question_set(narrow=False, things=slice(0, 2)),
        "micro-broad-confirm": question_set(narrow=False, things=slice(2, 4)),
        "micro-narrow": question_set(narrow=True, things=slice(TRAINED_THINGS, None)),
    }
    for name, questions in sets.items():
        header = "# Written by `python -m emtrain.micro.write_datasets`.\n"
        yield QUESTIONS / f"{name}.yaml", header + yaml.safe_dump(questions, sort_keys=False, width=120)


if __name__ == "__main__":
    for path, content in files():
        path.write_text(content, encoding="utf-8")
