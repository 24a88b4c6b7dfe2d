"""A bundle's YAML as the JSON that it stands for: what MONAI's safe loader gives, bounded."""

from __future__ import annotations

import math
import reprlib
from typing import Any

MOST_NODES = 200_000  # with aliases written out: a small file may name a large part many times
DEEPEST = 60


def read_yaml(text: str) -> Any:
    """Words, numbers, truth values, None, lists and objects; aliases are copied.

    Raises:
        ValueError: Not one YAML document, a tag that makes an object, a repeated key, a key that is no word, a date, or
            too deep or large.
    """
    import yaml  # noqa: PLC0415  # most bundles have none

    class Loader(yaml.SafeLoader):
        """As MONAI's, but a repeated key is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # as above
            seen = set()
            for key, _ in node.value:
                name = key.value if isinstance(key.value, str) else ""
                if name in seen:
                    raise ValueError(f"the key {name[:80]!r} occurs twice in line {key.start_mark.line + 1}; keep one")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(text, Loader=Loader)  # noqa: S506  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML that a bundle needs: {error.problem or error.context}{where}") from None
    except yaml.YAMLError:
        raise ValueError("not YAML: a control character") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _copied(found, [MOST_NODES], 0)


def _copied(value: Any, left: list[int], level: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or level > DEEPEST:
        raise ValueError("nested too deeply or too large")
    if isinstance(value, dict):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"the key {reprlib.repr(wrong)[:80]} is not a word: write it in quotation marks")
        return {key: _copied(item, left, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item, left, level + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number that is not finite")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{reprlib.repr(value)[:80]} is a {type(value).__name__}: write it in quotation marks")
