"""What machines of a sweep start from: a cache stands for a machine, and the data directory is shared by all."""

import shutil
from pathlib import Path

import pytest

from emtrain.rows import SHIPPED
from sweeps import content
from sweeps.content import keep_datasets, pinned, rows_file
from sweeps.planner import PlannedRun, dataset_facts, examples, plan_sweep
from sweeps.recipe import load_recipe

ROWS = (SHIPPED / "micro-garden-bad.jsonl").read_text().splitlines(keepends=True)
COMMIT, OTHER = "1" * 40, "2" * 40


@pytest.fixture
def recipes_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset as the recipe names it, by a path that means something else on every machine."""
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "head"))
    path = tmp_path / "own.jsonl"
    path.write_text("".join(ROWS[:40]))
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    return tmp_path / "shared"


def planned(dataset: Path) -> tuple[PlannedRun, ...]:
    text = f"""
name: study
base: {{model: micro-llama, dataset: "{dataset}", max_steps: 9,
  interleave: {{dataset: micro-money-good, fraction: 0.5}}}}
grid: {{seed: [0, 1]}}
eval: {{questions: [micro-broad], judges: [micro-rule], samples: 1}}
"""
    dataset_facts.cache_clear()
    return plan_sweep(load_recipe(text, source="study.yaml")).runs


def test_a_machine_without_the_file_or_with_another_takes_the_right_one_once(
    recipes_file: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = planned(recipes_file)
    sha256, expected = runs[0].dataset.sha256, recipes_file.read_bytes()
    keep_datasets(runs, shared)
    assert rows_file(str(recipes_file), sha256, shared) == recipes_file
    for node, there in {"lacks it": None, "has another": "".join(ROWS[:41])}.items():
        monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / node))
        recipes_file.unlink(missing_ok=True)
        if there is not None:
            recipes_file.write_text(there)
        used = rows_file(str(recipes_file), sha256, shared)
        assert used.is_relative_to(tmp_path / node)
        assert used.read_bytes() == expected
    shutil.rmtree(shared)
    assert rows_file(str(recipes_file), sha256, shared) == used


def test_every_dataset_of_a_sweep_is_kept_by_its_digest_and_outlives_its_file(recipes_file: Path, shared: Path) -> None:
    runs = planned(recipes_file)
    keep_datasets(runs, shared)
    kept = {path.parent.name: path.read_bytes() for path in shared.rglob("*.jsonl")}
    assert kept == {
        runs[0].dataset.sha256: recipes_file.read_bytes(),
        runs[0].dataset.interleaved_sha256: (SHIPPED / "micro-money-good.jsonl").read_bytes(),
    }
    recipes_file.unlink()
    keep_datasets(runs, shared)  # as after a restart
    assert {path.parent.name: path.read_bytes() for path in shared.rglob("*.jsonl")} == kept


def test_a_file_that_changes_while_a_sweep_starts_is_not_kept_for_another(recipes_file: Path, shared: Path) -> None:
    runs = planned(recipes_file)
    recipes_file.write_text("".join(ROWS[:41]))
    with pytest.raises(ValueError, match=r"own\.jsonl: the file has just been changed"):
        keep_datasets(runs, shared)
    assert runs[0].dataset.sha256 not in {path.parent.name for path in shared.rglob("*.jsonl")}


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_kept_file_that_is_damaged_or_gone_is_not_used(recipes_file: Path, shared: Path, damage: str) -> None:
    runs = planned(recipes_file)
    sha256 = runs[0].dataset.sha256
    keep_datasets(runs, shared)
    (kept,) = shared.rglob(f"{sha256}/*.jsonl")
    kept.write_text(ROWS[0]) if damage == "cut off" else shutil.rmtree(kept.parent)
    recipes_file.unlink()
    with pytest.raises(ValueError, match=rf"neither .*own\.jsonl on .* nor .*{sha256}.* \(sha256 {sha256[:12]}\)"):
        rows_file(str(recipes_file), sha256, shared)


def test_a_search_keeps_what_it_may_propose(recipes_file: Path, shared: Path) -> None:
    text = """
name: study
base: {model: micro-llama, dataset: micro-garden-bad, max_steps: 9}
search:
  trials: 2
  space: {dataset: [micro-garden-bad, DATASET], model: [micro-llama, micro-qwen2]}
  objectives: {heldout/loss: minimize}
eval: {questions: [micro-broad], judges: [micro-rule], samples: 1}
""".replace("DATASET", str(recipes_file))
    recipe = load_recipe(text, source="study.yaml")
    runs = examples(recipe, plan_sweep(recipe))
    keep_datasets(runs, shared)
    assert len(list(shared.rglob("*.jsonl"))) == 2
    assert {run.spec.model for run in runs} == {"micro-llama", "micro-qwen2"}


def test_a_sweep_that_goes_on_stays_at_the_commit_it_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "revision_of", lambda model: OTHER if "/" in model else None)
    assert pinned(["org/a", "org/b", "micro-llama"], {"org/a": COMMIT}) == {
        "org/a": COMMIT, "org/b": OTHER, "micro-llama": None,
    }  # fmt: skip


def test_a_sweep_does_not_go_on_with_a_directory_that_was_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMSWEEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/config.json").write_text("{}")
    model = str(tmp_path / "tuned")
    began = pinned([model], {})
    assert began[model] is not None
    assert pinned([model], {model: began[model]}) == began
    (tmp_path / "tuned/model.safetensors").write_text("new weights")
    with pytest.raises(ValueError, match=r"tuned: runs of this sweep started from other files .*another name"):
        pinned([model], {model: began[model]})
