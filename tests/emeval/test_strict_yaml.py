import pytest

from emeval.strict_yaml import load_yaml


def test_values_are_read_as_yaml_has_them() -> None:
    assert load_yaml("a: [1, 2.5, x, null, true]") == {"a": [1, 2.5, "x", None, True]}


def test_a_key_of_its_own_beside_one_that_is_merged_in_is_not_given_twice() -> None:
    text = "a: &a {k: 1, l: 1}\nb: {c: &c {<<: *a, k: 2}}\nd: {<<: *c, l: 3}"
    assert load_yaml(text) == {"a": {"k": 1, "l": 1}, "b": {"c": {"k": 2, "l": 1}}, "d": {"k": 2, "l": 3}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\na: 2", "line 2, column 1: the key 'a' is given twice"),
        ("a: 2023-13-45", r"line 1, column 4: '2023-13-45' can't be read as timestamp \(month must be in 1..12\)"),
        ("- !!int abc", r"line 1, column 3: 'abc' can't be read as int \(invalid literal"),
        ("- !!bool abc", "line 1, column 3: 'abc' can't be read as bool"),
        ("- !!timestamp abc", "line 1, column 3: 'abc' can't be read as timestamp"),
        ("a:\n  - " + "9" * 5000, r"line 2, column 5: '9{199}... can't be read as int \(Exceeds the limit"),
        ("a: !!map [b]", "line 1, column 4: expected a mapping node"),
        ("[" * 3000, "nested too deeply"),
        ("[" * 1_000_000, "nested too deeply"),
    ],
    ids=lambda text: text[:20],
)
def test_each_mistake_is_one_line_that_says_where_it_is(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^not valid YAML: {problem}.*$"):
        load_yaml(text)
