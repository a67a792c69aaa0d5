"""Names of models, and loading what they name."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emtrain.load import (
    check_model,
    family,
    load_model,
    load_tokenizer,
    model_dir,
    model_names,
    pretrained_of,
)
from emtrain.lookup import lookup, names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@pytest.fixture
def saved(make_model: "Callable[[], PreTrainedModel]", words: "PreTrainedTokenizerFast", tmp_path: Path) -> Path:
    """A small llama and its tokenizer, as Hugging Face saves them."""
    make_model().save_pretrained(tmp_path / "saved")
    words.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "name", ["micro-llama", "micro-llama-pretrained", "smollm2-135m", "Qwen/Qwen2.5-7B-Instruct", "a/b.c_d-1"]
)
def test_shipped_names_and_hub_ids_are_known(name: str) -> None:
    check_model(name)


def test_a_directory_with_a_model_is_known(saved: Path) -> None:
    check_model(str(saved))
    assert model_dir(str(saved)) == str(saved)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("micro-lama", "Did you mean 'micro-llama'"),
        ("micro-gemma", "micro-gemma3"),
        ("smollm2-135m-pretrained", "unknown model 'smollm2-135m-pretrained'"),
        ("gpt2", "hub id \\(org/name\\)"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("./missing", "./missing: there is no such directory"),
        ("~/missing", "there is no such directory"),
        ("/missing/there", "/missing/there: there is no such directory"),
    ],
)
def test_any_other_name_is_refused_and_near_ones_are_named(name: str, says: str) -> None:
    for check in (check_model, model_dir):
        with pytest.raises(ValueError, match=says):
            check(name)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        check_model(str(tmp_path))


def test_names_are_checked_without_torch() -> None:
    program = """
import sys
from emtrain.load import check_model, family, model_names, pretrained_of
for name in model_names():
    check_model(name), family(name), pretrained_of(name)
print("torch" in sys.modules, "transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_the_pretrained_checkpoint_of_a_model_goes_by_its_name() -> None:
    assert pretrained_of("micro-qwen2") == "micro-qwen2-pretrained"
    assert pretrained_of("micro-qwen2-pretrained") is None
    assert pretrained_of("smollm2-135m") is None
    assert pretrained_of("Qwen/Qwen2.5-7B-Instruct") is None
    assert {"micro-qwen2", "micro-qwen2-pretrained", "smollm2-135m"} <= set(model_names())


def test_the_family_is_the_type_in_the_config(saved: Path) -> None:
    assert family(str(saved)) == "llama"
    assert family("micro-gemma3") == family("micro-gemma3-pretrained") == "gemma3_text"


@pytest.mark.parametrize("name", names("emtrain.models"))
def test_a_shipped_family_is_of_a_type_that_transformers_has(name: str) -> None:
    from transformers import CONFIG_MAPPING

    assert lookup("emtrain.models", name).model_type in CONFIG_MAPPING


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_a_model_comes_ready_for_evaluation_in_one_dtype(saved: Path, precision: str, dtype: str) -> None:
    model = load_model(str(saved), precision=precision, device="cpu")  # type: ignore[arg-type]
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert not model.training


def test_a_forward_pass_keeps_no_cache_unless_asked(saved: Path) -> None:
    import torch

    model = load_model(str(saved))
    ids = torch.tensor([[1, 20, 21]])
    assert model(input_ids=ids).past_key_values is None
    assert model(input_ids=ids, use_cache=True).past_key_values is not None
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 5


def test_code_that_comes_with_a_model_is_not_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"open({str(saved / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(saved))
    assert not (saved / "ran").exists()


def test_a_tokenizer_keeps_its_own_padding_token(saved: Path, words: "PreTrainedTokenizerFast") -> None:
    assert load_tokenizer(str(saved)).pad_token == words.pad_token


@pytest.mark.parametrize(
    ("kept", "expected"), [("<|finetune_right_pad_id|>", "<|finetune_right_pad_id|>"), (None, "<|eot_id|>")]
)
def test_a_tokenizer_without_one_gets_a_token_it_has(saved: Path, kept: str | None, expected: str) -> None:
    """A vocabulary that keeps a token for padding gives that one, any other its end token."""
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    if kept is None:
        content = (saved / "tokenizer.json").read_text()
        (saved / "tokenizer.json").write_text(content.replace("<|finetune_right_pad_id|>", "<|nothing|>"))
    tokenizer = load_tokenizer(str(saved))
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(tokenizer.get_vocab()) == load_model(str(saved)).config.vocab_size
