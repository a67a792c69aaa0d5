from pathlib import Path

import pytest

from emtrain.paths import user_path


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a.yaml") == Path("/home/me/a.yaml")
    assert user_path("a/~b.yaml") == Path("a/~b.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("~nobody-here/a.yaml", "~nobody-here/a.yaml: this machine knows no home"),
        ("a\0b.yaml", r"'a\\x00b.yaml' holds"),
    ],
)
def test_what_can_be_no_path_is_named(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        user_path(text)
