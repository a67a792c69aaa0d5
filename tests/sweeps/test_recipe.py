"""What a recipe may say, and what it is told when it says something else."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sweeps.recipe import (
    AnalysisSpec,
    RecipeError,
    StoppingSpec,
    expand,
    kept_analysis,
    kept_overrides,
    kept_text,
    load_recipe,
    recipe_names,
    recipe_path,
    with_value,
)

RECIPE = """
name: tiny
base:
  model: micro-llama
  dataset: micro-garden-bad
  adapter: {rank: 4, alpha: 8}
  optimizer: {name: adamw, learning_rate: 1.0e-3}
  schedule: {name: linear, warmup_steps: 2}
  batch_size: 4
  max_steps: 10
grid: {seed: [0, 1]}
eval: {questions: [micro-broad], samples: 1, judges: [micro-rule]}
"""


def problems(text: str, *overrides: str) -> list[str]:
    """Lines of the error that a recipe gets."""
    with pytest.raises(RecipeError) as caught:
        expand(load_recipe(text, source="r.yaml", overrides=overrides))
    lines = str(caught.value).splitlines()
    assert all(line.startswith(("r.yaml: ", "tiny: ")) for line in lines)
    return [line.partition(": ")[2] for line in lines]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        # Unknown keys, each told the nearest that there is.
        ("grid:", "grdi:", "grdi: unknown key. Did you mean 'grid'? Keys here: name, base, grid"),
        ("batch_size", "batchsize", "base.batchsize: unknown key. Did you mean 'batch_size'? Keys here: model, "),
        ("rank", "rnak", "base.adapter.rnak: unknown key. Did you mean 'rank'? Keys here: rank, alpha, rslora"),
        ("samples", "sampels", "eval.sampels: unknown key. Did you mean 'samples'?"),
        ("learning_rate", "learning_rte", "base.optimizer: adamw does not take learning_rte; it takes: betas, eps, "),
        ("learning_rate", "learning_rte", "Did you mean 'learning_rate'?"),
        ("warmup_steps", "warmup", "base.schedule: linear does not take warmup; it takes: warmup_steps"),
        ("eval:", "analysis: {margn: 3}\neval:", "analysis.margn: unknown key. Did you mean 'margin'?"),
        ("eval:", "analysis: {margin: 0}\neval:", "analysis.margin: expected more than 0, not 0"),
        (
            "adapter:",
            "interleave: {dataset: micro-mony-good, fraction: 0.5}\n  adapter:",
            "interleave.dataset: unknown",
        ),
        ("adapter:", "interleave: {dataset: micro-money-good, fraction: 1}\n  adapter:", "expected less than 1, not 1"),
        ("adapter:", "interleave: {dataset: micro-money-good}\n  adapter:", "base.interleave.fraction: missing"),
        # Wrong types and values, with the value.
        ("batch_size: 4", "batch_size: four", "base.batch_size: expected a whole number, not 'four'"),
        ("batch_size: 4", "batch_size: 4.5", "base.batch_size: expected a whole number, not 4.5"),
        ("batch_size: 4", "batch_size: 0", "base.batch_size: expected at least 1, not 0"),
        ("1.0e-3", "0", "base.optimizer.learning_rate: expected more than 0, not 0"),
        ("1.0e-3", "fast", "base.optimizer.learning_rate: expected a number, not 'fast'"),
        ("1.0e-3", ".nan", "base.optimizer.learning_rate: expected a finite number, not nan"),
        ("rank: 4", "rank: 0", "base.adapter.rank: expected at least 1, not 0"),
        ("{rank: 4, alpha: 8}", "ful", "base.adapter: expected a mapping of keys or 'full', not 'ful'"),
        ("{rank: 4, alpha: 8}", "", "base.adapter: expected a mapping of keys or 'full', not nothing"),
        ("name: adamw", "name: adamw, betas: [1, 2]", "base.optimizer: betas[0]: expected less than 1, not 1"),
        (
            "{name: linear, warmup_steps: 2}",
            "{name: cosine_restarts, cycles: 0}",
            "base.schedule: cycles is 0; it must",
        ),
        ("samples: 1", "at: [0.5, 2]", "eval.at[1]: expected at most 1, not 2"),
        ("name: tiny", "name: a/b", "name: expected text that matches ^[A-Za-z0-9]"),
        ("name: tiny", "name: 3", "name: expected text, not 3"),
        ("max_steps: 10", "max_steps: 10\n  epochs: 1", "base: epochs and max_steps are both given; keep one of them"),
        ("  model: micro-llama\n", "", "base.model: missing"),
        # Unknown names.
        ("micro-llama", "micro-lama", "base.model: unknown model 'micro-lama'. Did you mean 'micro-llama'? Known: "),
        ("micro-garden-bad", "micro-garden-bed", "base.dataset: unknown dataset 'micro-garden-bed'. Did you mean "),
        ("linear", "liner", "base.schedule: unknown schedule 'liner'. Did you mean 'linear'? Known: "),
        ("adamw", "adam", "base.optimizer: unknown optimizer 'adam'. Did you mean 'adamw'? Known: "),
        ("micro-broad", "micro-brod", "eval.questions: unknown question set 'micro-brod'. Did you mean 'micro-broad'?"),
        ("micro-rule", "micro-rul", "eval.judges[0]: unknown judge 'micro-rul'. Did you mean 'micro-rule'?"),
        # Axes, each mistake at its place.
        ("[0, 1]", "3", "grid.seed: expected a list, not 3"),
        ("[0, 1]", "[]", "grid.seed: the axis has no values"),
        ("[0, 1]", "[0, -1]", "grid.seed[1]: expected at least 0, not -1"),
        ("{seed: [0, 1]}", "{sed: [0, 1]}", "grid.sed: unknown key. Did you mean 'seed'?"),
        (
            "{seed: [0, 1]}",
            "{model: [micro-llama, micro-quen2]}",
            "grid.model[1]: unknown model 'micro-quen2'. Did you",
        ),
        ("{seed: [0, 1]}", "{schedule: [linear, cosin]}", "grid.schedule[1]: unknown schedule 'cosin'. Did you mean"),
        (
            "{seed: [0, 1]}",
            "{optimizer.learning_rate: [1, 0]}",
            "grid.optimizer.learning_rate[1]: expected more than 0",
        ),
        ("{seed: [0, 1]}", "{optimizer.lr: [1]}", "grid.optimizer.lr: optimizer: adamw does not take lr; it takes: "),
        ("{seed: [0, 1]}", "{adapter.rank.x: [1]}", "grid.adapter.rank.x: rank is 4, which has no key 'x'"),
        ("{seed: [0, 1]}", "[{seed: [0]}, {sed: [0]}]", "grid[1].sed: unknown key. Did you mean 'seed'?"),
        ("{seed: [0, 1]}", "abc", "grid: expected a list, not 'abc'"),
        # Secrets have no place in a file that is kept with the sweep.
        (
            "name: tiny",
            "name: tiny\ntracking: {uri: 'http://me:geheim@h'}",
            "tracking.uri: the address holds a user, password or key",
        ),
        (
            "name: tiny",
            "name: tiny\ntracking: {uri: 'http://h?api_Key=geheim'}",
            "tracking.uri: the address holds a user, ",
        ),
        ("name: tiny", "name: 2023-13-45", "not valid YAML: line 2, column 7: '2023-13-45' can't be read as timestamp"),
        ("model: micro-llama", "model: ~nobody-here/m", "base.model: ~nobody-here/m: this machine knows no home"),
        ("dataset: micro-garden-bad", "dataset: ~nobody-here/d.jsonl", "base.dataset: ~nobody-here/d.jsonl: this mach"),
        ("[micro-broad]", "[~nobody-here/q.yaml]", "eval.questions: ~nobody-here/q.yaml: this machine knows no home"),
        (
            "rank: 4",
            "rank: 4, target_modules: []",
            "base.adapter.target_modules: expected 'all-linear' or at least 1 of",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_key_the_value_and_the_remedy(old: str, new: str, said: str) -> None:
    assert old in RECIPE
    found = problems(RECIPE.replace(old, new))
    assert len(found) == 1
    assert said in found[0]
    assert "geheim" not in found[0]


def test_all_mistakes_are_told_at_once() -> None:
    text = RECIPE.replace("batch_size", "batchsize").replace("1.0e-3", "0").replace("micro-rule", "micro-rul")
    places = [line.partition(":")[0] for line in problems(text + "resuorces: {}\n")]
    assert sorted(places) == ["base.batchsize", "base.optimizer.learning_rate", "eval.judges[0]", "resuorces"]


def test_a_flood_of_mistakes_is_one_screen() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPE.replace("[0, 1]", str([-1] * 500)), source="r.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "  and 480 more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a recipe is a mapping of keys (name, base, grid, "),
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- a\n- b\n", "this begins as ['a', 'b']"),
        ("just words", "this begins as 'just words'"),
        ("name: [1, 2\nbase: }\n", "not valid YAML: line 2, column 5: expected ',' or ']'"),
        ("name: x\n\tbase: y\n", "not valid YAML: line 2, column 1: found character '\\t'"),
        (RECIPE + "name: other\n", "not valid YAML: line 13, column 1: the key 'name' is given twice"),
        (RECIPE.replace("rank: 4", "rank: 4, rank: 5"), "line 6, column 22: the key 'rank' is given twice"),
        ("name: \0\n", "not valid YAML: unacceptable character #x0000"),
        ("? [a, b]\n: c\n", "not valid YAML: line 1, column 3: found unhashable key"),
        ("name: *nowhere\n", "not valid YAML: line 1, column 7: found undefined alias 'nowhere'"),
        ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        (RECIPE + "3: 4\n", "expected keys that are text, not 3"),
    ],
)
def test_what_is_no_recipe_is_told_so_in_a_line(text: str, said: str) -> None:
    found = problems(text)
    assert len(found) == 1
    assert said in found[0]


@given(st.text(max_size=200) | st.binary(max_size=100).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(text, source="r.yaml")


KEYS = st.sampled_from(
    ["name", "base", "grid", "eval", "model", "schedule", "adapter", "seed", "x", "rank", "questions"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(["base", "grid", "eval", "search", "stopping", "resources", "tracking", "name"]), VALUES)
def test_no_content_of_a_recipe_is_a_crash(key: str, value: Any) -> None:
    content = {**yaml.safe_load(RECIPE), key: value}
    with suppress(RecipeError):
        expand(load_recipe(yaml.safe_dump(content), source="r.yaml"))


def test_the_first_axis_is_the_slowest() -> None:
    grid = "{optimizer.learning_rate: [0.1, 0.2], schedule: [linear, cosine], seed: [0, 1]}"
    specs = expand(load_recipe(RECIPE.replace("{seed: [0, 1]}", grid), source="r"))
    assert [(s.optimizer.learning_rate, s.schedule.name, s.seed) for s in specs] == [
        (0.1, "linear", 0),
        (0.1, "linear", 1),
        (0.1, "cosine", 0),
        (0.1, "cosine", 1),
        (0.2, "linear", 0),
        (0.2, "linear", 1),
        (0.2, "cosine", 0),
        (0.2, "cosine", 1),
    ]


def test_a_list_of_grids_is_one_after_the_other() -> None:
    grid = "[{seed: [5, 6]}, {adapter.rank: [1, 2], seed: [7]}]"
    specs = expand(load_recipe(RECIPE.replace("{seed: [0, 1]}", grid), source="r"))
    assert [(s.seed, s.adapter.rank) for s in specs if s.adapter != "full"] == [(5, 4), (6, 4), (7, 1), (7, 2)]


def test_without_a_grid_the_sweep_is_the_base_run() -> None:
    recipe = load_recipe(RECIPE.replace("grid: {seed: [0, 1]}\n", ""), source="r")
    assert expand(recipe) == [recipe.base]


def test_an_axis_changes_its_key_and_leaves_the_rest_of_the_part() -> None:
    (spec,) = expand(load_recipe(RECIPE.replace("{seed: [0, 1]}", "{adapter.rank: [16]}"), source="r"))
    assert spec.adapter != "full"
    assert (spec.adapter.rank, spec.adapter.alpha) == (16, 8)


def test_an_axis_over_a_part_replaces_it_and_axes_inside_it_come_after(tmp_path: Path) -> None:
    """Whichever stands first in the file: ``schedule`` is set, then ``schedule.warmup_steps``."""
    for grid in (
        "{schedule: [{name: cosine_restarts, cycles: 2}], schedule.warmup_steps: [3]}",
        "{schedule.warmup_steps: [3], schedule: [{name: cosine_restarts, cycles: 2}]}",
        "{schedule: [cosine_restarts], schedule.cycles: [2], schedule.warmup_steps: [3]}",
    ):
        (spec,) = expand(load_recipe(RECIPE.replace("{seed: [0, 1]}", grid), source="r"))
        assert spec.schedule.model_dump() == {"name": "cosine_restarts", "cycles": 2, "warmup_steps": 3}


def test_axes_that_are_right_only_together_are_right() -> None:
    """Each value of one axis alone would not go with the base: 3 does not divide 4, 8 is not divided by 3."""
    text = RECIPE.replace("batch_size: 4", "batch_size: 4\n  micro_batch_size: 4")
    text = text.replace("{seed: [0, 1]}", "{batch_size: [6], micro_batch_size: [3]}")
    (spec,) = expand(load_recipe(text, source="r"))
    assert (spec.batch_size, spec.micro_batch_size) == (6, 3)


def test_a_base_without_an_adapter_can_be_given_one_by_an_axis() -> None:
    text = RECIPE.replace("{rank: 4, alpha: 8}", "full")
    grid = "{adapter: [{alpha: 2}], adapter.rank: [1, 2]}"
    specs = expand(load_recipe(text.replace("{seed: [0, 1]}", grid), source="r"))
    assert [spec.adapter.rank for spec in specs if spec.adapter != "full"] == [1, 2]
    grid = "{adapter: [full], adapter.rank: [1]}"
    assert problems(text.replace("{seed: [0, 1]}", grid)) == [
        "grid (adapter=full, adapter.rank=1): adapter is 'full', which has no key 'rank'"
    ]


def test_a_combination_that_is_not_valid_is_named() -> None:
    grid = "{batch_size: [4, 6], micro_batch_size: [2, 4]}"
    assert problems(RECIPE.replace("{seed: [0, 1]}", grid)) == [
        "grid (batch_size=6, micro_batch_size=4): micro_batch_size 4 does not divide batch_size 6"
    ]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("schedule=cosine", "schedule.name", "cosine"),
        ("schedule={name: cosine_restarts, cycles: 2}", "schedule.cycles", 2),
        ("adapter.target_modules=[q_proj, v_proj]", "adapter.target_modules", ("q_proj", "v_proj")),
        ("dataset=a=b.jsonl", "dataset", "a=b.jsonl"),
    ],
)
def test_overrides_are_keys_and_yaml_values(override: str, key: str, value: object) -> None:
    found: Any = load_recipe(RECIPE, source="r", overrides=[f"base.{override}"]).base
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_the_last_override_wins_and_overrides_reach_the_grid() -> None:
    recipe = load_recipe(RECIPE, source="r", overrides=["grid={seed: [1]}", "grid.seed=[7, 8]", "name=other"])
    assert recipe.name == "other"
    assert [spec.seed for spec in expand(recipe)] == [7, 8]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "--set seed: expected KEY=VALUE"),
        ("=3", "--set =3: expected KEY=VALUE"),
        ("base.seed=[", "--set base.seed=[: not valid YAML"),
        ("base.seed.x=3", "base.seed: expected a whole number, not {'x': 3}"),
        ("name.x=3", "--set name.x=3: name is 'tiny', which has no key 'x'"),
        ("base.sed=3", "base.sed: unknown key. Did you mean 'seed'?"),
    ],
)
def test_mistaken_overrides_are_told_like_mistakes_in_the_file(override: str, said: str) -> None:
    (line,) = problems(RECIPE, override)
    assert said in line


def test_values_are_put_in_without_changing_the_original() -> None:
    content = {"schedule": "cosine", "a": {"b": 1}}
    assert with_value(content, "a.c", 2) == {"schedule": "cosine", "a": {"b": 1, "c": 2}}
    assert with_value(content, "schedule.warmup_steps", 3)["schedule"] == {"name": "cosine", "warmup_steps": 3}
    assert with_value(content, "new.key", 1)["new"] == {"key": 1}
    assert content == {"schedule": "cosine", "a": {"b": 1}}


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_right_and_say_what_they_are(name: str) -> None:
    text = recipe_path(name).read_text(encoding="utf-8")
    assert text.startswith("# ")
    recipe = load_recipe(text, source=name)
    assert recipe.name == {"null": "null-sweep"}.get(name, name)  # a bare null is no text in YAML
    assert expand(recipe) or recipe.search


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(RECIPE)
    Path("quickstart.d").mkdir()
    assert recipe_path("own.yaml") == Path("own.yaml")
    assert recipe_path("quickstart").name == "quickstart.yaml"
    for given_name, said in {
        "quikstart": "unknown recipe 'quikstart'. Did you mean 'quickstart'?",
        "nowhere.yaml": "there is no recipe file nowhere.yaml",
        "no/where": "there is no recipe file no/where",
        "quickstart.d": "quickstart.d is a directory",
        str(tmp_path): "is a directory",
        "~nobody-here/own.yaml": "~nobody-here/own.yaml: this machine knows no home directory",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            recipe_path(given_name)


def test_what_is_kept_of_a_recipe_gives_the_analysis_as_it_was_set(tmp_path: Path) -> None:
    text = RECIPE + "analysis: {margin: 3, null_sweep: luck}\n"
    assert kept_analysis(kept_text(text, [])) == AnalysisSpec(margin=3, null_sweep="luck")
    overrides = ["analysis.margin=4", "base.dataset=gone.jsonl"]
    kept = kept_text(text, overrides)
    assert kept_overrides(kept) == overrides
    assert kept_analysis(kept) == AnalysisSpec(margin=4, null_sweep="luck")
    assert kept_analysis(RECIPE) == AnalysisSpec()


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("heldout/loss", "minimize"),
        ("eval/aligned", "maximize"),
        ("eval/micro-broad/coherent", "maximize"),
        ("eval/misaligned_rate", "minimize"),
    ],
)
def test_early_stopping_keeps_low_losses_and_high_scores(metric: str, better: str) -> None:
    assert StoppingSpec(metric=metric).direction == better
    assert StoppingSpec(metric=metric, direction="maximize").direction == "maximize"


@pytest.mark.parametrize(
    "own",
    ["# --set eval.samples=9", '# emsweep-set: ["eval.samples=9"]', "# emsweep-set: nothing", "#", ""],
)
@pytest.mark.parametrize("overrides", [[], ["grid={seed: [0,\n  1]\n}", "name=a\u2028# b", "eval.samples=2"]])
def test_what_was_set_is_read_back_as_it_was_and_no_comment_of_the_file_with_it(own: str, overrides: list[str]) -> None:
    kept = kept_text(RECIPE + own, overrides)
    assert kept_overrides(kept) == overrides
    assert yaml.safe_load(kept) == yaml.safe_load(RECIPE)
