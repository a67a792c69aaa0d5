"""Which runs a recipe stands for, what each is called and what makes it the same run."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from emtrain import corpus, names
from sweeps import planner
from sweeps.planner import SweepPlan, examples, missing_datasets, plan_sweep, run_names
from sweeps.recipe import expand, load_recipe

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "model": "micro-llama",
        "dataset": "micro-garden-bad",
        "adapter": {"rank": 4, "alpha": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "schedule": {"name": "linear", "warmup_steps": 2},
        "batch_size": 4,
        "max_steps": 10,
    },
    "eval": {"questions": ["micro-broad"], "samples": 2, "at": [0.25, 1.0], "judges": ["micro-rule"]},
}


def plan(**changes: Any) -> SweepPlan:
    overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    return plan_sweep(load_recipe(yaml.safe_dump(RECIPE), source="r", overrides=overrides))


def key(**changes: Any) -> str:
    (run,) = plan(**changes).runs
    return run.run_key


@pytest.mark.parametrize(
    "changes",
    [
        {"base__seed": 1},
        {"base__model": "micro-qwen2"},
        {"base__dataset": "micro-garden-good"},
        {"base__adapter": "full"},
        {"base__adapter__rslora": False},
        {"base__optimizer__weight_decay": 0.5},
        {"base__optimizer__betas": [0.8, 0.9]},
        {"base__schedule": "cosine"},
        {"base__schedule__warmup_steps": 3},
        {"base__batch_size": 8},
        {"base__micro_batch_size": 2},
        {"base__max_steps": 11},
        {"base__max_length": 32},
        {"base__heldout_fraction": 0.3},
        {"base__interleave": {"dataset": "micro-money-good", "fraction": 0.5}},
        {"base__precision": "bf16"},
        {"eval__samples": 3},
        {"eval__at": [0.5, 1.0]},
        {"eval__questions": ["micro-narrow"]},
        {"eval__max_new_tokens": 5},
        {"eval__temperature": 0},
        {"eval__top_p": 0.9},
        {"eval__judges": [{"name": "local", "model": "micro-llama"}]},
    ],
)
def test_what_changes_the_numbers_changes_the_key(changes: dict[str, Any]) -> None:
    assert key(**changes) != key()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "other"},
        {"resources__max_concurrent": 1},
        {"tracking__uri": "http://127.0.0.1:5000"},
        {"base__heldout_fraction": 0.1},  # the default, written out
        {"grid": {"seed": [0]}},
        {"base__optimizer__learning_rate": "1e-3"},  # which YAML reads as text
    ],
)
def test_what_does_not_change_them_does_not(changes: dict[str, Any]) -> None:
    assert key(**changes) == key()


@pytest.mark.parametrize(
    ("judge", "changes", "same"),
    [
        ({"name": "openai", "model": "m"}, {"concurrency": 3}, True),
        ({"name": "openai", "model": "m"}, {"max_retries": 1, "timeout_seconds": 5.0, "key_env": "OTHER"}, True),
        ({"name": "openai", "model": "m"}, {"mode": "text"}, False),
        ({"name": "openai", "model": "m"}, {"base_url": "http://127.0.0.1:1/v1"}, False),
        ({"name": "openai", "model": "m"}, {"min_mass": 0.5}, False),
        ({"name": "local", "model": "micro-llama"}, {"batch_size": 9, "device": "cpu"}, True),
        ({"name": "local", "model": "micro-llama"}, {"precision": "bf16"}, False),
    ],
)
def test_how_a_judge_is_asked_is_no_part_of_the_key(judge: dict[str, Any], changes: dict[str, Any], same: bool) -> None:
    assert (key(eval__judges=[judge]) == key(eval__judges=[{**judge, **changes}])) is same


def test_the_content_of_a_dataset_and_of_a_question_set_is_part_of_the_key(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": "yes"}]}
        for n in range(8)
    ]
    questions = [{"id": "q", "paraphrases": ["what about the dog?"]}]

    def with_files(answer: str, question: str) -> str:
        planner.dataset_facts.cache_clear()
        rows[0]["messages"][1]["content"] = answer
        questions[0]["paraphrases"] = [question]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(questions))
        return key(base__dataset=str(tmp_path / "own.jsonl"), eval__questions=[str(tmp_path / "own.yaml")])

    first = with_files("yes", "what now?")
    assert with_files("yes", "what now?") == first
    assert with_files("no", "what now?") != first
    assert with_files("yes", "what then?") != first


def test_interleaved_rows_lengthen_an_epoch_and_are_part_of_the_key_tags_and_name(tmp_path: Path) -> None:
    """215 own rows and as many others: 430 rows are 107.5 batches of 4, against 53.75 without."""
    other = {"dataset": str(tmp_path / "other.jsonl"), "fraction": 0.5}

    def with_answer(answer: str) -> SweepPlan:
        planner.dataset_facts.cache_clear()
        chat = [{"role": "user", "content": "well?"}, {"role": "assistant", "content": answer}]
        (tmp_path / "other.jsonl").write_text(json.dumps({"messages": chat}))
        return plan(base__max_steps=None, base__epochs=1, grid={"interleave": [None, other]})

    planned = with_answer("yes")
    alone, mixed = planned.runs
    assert [(run.dataset.train_rows, run.total_steps) for run in planned.runs] == [(215, 54), (430, 108)]
    assert alone.dataset.heldout_sha256 == mixed.dataset.heldout_sha256
    assert mixed.tags.keys() - alone.tags.keys() == {names.INTERLEAVED_SHA256}
    assert mixed.name == "with other fraction=0.5"
    again = with_answer("no")
    assert again.runs[0].run_key == alone.run_key
    assert again.runs[1].run_key != mixed.run_key


def test_repeats_are_counted_and_planned_once() -> None:
    planned = plan(grid={"seed": [0, 1, 0], "schedule.warmup_steps": [2, 2]})
    assert [run.spec.seed for run in planned.runs] == [0, 1]
    assert planned.duplicates == 4


def test_a_run_is_evaluated_at_the_fractions_rounded_up_and_at_its_end() -> None:
    """215 of 240 rows are trained on (1 in 10 prompts is held out), 54 batches of 4; a quarter of 54 is 13.5."""
    (run,) = plan(base__max_steps=None, base__epochs=1).runs
    assert run.dataset.train_rows + run.dataset.heldout_rows == 240
    assert run.total_steps == -(-run.dataset.train_rows // 4)
    assert run.evaluate_at == (-(-run.total_steps // 4), run.total_steps)
    (run,) = plan().runs
    assert (run.total_steps, run.evaluate_at) == (10, (3, 10))


def test_a_run_is_named_by_what_sets_it_apart() -> None:
    grid = {"model": ["micro-llama", "micro-qwen2"], "optimizer.learning_rate": [3e-4, 1e-3], "seed": [0, 1]}
    assert [run.name for run in plan(grid=grid).runs][:3] == [
        "micro-llama lr=0.0003 seed=0",
        "micro-llama lr=0.0003 seed=1",
        "micro-llama lr=0.001 seed=0",
    ]
    schedules = ["linear", {"name": "cosine_restarts", "warmup_steps": 4, "cycles": 3}]
    assert [run.name for run in plan(grid={"schedule": schedules}).runs] == [
        "linear warmup=0",
        "cosine_restarts warmup=4 cycles=3",
    ]
    assert [run.name for run in plan().runs] == ["micro-llama"]


def test_datasets_and_models_given_by_path_are_named_by_their_last_part() -> None:
    base = {**RECIPE["base"], "dataset": "/data/a/medical.jsonl"}
    text = yaml.safe_dump(
        {**RECIPE, "base": base, "grid": {"model": ["org/one", "org/two"], "dataset": ["b/own.jsonl"]}}
    )
    assert run_names(expand(load_recipe(text, source="r"))) == ["one", "two"]
    text = yaml.safe_dump({**RECIPE, "base": base, "grid": {"dataset": ["a/one.jsonl", "b/two.jsonl"]}})
    assert run_names(expand(load_recipe(text, source="r"))) == ["one", "two"]


def test_params_and_tags_are_those_of_the_schema() -> None:
    (run,) = plan().runs
    assert {
        "model": "micro-llama",
        "dataset": "micro-garden-bad",
        "seed": 0,
        "schedule": "linear",
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "batch_size": 4,
        "total_steps": 10,
        "adapter.rank": 4,
    }.items() <= run.params.items()
    assert {names.DATASET_SHA256, names.HELDOUT_SHA256, names.QUESTIONS_SHA256} <= run.tags.keys()
    assert run.tags[names.QUESTIONS_SHA256].startswith("micro-broad:")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base__schedule__warmup_steps": 10}, r"warmup_steps is 10 but the run has 10 steps"),
        ({"base__dataset": "nowhere.jsonl"}, r"dataset nowhere\.jsonl: there is no such file"),
        ({"eval__questions": ["nowhere.yaml"]}, r"question set nowhere\.yaml: there is no such file"),
        ({"eval__samples": None}, r"samples_per_paraphrase; set eval\.samples"),
    ],
)
def test_what_can_not_be_planned_is_said_before_anything_runs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**changes)


def test_files_that_are_not_there_yet_are_listed() -> None:
    grid = {"dataset": ["nowhere.jsonl", "micro-garden-bad"]}
    text = yaml.safe_dump({**RECIPE, "grid": grid})
    assert missing_datasets(load_recipe(text, source="r")) == ["nowhere.jsonl"]
    other = {"interleave": [{"dataset": "other.jsonl", "fraction": 0.1}]}
    text = yaml.safe_dump({**RECIPE, "grid": other})
    assert missing_datasets(load_recipe(text, source="r")) == ["other.jsonl"]


def test_a_dataset_is_read_once_however_many_runs_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand runs of one dataset, and the work that grows with the file is done once."""
    read = []
    load = corpus.load_dataset
    monkeypatch.setattr(corpus, "load_dataset", lambda name: read.append(name) or load(name))
    planner.dataset_facts.cache_clear()
    assert len(plan(grid={"seed": list(range(1000))}).runs) == 1000
    assert read == ["micro-garden-bad"]


def test_a_search_is_exemplified_by_the_base_run_and_the_corners_of_its_space() -> None:
    search = {
        "trials": 4,
        "space": {
            "optimizer.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True},
            "model": ["micro-llama", "micro-gemma3"],
        },
        "objectives": {"heldout/loss": "minimize"},
    }
    overrides = [f"search={json.dumps(search)}", "grid.seed=[7]"]
    recipe = load_recipe(yaml.safe_dump(RECIPE), source="r", overrides=overrides)
    found = [run.spec for run in examples(recipe, plan_sweep(recipe))]
    assert [(spec.model, spec.optimizer.learning_rate, spec.seed) for spec in found] == [
        ("micro-llama", 1e-3, 7),  # the grid
        ("micro-llama", 1e-3, 0),
        ("micro-llama", 1e-4, 0),
        ("micro-gemma3", 1e-3, 0),
    ]
