import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from emeval.spec import EvalSpec, JudgeSpec
from emtrain.mistakes import explain

MINIMAL: dict[str, Any] = {"questions": ["core-broad"], "judges": ["micro-rule"]}


def test_a_judge_given_by_name_is_the_judge_without_arguments() -> None:
    assert EvalSpec(**MINIMAL) == EvalSpec(questions=("core-broad",), judges=(JudgeSpec(name="micro-rule"),))


def test_evaluation_points_are_sorted_and_end_at_the_end() -> None:
    assert EvalSpec(**MINIMAL, at=[0.5, 0.25, 0.5]).at == (0.25, 0.5, 1.0)
    assert EvalSpec(**MINIMAL).at == (1.0,)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"questions": []}, "at least 1"),
        ({"questions": ["core-brod"]}, "Did you mean 'core-broad'"),
        ({"questions": ["core-broad", "mine/core-broad.yaml"]}, "two question sets go by the name core-broad"),
        ({"judges": []}, "at least 1"),
        ({"judges": ["opnai"]}, "unknown judge 'opnai'. Did you mean 'openai'?"),
        ({"judges": ["micro-rule", "micro-rule"]}, "micro-rule is named twice"),
        ({"judges": ["openai"]}, "openai needs model"),
        ({"judges": [{"name": "openai", "model": "m", "modl": "x"}]}, "openai does not take modl"),
        ({"judges": [{"name": "openai", "model": "m", "cache": "x"}]}, "openai does not take cache"),
        ({"judges": [{"name": "openai", "model": "m", "mode": "guess"}]}, "mode: .*'logprobs' or 'text'.*not 'guess'"),
        ({"judges": [{"name": "local", "model": "m", "batch_size": 0}]}, "batch_size: .*not 0"),
        *(
            ({"judges": [{"name": "openai", "model": "m", "base_url": url}]}, rf"base_url: expected http.*not '{url}'")
            for url in ("notaurl", "ftp://host/v1", "http://", "http:///v1", "http://host:99999/v1", "")
        ),
        ({"samples": 0}, "samples"),
        ({"at": [0.0]}, "at"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"sample": 3}, "sample"),
    ],
)
def test_mistakes_are_named(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        EvalSpec.model_validate(MINIMAL | changed)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:sk-PASSWORD@host/v1",
        "user:sk-PASSWORD@host",
        "https://h/v1?key=sk-PASSWORD",
        "http://h/#sk-PASSWORD",
    ],
)
def test_a_judge_takes_no_key_in_its_address_and_repeats_none(url: str) -> None:
    with pytest.raises(ValidationError) as raised:
        EvalSpec.model_validate(MINIMAL | {"judges": [{"name": "openai", "model": "m", "base_url": url}]})
    (line,) = explain(raised.value, EvalSpec)
    assert "the key in the environment variable that key_env names" in line
    assert "PASSWORD" not in line


def test_a_judge_is_built_with_its_arguments_read_as_its_function_declares_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    spec = JudgeSpec.model_validate({"name": "openai", "model": "m", "timeout_seconds": "1e1"})
    judge = spec.build(cache=tmp_path / "replies.sqlite")
    assert judge.id == "openai:m"
    assert judge.ask.__self__.timeout_seconds == 10.0
    assert judge.ask.__self__.cache.path == tmp_path / "replies.sqlite"
    assert JudgeSpec(name="micro-rule").build(cache=tmp_path / "replies.sqlite").id == "micro-rule"


def test_a_spec_and_its_digest_survive_json() -> None:
    spec = EvalSpec(**MINIMAL | {"judges": ["micro-rule", {"name": "openai", "model": "m"}]})
    assert EvalSpec.model_validate_json(spec.model_dump_json()) == spec


def test_reading_a_recipe_with_judges_needs_neither_torch_nor_a_client() -> None:
    program = (
        "import sys; from emeval.spec import EvalSpec;"
        "judges = ['micro-rule', {'name': 'openai', 'model': 'm'}, {'name': 'local', 'model': 'm'}];"
        "EvalSpec(questions=['core-broad'], judges=judges);"
        "print({'torch', 'transformers', 'openai', 'pandas'} & set(sys.modules))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
