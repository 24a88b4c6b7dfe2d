"""The few functions of one value that a configuration may hold: `lambda x: x * 2 - 1`, `lambda x: x > -500`."""

from __future__ import annotations

import ast

import numpy as np

from ctflow.bundle.expressions.interpreter import LONGEST
from ctflow.bundle.expressions.values import DEEPEST, LARGEST_NUMBER, NotUnderstood

LineFunction = tuple[float, float]  # factor, offset


def line_of_lambda(text: str) -> LineFunction:
    """The factor and the offset of a function that only multiplies by and adds numbers.

    Raises:
        NotUnderstood: It is something else.
    """
    name, body = _parsed(text)
    return _line(body, name, 0)


def threshold_of_lambda(text: str) -> float:
    """The number that `lambda x: x > number` (or `>=`) compares with; of float32 the next one below for `>=`.

    Raises:
        NotUnderstood: It is something else.
    """
    name, body = _parsed(text)
    if not isinstance(body, ast.Compare) or len(body.ops) != 1:
        raise NotUnderstood(_shown(body))
    left, right = _line(body.left, name, 0), _line(body.comparators[0], name, 0)
    is_turned = isinstance(body.ops[0], ast.Lt | ast.LtE)
    value, limit = (right, left) if is_turned else (left, right)
    if value != (1.0, 0.0) or limit[0] != 0 or not isinstance(body.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE):
        raise NotUnderstood(_shown(body))
    if isinstance(body.ops[0], ast.LtE | ast.GtE):
        return float(np.nextafter(np.float32(limit[1]), np.float32(-np.inf)))
    return limit[1]


def is_nan_to_num(text: str) -> bool:
    """Whether it is `lambda x: torch.nan_to_num(x, ...)` with numbers for what is not one."""
    try:
        name, body = _parsed(text)
    except NotUnderstood:
        return False
    return (
        isinstance(body, ast.Call)
        and ast.unparse(body.func) in ("torch.nan_to_num", "np.nan_to_num", "numpy.nan_to_num")
        and [ast.unparse(each) for each in body.args] == [name]
        and all(isinstance(each.value, ast.Constant) for each in body.keywords)
    )


def _shown(node: ast.AST) -> str:
    try:
        return ast.unparse(node)[:80]
    except RecursionError:
        return "a long part"


def _parsed(text: str) -> tuple[str, ast.expr]:
    if len(text) > LONGEST:
        raise NotUnderstood(text[:80], "is too long")
    try:
        found = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUnderstood(text[:80], "is not an expression") from None
    if not isinstance(found, ast.Lambda) or len(found.args.args) != 1 or _shown(found.args) != found.args.args[0].arg:
        raise NotUnderstood(text[:80], "is no function of one value")
    return found.args.args[0].arg, found.body


def _line(node: ast.expr, name: str, level: int) -> LineFunction:
    if level > DEEPEST:
        raise NotUnderstood("", "is nested too deeply")
    if isinstance(node, ast.Name) and node.id == name:
        return 1.0, 0.0
    number = node.value if isinstance(node, ast.Constant) else None
    if isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= LARGEST_NUMBER:
        return 0.0, float(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        factor, offset = _line(node.operand, name, level + 1)
        return (-factor, -offset) if isinstance(node.op, ast.USub) else (factor, offset)
    if isinstance(node, ast.BinOp):
        found = _combined(node.op, _line(node.left, name, level + 1), _line(node.right, name, level + 1))
        if found is not None and max(map(abs, found)) <= LARGEST_NUMBER:
            return found
    raise NotUnderstood(_shown(node))


def _combined(kind: ast.operator, left: LineFunction, right: LineFunction) -> LineFunction | None:
    if isinstance(kind, ast.Add):
        return left[0] + right[0], left[1] + right[1]
    if isinstance(kind, ast.Sub):
        return left[0] - right[0], left[1] - right[1]
    if isinstance(kind, ast.Mult) and (left[0] == 0 or right[0] == 0):
        (factor, offset), number = (right, left[1]) if left[0] == 0 else (left, right[1])
        return factor * number, offset * number
    if isinstance(kind, ast.Div) and right[0] == 0 and right[1] != 0:
        return left[0] / right[1], left[1] / right[1]
    return None
