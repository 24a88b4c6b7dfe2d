"""The functions, methods and names that expressions may use."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping
from typing import Any

from ctflow.bundle.expressions.values import MOST_ITEMS, NameValue, NotUnderstood, is_numeric, is_text

_TYPES = ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")
_READERS = ("ITKReader", "NibabelReader", "PydicomReader")
_TORCH_TYPES = (*_TYPES, "float", "double", "half", "bfloat16", "long", "int", "bool")
NAMES: Mapping[str, Any] = {
    **{f"torch.{name}": NameValue(f"torch.{name}") for name in _TORCH_TYPES},
    **{f"{package}.{name}": NameValue(f"{package}.{name}") for package in ("np", "numpy") for name in _TYPES},
    # MONAI's enumerations are texts.
    **{
        f"{package}BlendMode.{name.upper()}": name
        for package in ("monai.utils.", "monai.utils.enums.")
        for name in ("gaussian", "constant")
    },
    **{
        f"{package}PytorchPadMode.{name.upper()}": name
        for package in ("monai.utils.", "monai.utils.enums.")
        for name in ("constant", "reflect", "replicate", "circular")
    },
    **{
        f"monai.data.{name}": NameValue(f"monai.data.{name}")
        for name in ("ITKReader", "NibabelReader", "PydicomReader")
    },
    "monai.transforms.utils.is_positive": NameValue("monai.transforms.utils.is_positive"),
    "None": None,
}
_FIELD = re.compile(r"\{(\d{0,3}|[A-Za-z_]\w{0,40})(?::([^{}]{0,10}))?\}")
_PERCENT = re.compile(r"%(?:%|[-+ 0]{0,3}\d{0,3}(?:\.\d{1,2})?[dsfg])")
_WIDE = re.compile(r"\d{4}")


def _sized(value: Any) -> Any:
    if not isinstance(value, list | tuple | dict | set | range) and not is_text(value):
        raise TypeError
    return value


def _number(value: Any) -> Any:
    if not is_numeric(value):
        raise TypeError
    return value


def _int(value: Any = 0) -> int:
    if is_text(value) and len(value) > 20:
        raise ValueError
    return int(value if is_text(value) else _number(value))


def _float(value: Any = 0.0) -> float:
    return float(value if is_text(value) else _number(value))


def _str(value: Any = "") -> str:
    if value is not None and not is_text(value) and not is_numeric(value):
        raise TypeError
    return str(value)


def _range(*bounds: Any) -> range:
    if not all(type(bound) is int for bound in bounds):
        raise TypeError
    return range(*bounds)


def _comparable(values: Any) -> list[Any]:
    found = list(_sized(values))
    if not (all(map(is_numeric, found)) or all(map(is_text, found))):
        raise TypeError
    return found


def _least_or_most(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: function(_comparable(values[0] if len(values) == 1 else list(values)))


def _join(*parts: Any) -> str:
    if not parts or not all(map(is_text, parts)):
        raise TypeError
    return str(os.path.join(*parts))  # noqa: PTH118  # it is this function's meaning


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and (type(digits) is not int or abs(digits) > 20):
        raise TypeError
    return round(_number(value), digits)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "len": lambda value: len(_sized(value)),
    "int": _int,
    "float": _float,
    "str": _str,
    "bool": lambda value=False: bool(value if value is None else _sized(value) if not is_numeric(value) else value),
    "list": lambda values=(): list(_sized(values)),
    "tuple": lambda values=(): tuple(_sized(values)),
    "set": lambda values=(): set(_sized(values)),
    "dict": lambda values=(): dict(_sized(values)),
    "range": _range,
    "zip": lambda *values: list(zip(*map(_sized, values), strict=False)),
    "enumerate": lambda values: list(enumerate(_sized(values))),
    "sorted": lambda values: sorted(_comparable(values)),
    "reversed": lambda values: list(reversed(list(_sized(values)))),
    "min": _least_or_most(min),
    "max": _least_or_most(max),
    "sum": lambda values: sum(map(_number, _sized(values))),
    "any": lambda values: any(map(_number, _sized(values))),
    "all": lambda values: all(map(_number, _sized(values))),
    "abs": lambda value: abs(_number(value)),
    "round": _round,
    "os.path.join": _join,
    "pathlib.Path": lambda path: PathText(_text(path)),
    "Path": lambda path: PathText(_text(path)),
}


class PathText(str):
    """A path of an expression: a text with the one method that reads a file."""

    __slots__ = ()


def _text(value: Any) -> str:
    if not is_text(value):
        raise TypeError
    return str(value)


def formatted(value: Any, spec: str) -> str:
    """A number or text in the format of a replacement field."""
    if (not is_numeric(value) and not is_text(value)) or len(spec) > 10 or _WIDE.search(spec):
        raise TypeError
    return format(value, spec)


def _format(template: str, *values: Any, **named: Any) -> str:
    rest = _FIELD.sub("", template.replace("{{", "").replace("}}", ""))
    if "{" in rest or "}" in rest or "{{" in template or "}}" in template:
        raise NotUnderstood(template[:80])
    position = -1

    def fill(found: re.Match[str]) -> str:
        nonlocal position
        name, spec = found[1], found[2] or ""
        if not name:
            position += 1
            return formatted(values[position], spec)
        return formatted(values[int(name)] if name.isdecimal() else named[name], spec)

    return _FIELD.sub(fill, template)


def percent(template: str, values: Any) -> str:
    """`template % values` for %d, %s, %f and %g of bounded width."""
    if "%" in _PERCENT.sub("", template):
        raise NotUnderstood(template[:80])
    given = values if isinstance(values, tuple) else (values,)
    if not all(is_numeric(value) or is_text(value) for value in given):
        raise TypeError
    return template % given


def _joined(text: str, parts: Any) -> str:
    found = [_text(part) for part in _sized(parts)]
    if sum(map(len, found)) + len(text) * len(found) > MOST_ITEMS:
        raise ValueError
    return text.join(found)


def _replaced(text: str, old: Any, new: Any) -> str:
    if not _text(old) or text.count(old) * len(_text(new)) > MOST_ITEMS:
        raise ValueError
    return text.replace(old, new)


_OF_TEXT: Mapping[str, Callable[..., Any]] = {
    "format": _format,
    "join": _joined,
    "split": lambda text, *by: text.split(*map(_text, by)),
    "replace": _replaced,
    "lower": lambda text: text.lower(),
    "upper": lambda text: text.upper(),
    "strip": lambda text: text.strip(),
    "startswith": lambda text, other: text.startswith(_text(other)),
    "endswith": lambda text, other: text.endswith(_text(other)),
}
_OF_OBJECT: Mapping[str, Callable[..., Any]] = {
    "get": lambda values, key, other=None: values.get(key, other),
    "keys": lambda values: list(values.keys()),
    "values": lambda values: list(values.values()),
    "items": lambda values: list(values.items()),
}


def _bounded_list(array: Any) -> Any:
    """The numbers of an array, of which a file of a few bytes may describe any count."""
    if array.size > MOST_ITEMS:
        raise ValueError("too many numbers")
    return array.tolist()


def method_of(value: Any, name: str) -> Callable[..., Any] | None:
    """The method of a value, or None if expressions may not use it."""
    if name == "tolist" and hasattr(value, "tolist") and hasattr(value, "dtype"):
        return _bounded_list
    methods = _OF_TEXT if is_text(value) else _OF_OBJECT if isinstance(value, dict) else {}
    return methods.get(name)
