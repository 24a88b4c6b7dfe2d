"""An expression that only makes an object: `$monai.networks.nets.UNet(spatial_dims=3, ...)`."""

from __future__ import annotations

import ast

from ctflow.bundle.expressions.interpreter import with_marks, without_marks
from ctflow.bundle.expressions.values import NotUnderstood


def component_of_call(text: str) -> dict[str, str] | None:
    """The object that a call describes, its class and arguments as a configuration has them; None for anything else.

    Args:
        text: With the leading `$`.

    Returns:
        `_target_`, and each argument as an expression; only arguments that are named.
    """
    try:
        source, references = with_marks(text[1:].strip())
        body = ast.parse(source, mode="eval").body
    except (NotUnderstood, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(body, ast.Call) or body.args:
        return None
    found = {"_target_": dotted(body.func)}
    for keyword in body.keywords:
        part = ast.get_source_segment(source, keyword.value)
        if keyword.arg is None or part is None or keyword.arg in found:
            return None
        found[keyword.arg] = f"${without_marks(part, references)}"
    target = found["_target_"]
    return found if "." in target and target == without_marks(target, references) else None


def dotted(node: ast.expr) -> str:
    """The name of what is called, such as "copy.deepcopy"; "" if it is no name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""
