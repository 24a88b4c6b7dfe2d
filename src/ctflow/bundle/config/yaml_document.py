"""A bundle's YAML as the JSON that it stands for: what MONAI's safe loader gives, bounded."""

from __future__ import annotations

import math
from typing import Any

MOST_NODES = 50_000  # with aliases written out: a small file may name a large part many times; the zoo's files have 900
DEEPEST = 60
_LONGEST_NUMBER = 64  # characters; of base 60, a long one takes minutes
_LARGEST_NUMBER = 10**30
_CORE = "tag:yaml.org,2002:"
_NULLS = ("", "~", "null", "Null", "NULL")


def read_yaml(text: str) -> Any:
    """Words, numbers, truth values, None, lists and objects; aliases are copied.

    No constructor of the library sees the file: it composes nodes, and this module reads them within bounds.

    Raises:
        ValueError: Not one YAML document, a tag that makes an object, a repeated key, a key that is no word, a date, or
            too deep or large.
    """
    import yaml  # noqa: PLC0415  # most bundles have none

    left = [MOST_NODES]

    class Loader(yaml.SafeLoader):
        """A composer that stops at a file that is too large or too deep."""

        level = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.level += 1
            left[0] -= 1
            _check_bounds(left, self.level)
            node = super().compose_node(parent, index)
            self.level -= 1
            return node

    try:
        root = yaml.compose(text, Loader)
        return None if root is None else _Nodes(yaml.constructor.SafeConstructor()).value(root, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML that a bundle needs: {error.problem or error.context}{where}") from None
    except yaml.YAMLError:
        raise ValueError("not YAML: a control character") from None
    except OverflowError:
        raise ValueError("not YAML: an escape that is no character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check_bounds(left: list[int], level: int) -> None:
    if left[0] < 0 or level > DEEPEST:
        raise ValueError("nested too deeply or too large")


class _Nodes:
    """Nodes -> values.

    Args:
        numbers: The library's reading of whole and decimal numbers.
    """

    def __init__(self, numbers: Any) -> None:
        self._left = [MOST_NODES]
        self._of_scalar = {
            "str": lambda node: node.value,
            "null": lambda node: None if node.value in _NULLS else _raise(f"{node.value[:40]!r} as null"),
            "bool": lambda node: numbers.bool_values[node.value.lower()],
            "int": numbers.construct_yaml_int,
            "float": numbers.construct_yaml_float,
        }

    def value(self, node: Any, level: int) -> Any:
        self._left[0] -= 1
        _check_bounds(self._left, level)
        kind = node.tag.removeprefix(_CORE)
        if node.id == "scalar" and kind in self._of_scalar:
            return self._scalar(node, kind)
        if node.id == "sequence" and kind == "seq":
            return [self.value(item, level + 1) for item in node.value]
        if node.id == "mapping" and kind == "map":
            return self._object(node, level)
        what = f"{node.value[:40]!r} is a {kind[:40]}" if node.id == "scalar" else f"has a {kind[:40]}"
        raise ValueError(f"{what} in line {_line(node)}: write it in quotation marks, or as a list or object")

    def _scalar(self, node: Any, kind: str) -> Any:
        if kind in ("int", "float") and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value)} characters in line {_line(node)}")
        try:
            found = self._of_scalar[kind](node)
        except (ArithmeticError, LookupError, ValueError):
            raise ValueError(f"{node.value[:40]!r} in line {_line(node)} is no {kind}") from None
        if isinstance(found, float) and not math.isfinite(found):
            raise ValueError("a number that is not finite")
        if kind == "int" and abs(found) >= _LARGEST_NUMBER:
            raise ValueError(f"a number of {len(node.value)} digits in line {_line(node)}")
        return found

    def _object(self, node: Any, level: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == f"{_CORE}merge":
                merged = {**merged, **self._merged(item, level + 1)}
                continue
            if key.id != "scalar" or key.tag != f"{_CORE}str":
                name = repr(key.value[:40]) if key.id == "scalar" else f"of a {key.id}"
                raise ValueError(f"the key {name} in line {_line(key)} is not a word: write it in quotation marks")
            if key.value in own:
                raise ValueError(f"the key {key.value[:80]!r} occurs twice in line {_line(key)}; keep one")
            own[key.value] = self.value(item, level + 1)
        return {**merged, **own}

    def _merged(self, node: Any, level: int) -> dict[str, Any]:
        """The objects that `<<` names, the first one over the others."""
        found: dict[str, Any] = {}
        for item in reversed(node.value) if node.id == "sequence" else [node]:
            if item.id != "mapping" or item.tag != f"{_CORE}map":
                raise ValueError(f"<< in line {_line(node)} names what is no object")
            found |= self.value(item, level)
        return found


def _raise(problem: str) -> None:
    raise ValueError(problem)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
