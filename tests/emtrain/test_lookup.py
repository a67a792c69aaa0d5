"""A folder is the registry."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emtrain.lookup import lookup, names, nearest, source, unknown


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with two parts, one of which breaks when it is imported."""
    package = tmp_path / "folder_of_parts"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "first_part.py").write_text("def first_part(): return 1\n")
    (package / "broken.py").write_text("import no_such_module_at_all\n")
    (package / "notes.txt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield "folder_of_parts"
    for module in [name for name in sys.modules if name.startswith("folder_of_parts")]:
        del sys.modules[module]


def test_a_file_is_a_part_and_nothing_else_is(parts: str) -> None:
    assert names(parts) == ["broken", "first_part"]


def test_a_new_file_is_found_without_a_list_to_edit(parts: str) -> None:
    folder = source(parts, "first_part").parent
    (folder / "second.py").write_text("second = 2\n")
    assert names(parts) == ["broken", "first_part", "second"]
    assert lookup(parts, "second") == 2


def test_listing_imports_no_part(parts: str) -> None:
    names(parts)
    assert not any(name.startswith(f"{parts}.") for name in sys.modules)


def test_a_part_is_what_its_file_is_named_after(parts: str) -> None:
    assert lookup(parts, "first_part")() == 1


def test_an_unknown_name_is_told_by_the_nearest_one(parts: str) -> None:
    with pytest.raises(ValueError, match=r"unknown folder_of_part 'frist_part'\. Did you mean 'first_part'\? Known: "):
        lookup(parts, "frist_part")


def test_a_part_that_can_not_be_imported_is_not_called_unknown(parts: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        lookup(parts, "broken")


@pytest.mark.parametrize("name", ["", "__init__", "../spec", "os.path", "linear.py", "Linear"])
def test_only_names_in_the_folder_are_looked_up(name: str) -> None:
    with pytest.raises(ValueError, match="unknown schedule"):
        lookup("emtrain.schedules", name)


def test_things_carry_hyphens_and_functions_underscores() -> None:
    assert {"micro-llama", "micro-qwen2", "micro-gemma3"} <= set(names("emtrain.models"))
    assert "cosine_restarts" in names("emtrain.schedules")
    assert lookup("emtrain.models", "micro-llama").model_type == "llama"
    assert source("emtrain.models", "micro-llama").is_file()


def test_a_name_that_is_like_no_other_gets_no_suggestion() -> None:
    assert nearest("zzz", ["linear", "cosine"]) == ""
    assert unknown("schedule", "zzz", ["linear", "cosine"]) == "unknown schedule 'zzz'. Known: linear, cosine"
