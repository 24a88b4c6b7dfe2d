"""Operators of expressions: for which values they are, and what bounds their results."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ctflow.bundle.expressions.functions import percent
from ctflow.bundle.expressions.values import LARGEST_EXPONENT, MOST_ITEMS, ArrayValue, is_numeric, is_text

_ARITHMETIC: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
}
_COMPARISONS: Mapping[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_LISTS = (list, tuple)
_SETS = (ast.Sub, ast.BitOr, ast.BitAnd)
_ORDERS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def combined(kind: type[ast.operator], left: Any, right: Any) -> Any:
    """`left kind right`.

    Raises:
        TypeError: The operator is not for these two.
        ValueError: Its result would be too large.
    """
    if any(isinstance(each, ArrayValue) for each in (left, right)):
        raise TypeError
    if kind not in _ARITHMETIC or not _fits(kind, left, right):
        raise TypeError
    if kind is ast.Mod and is_text(left):
        return percent(left, right)
    found = _ARITHMETIC[kind](left, right)
    if isinstance(found, complex):
        raise TypeError
    return found


def _fits(kind: type[ast.operator], left: Any, right: Any) -> bool:
    if is_numeric(left) and is_numeric(right):
        if kind is ast.Pow:
            return bool(abs(left) <= 1e6 and 0 <= right <= LARGEST_EXPONENT)
        return kind not in (ast.BitOr, ast.BitAnd)
    if kind is ast.Add:
        same = any(isinstance(left, each) and isinstance(right, each) for each in _LISTS)
        return same or (is_text(left) and is_text(right))
    if kind is ast.Mult:
        values, count = (right, left) if is_numeric(left) else (left, right)
        is_sequence = isinstance(values, list | tuple) or is_text(values)
        return is_sequence and type(count) is int and bool(count * len(values) <= MOST_ITEMS)
    if kind in _SETS:
        return isinstance(left, set) and isinstance(right, set)
    return kind is ast.Mod and is_text(left)


def compared(kind: type[ast.cmpop], left: Any, right: Any) -> bool:
    """`left kind right`.

    Raises:
        TypeError: The operator is not for these two.
    """
    if kind in _ORDERS:
        fits = (is_numeric(left) and is_numeric(right)) or (is_text(left) and is_text(right))
    elif kind in (ast.In, ast.NotIn):
        fits = isinstance(right, list | tuple | dict | set | range) or (is_text(left) and is_text(right))
    else:
        fits = kind not in (ast.Is, ast.IsNot) or any(each is None or isinstance(each, bool) for each in (left, right))
    if not fits or any(hasattr(each, "dtype") or isinstance(each, ArrayValue) for each in (left, right)):
        raise TypeError
    return _COMPARISONS[kind](left, right)
