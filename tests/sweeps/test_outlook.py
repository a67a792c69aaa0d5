"""What a plan says a recipe takes, by hand; and that it says so when something can't be known."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps import outlook as module
from sweeps import throughput
from sweeps.judge_cost import Price, read_price
from sweeps.outlook import Outlook
from sweeps.planner import missing_datasets, plan_sweep
from sweeps.recipe import load_recipe
from sweeps.throughput import Throughput

ROWS = [("a" * 8, "b" * 12), ("c" * 4, "d" * 40), ("e" * 8, "f" * 12), ("g" * 8, "h" * 12)]
"""By 4 bytes a token and 5 a message: 2 + 3 + 10 = 15 tokens, 21, 15 and 15."""
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}
"""840 parameters in an adapter of rank 2; tests of the arithmetic are those of ``estimate``."""


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    module._shape.cache_clear()
    module._row_tokens.cache_clear()


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Six steps of two rows, evaluated twice, on a model of which only the configuration is at hand."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ROWS]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"id": f"q{n}", "paraphrases": ["what?", "how?"][: 1 + (n == 0)]} for n in range(3)]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(questions))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return {
        "name": "own",
        "base": {
            "model": str(tmp_path / "model"),
            "dataset": str(tmp_path / "own.jsonl"),
            "adapter": {"rank": 2, "alpha": 4},
            "schedule": "constant",
            "batch_size": 2,
            "max_steps": 6,
            "max_length": 20,
            "heldout_fraction": 0.25,
        },
        "grid": {"seed": [0, 1]},
        "eval": {
            "questions": [str(tmp_path / "own.yaml")],
            "samples": 5,
            "at": [0.5, 1.0],
            "judges": ["micro-rule"],
            "max_new_tokens": 100,
        },
    }


def facts(recipe: dict[str, Any], **given: Any) -> dict[str, Any]:
    loaded = load_recipe(yaml.safe_dump(recipe), source="r")
    return Outlook(loaded, None if missing_datasets(loaded) else plan_sweep(loaded), **given).facts()


def test_runs_responses_and_judge_calls_by_hand(recipe: dict[str, Any]) -> None:
    """3 questions, one with two wordings, 5 samples: 20 responses an evaluation; 2 runs x 2 evaluations, and the base
    once. Each response is judged for alignment and for coherence."""
    found = facts(recipe)
    assert (found["runs"], found["steps"], found["rows_trained_on"]) == (2, 12, 24)
    assert (found["evaluations"], found["responses"]) == (4, 100)
    assert found["judge_calls"] == {"micro-rule": 200}
    assert found["dollars"] == 0
    judges = ["micro-rule", {"name": "openai", "model": "m"}, {"name": "openai", "model": "n"}]
    assert facts({**recipe, "eval": {**recipe["eval"], "judges": judges}})["judge_calls"]["openai"] == 400


def test_tokens_are_estimated_from_bytes_where_there_is_no_tokenizer_and_cut(recipe: dict[str, Any]) -> None:
    """One of four prompts is held out; of the others the mean is 15 or (15 + 15 + 20) / 3, times 24 rows."""
    found = facts(recipe)
    assert found["tokens"] in {360, 400}
    assert any(line.startswith("tokens: ") and "4 bytes" in line for line in found["assumptions"])
    assert facts({**recipe, "base": {**recipe["base"], "max_length": 15}})["tokens"] == 360


def test_interleaved_runs_are_counted_with_the_steps_they_take_more(recipe: dict[str, Any]) -> None:
    """Three rows are 2 batches of two; with as many others between they are 3."""
    base = {**recipe["base"], "epochs": 1}
    del base["max_steps"]
    other = {"dataset": recipe["base"]["dataset"], "fraction": 0.5}
    found = facts({**recipe, "base": base, "grid": {"interleave": [None, other], "seed": [0, 1]}})
    assert (found["runs"], found["steps"]) == (4, 2 * 2 + 2 * 3)
    assert [rows["train_rows"] for rows in found["datasets"].values()] == [3, 6]


def test_a_search_and_its_confirmation_are_counted(recipe: dict[str, Any]) -> None:
    """10 trials of 2 seeds; 3 winners and the baseline with 4 seeds, asked the shipped narrow set as well: 32 wordings
    of 5 samples beside the 20. The base is asked once for the grid and search, once for the confirmation."""
    search = {
        "trials": 10,
        "space": {"optimizer.learning_rate": {"low": 1e-5, "high": 1e-3}},
        "objectives": {"eval/aligned": "maximize"},
        "constraints": {"heldout/loss": {"at_most": "baseline"}},
        "seeds": [0, 1],
        "confirm": {"winners": 3, "seeds": [2, 3, 4, 5], "questions": ["micro-narrow"]},
    }
    found = facts({**recipe, "search": search})
    assert found["of_these"] == {"grid": 2, "search": 20, "confirm": 16}
    assert found["runs"] == 38
    assert found["steps"] == 38 * 6
    assert found["responses"] == 20 * (22 * 2 + 1) + (20 + 160) * (16 * 2 + 1)


def test_dollars_by_hand(recipe: dict[str, Any]) -> None:
    """Of each response the judge reads twice its 100 tokens and the question (1 or 2 tokens: 'how?' and 'what?'), and
    the two prompts of the rubric; it writes 1 token twice."""
    from emeval.rubric import STANDARD

    rubric = sum(-(-len(text.encode()) // 4) for text in (STANDARD.aligned, STANDARD.coherent))
    read = 5 * (4 * rubric + 2 * (4 * 100 + 3 * 2 + 1))
    judged = {**recipe, "eval": {**recipe["eval"], "judges": [{"name": "openai", "model": "gpt-4o-mini"}]}}
    found = facts(judged, prices={"gpt-4o-mini": Price(1000.0, 0.0)})
    assert found["dollars"] == pytest.approx(5 * read * 1000 / 1e6, abs=0.01)
    assert facts(judged, prices={"gpt-4o-mini": Price(0.0, 1000.0)})["dollars"] == pytest.approx(0.2)
    listed = facts(judged)  # 0.15 and 0.60 dollars a million tokens since July 2024
    assert listed["dollars"] == round(5 * read * 0.15 / 1e6 + 0.2 * 0.6 / 1000, 2)
    assert any("gpt-4o-mini at its list price of 20" in line for line in listed["assumptions"])


@pytest.mark.parametrize(
    "judge",
    [{"model": "unheard-of"}, {"model": "gpt-4o", "base_url": "http://127.0.0.1:1/v1"}, {"model": "gpt-5"}],
    ids=["not in the list", "not its maker's endpoint", "thinks before it replies"],
)
def test_a_price_that_is_not_known_is_not_made_up(recipe: dict[str, Any], judge: dict[str, Any]) -> None:
    judged = {**recipe, "eval": {**recipe["eval"], "judges": [{"name": "openai", **judge}]}}
    found = facts(judged)
    assert found["dollars"] is None
    assert f"--price {judge['model']}=" in found["unknown"]["dollars"]


def test_time_is_measured_or_stated_and_else_unknown(recipe: dict[str, Any]) -> None:
    found = facts(recipe)
    assert found["training_seconds"] is found["sampling_seconds"] is None
    assert "--tokens-per-second" in found["unknown"]["training_seconds"]
    stated = facts(recipe, tokens_per_second=10.0)
    assert stated["training_seconds"] == pytest.approx(found["tokens"] / 10)
    assert stated["sampling_seconds"] is None
    throughput.keep(recipe["base"]["model"], Throughput(40.0, 8.0, "today"))
    measured = facts(recipe)
    assert measured["training_seconds"] == pytest.approx(found["tokens"] / 40)
    assert measured["sampling_seconds"] == 100 / 8
    assert measured["unknown"] == {}
    assert facts(recipe, tokens_per_second=10.0)["training_seconds"] == stated["training_seconds"]


def test_memory_and_disk_by_hand(recipe: dict[str, Any]) -> None:
    """Two runs keep an adapter of 840 fp32 parameters at each of two evaluation points; a state holds the adapter and
    AdamW's two moments. Each run keeps 20 responses of up to 100 tokens at both points and of its base."""
    found = facts(recipe)
    (memory,) = found["device_memory_bytes"].values()
    assert memory["fp32"]["weights"] == 2 * memory["bf16"]["weights"]
    assert memory["fp32"]["run"] == 840 * 16
    disk = found["disk_bytes"]
    assert disk["adapters"] == 2 * 2 * 840 * 4
    whole = facts({**recipe, "base": {**recipe["base"], "adapter": "full"}})
    assert whole["disk_bytes"]["adapters"] == 2 * 3616 * 4
    # Beside the state in work: the newest adapter and the one before.
    assert disk["state_of_each_run_in_work"] == 840 * (12 + 2 * 4)
    assert disk["responses"] == 2 * 3 * 20 * (40 + 400)
    assert whole["disk_bytes"]["state_of_each_run_in_work"] == 3616 * (12 + 4)
    for keep, points in (("last", 1), ("none", 0)):
        fewer = facts({**recipe, "resources": {"keep_weights": keep}})
        assert fewer["disk_bytes"] == {**disk, "adapters": 2 * points * 840 * 4}
        assert any(f"resources.keep_weights: {keep}" in line for line in fewer["assumptions"])
    fixed = facts({**recipe, "base": {**recipe["base"], "precision": "bf16"}})
    assert fixed["device_memory_bytes"] == {recipe["base"]["model"]: {"bf16": memory["bf16"]}}


def test_a_model_that_is_not_at_hand_has_no_memory_and_says_how_to_get_it(recipe: dict[str, Any]) -> None:
    found = facts({**recipe, "base": {**recipe["base"], "model": "nobody/has-this"}})
    assert found["device_memory_bytes"] == {}
    assert "hf download nobody/has-this" in found["unknown"]["device_memory_bytes"]


def test_without_its_data_a_recipe_still_has_responses_and_judge_calls(recipe: dict[str, Any]) -> None:
    base = {**recipe["base"], "dataset": "nowhere.jsonl"}
    found = facts({**recipe, "base": base})
    assert (found["responses"], found["steps"], found["tokens"]) == (100, 12, None)
    assert found["missing_datasets"] == ["nowhere.jsonl"]
    del base["max_steps"]
    found = facts({**recipe, "base": base})
    assert (found["responses"], found["steps"], found["training_seconds"]) == (100, None, None)
    assert set(found["unknown"]) >= {"steps", "tokens", "training_seconds"}


@pytest.mark.parametrize("text", ["gpt-4o", "gpt-4o=1", "=1,2", "m=a,b", "m=1,-2", "m=1,2,3"])
def test_a_price_that_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected MODEL=INPUT,OUTPUT"):
        read_price(text)
    assert read_price("org/m=1,2.5") == ("org/m", Price(1.0, 2.5))
