"""YAML as users write it, read strictly: each mistake is one line that says where it is."""

from typing import Any

import yaml

from emtrain.mistakes import shown


def load_yaml(text: str) -> Any:
    """What ``text`` says.

    Raises ``ValueError`` where it is no YAML, gives a key twice, is nested too deeply, or has a value that is none of
    its kind (``2023-13-45`` is no date).
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"not valid YAML: {where}{problem}") from error
    except RecursionError:
        raise ValueError("not valid YAML: nested too deeply; expected a few levels of lists and mappings") from None


class _Loader(yaml.SafeLoader):  # not libyaml's, which ends the process where a text is nested too deeply
    """YAML in which a key given twice is an error, not the last one silently winning."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        mapping = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in mapping.value:  # nodes, before `<<` has brought in keys of other mappings
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {shown(key.value)} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return mapping

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
            # PyYAML lets through what Python says of numbers and dates.
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown(node.value)} can't be read as {kind} ({error})", node.start_mark
            ) from error
