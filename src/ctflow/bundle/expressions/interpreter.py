"""Walk an expression's tree and compute its value; anything outside the subset is `NotUnderstood`."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.expressions.functions import FUNCTIONS, NAMES, PathText, formatted, method_of
from ctflow.bundle.expressions.operators import combined, compared
from ctflow.bundle.expressions.values import (
    DEEPEST,
    ITEMS_PER_STEP,
    MOST_ITEMS,
    Budget,
    NameValue,
    NotUnderstood,
    array_value,
    is_numeric,
    is_text,
    size_of,
)

LONGEST = 4_000  # characters of an expression
_REFERENCE = re.compile(r"@(\w*(?:::\w*)*)")  # MONAI's
_MARK = "ctflow_reference_"
_PROBLEMS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_LISTS = (list, tuple)


def value_of_expression(text: str, lookup: Callable[[str], Any], files: BundleFiles, budget: Budget) -> Any:
    """The value of an expression.

    Args:
        text: Without the leading `$`; `@a::b` (or `@a#b`) refers to the configuration.
        lookup: Path of a reference -> its value.
        files: What `torch.load` and `read_text` may read.
        budget: Steps left for this configuration.

    Returns:
        Numbers, texts, truth values, None, names, lists, tuples, sets, objects, arrays, `Held` parts.

    Raises:
        NotUnderstood: It is outside the subset, too long, or cannot be computed.
    """
    source, references = with_marks(text.strip())
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotUnderstood(without_marks(text, references)[:80], "is not an expression") from None
    walker = _Walker(source, references, lookup, files, budget)
    return walker.value(tree.body)


def sole_reference(text: str) -> str | None:
    """The path if an expression is nothing but one reference, or a copy of it."""
    inner = text.strip().removeprefix("copy.deepcopy(") if text.strip().startswith("copy.deepcopy(") else None
    found = _REFERENCE.fullmatch((inner.removesuffix(")") if inner and inner.endswith(")") else text).strip())
    return found[1] if found and found[1] else None


def with_marks(text: str) -> tuple[str, list[str]]:
    """The text with an identifier in place of each reference, and the references' paths.

    Raises:
        NotUnderstood: It is too long, or contains such an identifier.
    """
    if len(text) > LONGEST:
        raise NotUnderstood(text[:80], f"is longer than {LONGEST} characters")
    if _MARK in text:
        raise NotUnderstood(_MARK)
    paths: list[str] = []

    def mark(found: re.Match[str]) -> str:
        paths.append(found[1])
        return f"{_MARK}{len(paths) - 1}_"

    return _REFERENCE.sub(mark, text.replace("#", "::")), paths


def without_marks(text: str, paths: list[str]) -> str:
    """The text with the references again in place of their identifiers."""
    return re.sub(rf"{_MARK}(\d+)_", lambda found: f"@{paths[int(found[1])]}", text)


class _Walker:
    """One walk over a tree."""

    def __init__(
        self, source: str, paths: list[str], lookup: Callable[[str], Any], files: BundleFiles, budget: Budget
    ) -> None:
        self._source, self._paths, self._lookup, self._files, self._budget = source, paths, lookup, files, budget
        self._locals: dict[str, Any] = {}
        self._depth = 0

    def value(self, node: ast.AST) -> Any:
        """The value of a part."""
        self._depth += 1
        try:
            self._budget.spend()
            handler = _HANDLERS.get(type(node))
            if handler is None or self._depth > DEEPEST:
                raise self._refused(node)
            found = handler(self, node)
        except _PROBLEMS as error:
            raise self._refused(node, f"cannot be computed ({type(error).__name__})") from None
        finally:
            self._depth -= 1
        size = size_of(found)
        if size > MOST_ITEMS:
            raise self._refused(node, "gives a number or list that is too large")
        self._budget.spend(size // ITEMS_PER_STEP)
        return found

    def _refused(self, node: ast.AST, why: str = "is not understood") -> NotUnderstood:
        text = ast.get_source_segment(self._source, node) if hasattr(node, "lineno") else None
        return NotUnderstood(without_marks(text or self._source, self._paths)[:80], why)

    # --------------------------------------------------------------------------------------------- literals and names

    def constant(self, node: ast.Constant) -> Any:
        if node.value is not None and not isinstance(node.value, bool | int | float | str):
            raise self._refused(node)
        if isinstance(node.value, str) and _MARK in node.value:
            raise self._refused(node, "has a reference inside a text")
        return node.value

    def name(self, node: ast.Name) -> Any:
        if node.id in self._locals:
            return self._locals[node.id]
        found = re.fullmatch(rf"{_MARK}(\d+)_", node.id)
        if not found:
            raise self._refused(node)
        return self._lookup(self._paths[int(found[1])])

    def attribute(self, node: ast.Attribute) -> Any:
        name = _dotted(node)
        if name is None or name not in NAMES:
            raise self._refused(node)
        return NAMES[name]

    def joined(self, node: ast.JoinedStr) -> str:
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant):
                parts.append(self.constant(part))
                continue
            if not isinstance(part, ast.FormattedValue) or part.conversion != -1:
                raise self._refused(node)
            spec = self.value(part.format_spec) if part.format_spec is not None else ""
            parts.append(formatted(self.value(part.value), spec))
        return "".join(parts)

    # --------------------------------------------------------------------------------------------- displays and loops

    def sequence(self, node: ast.List | ast.Tuple | ast.Set) -> Any:
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        found: list[Any] = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                found.extend(self._items(item.value))
            else:
                found.append(self.value(item))
        return kind(found)

    def mapping(self, node: ast.Dict) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            if key is None:
                found |= self._object(item)
            else:
                found[self.value(key)] = self.value(item)
        return found

    def comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> Any:
        found = [self.value(node.elt) for _ in self._loops(node.generators)]
        return set(found) if isinstance(node, ast.SetComp) else found

    def mapping_comprehension(self, node: ast.DictComp) -> dict[Any, Any]:
        return {self.value(node.key): self.value(node.value) for _ in self._loops(node.generators)}

    def _loops(self, generators: list[ast.comprehension]) -> Iterator[None]:
        if not generators:
            yield
            return
        first, *rest = generators
        before = dict(self._locals)
        for item in self._items(first.iter):
            self._budget.spend()
            self._bind(first.target, item)
            if all(self._truth(test) for test in first.ifs):
                yield from self._loops(rest)
        self._locals = before

    def _bind(self, target: ast.expr, item: Any) -> None:
        if isinstance(target, ast.Name):
            self._locals[target.id] = item
        elif isinstance(target, ast.Tuple) and isinstance(item, _LISTS) and len(target.elts) == len(item):
            for part, each in zip(target.elts, item, strict=True):
                self._bind(part, each)
        else:
            raise self._refused(target)

    def _items(self, node: ast.expr) -> list[Any]:
        values = self.value(node)
        if not isinstance(values, list | tuple | dict | set | range):
            raise self._refused(node, "is not a list")
        return list(values)

    def _object(self, node: ast.expr) -> dict[Any, Any]:
        found = self.value(node)
        if not isinstance(found, dict):
            raise self._refused(node, "is not an object")
        return found

    # ------------------------------------------------------------------------------------------------------ operators

    def binary(self, node: ast.BinOp) -> Any:
        return combined(type(node.op), self.value(node.left), self.value(node.right))

    def unary(self, node: ast.UnaryOp) -> Any:
        if isinstance(node.op, ast.Not):
            return not self._truth(node.operand)
        found = self.value(node.operand)
        if not is_numeric(found) or isinstance(node.op, ast.Invert):
            raise self._refused(node)
        return -found if isinstance(node.op, ast.USub) else +found

    def compare(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for kind, item in zip(node.ops, node.comparators, strict=True):
            right = self.value(item)
            if not compared(type(kind), left, right):
                return False
            left = right
        return True

    def boolean(self, node: ast.BoolOp) -> Any:
        found: Any = None
        for item in node.values:
            found = self.value(item)
            if self._truth_of(item, found) is isinstance(node.op, ast.Or):
                break
        return found

    def conditional(self, node: ast.IfExp) -> Any:
        return self.value(node.body if self._truth(node.test) else node.orelse)

    def _truth(self, node: ast.expr) -> bool:
        return self._truth_of(node, self.value(node))

    def _truth_of(self, node: ast.AST, value: Any) -> bool:
        if value is None or isinstance(value, bool | int | float | str | list | tuple | dict | set | range):
            return bool(value)
        raise self._refused(node, "is neither true nor false")

    def subscript(self, node: ast.Subscript) -> Any:
        holder = self.value(node.value)
        if isinstance(node.slice, ast.Slice):
            bounds = [None if part is None else self.value(part) for part in _bounds(node.slice)]
            if not (isinstance(holder, list | tuple | range) or is_text(holder)):
                raise self._refused(node)
            return holder[slice(*bounds)]
        key = self.value(node.slice)
        is_list = isinstance(holder, list | tuple | range) or is_text(holder) or hasattr(holder, "dtype")
        if not isinstance(holder, dict) and not (is_list and type(key) is int):
            raise self._refused(node)
        return holder[key]

    # ---------------------------------------------------------------------------------------------------------- calls

    def call(self, node: ast.Call) -> Any:
        name = _dotted(node.func)
        if name == "torch.device" and len(node.args) == 1 and not node.keywords:
            return NameValue("torch.device")  # ctflow places the network itself: which one is not looked at
        if name == "torch.load" and len(node.args) == 1 and {k.arg for k in node.keywords} <= _LOAD_KEYWORDS:
            return self._files.arrays(self._text(node.args[0]))
        if name in ("torch.from_numpy", "torch.tensor", "torch.as_tensor", "np.array", "numpy.array"):
            return self._array(node)
        if name == "json.loads" and len(node.args) == 1 and not node.keywords:
            return self._json(node)
        arguments = self._arguments(node.args)
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        if name is not None and name in FUNCTIONS and not named and name.split(".")[0] not in self._locals:
            return FUNCTIONS[name](*arguments)
        if not isinstance(node.func, ast.Attribute) or None in {keyword.arg for keyword in node.keywords}:
            raise self._refused(node.func)
        return self._method(node, node.func, arguments, named)

    def _method(self, node: ast.Call, function: ast.Attribute, arguments: list[Any], named: dict[str, Any]) -> Any:
        holder = self.value(function.value)
        if isinstance(holder, PathText) and function.attr == "read_text" and not arguments and not named:
            return FileText(self._files.text(holder))
        method = method_of(holder, function.attr)
        if method is None or (named and function.attr != "format"):
            raise self._refused(node.func)
        return method(holder, *arguments, **named)

    def _arguments(self, nodes: list[ast.expr]) -> list[Any]:
        found: list[Any] = []
        for node in nodes:
            found.extend(self._items(node.value) if isinstance(node, ast.Starred) else [self.value(node)])
        return found

    def _array(self, node: ast.Call) -> Any:
        if len(node.args) != 1 or node.keywords:
            raise self._refused(node)
        found = self.value(node.args[0])
        if not hasattr(found, "dtype") and not isinstance(found, _LISTS):
            raise self._refused(node)
        return array_value(found) if isinstance(found, _LISTS) else found

    def _json(self, node: ast.Call) -> Any:
        text = self.value(node.args[0])
        if not isinstance(text, FileText | str) or isinstance(text, NameValue):
            raise self._refused(node)
        try:
            return json.loads(text.text if isinstance(text, FileText) else text)
        except (ValueError, RecursionError):
            raise self._refused(node, "is not JSON") from None

    def _text(self, node: ast.expr) -> str:
        found = self.value(node)
        if not is_text(found):
            raise self._refused(node, "is not a text")
        return str(found)


class FileText:
    """The text of a file, which may be longer than a text of an expression; only `json.loads` takes it."""

    def __init__(self, text: str) -> None:
        self.text = text


def _dotted(node: ast.AST) -> str | None:
    """`a.b.c` as text; None if it is something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value)
        return None if inner is None else f"{inner}.{node.attr}"
    return None


def _bounds(part: ast.Slice) -> tuple[ast.expr | None, ast.expr | None, ast.expr | None]:
    return part.lower, part.upper, part.step


_LOAD_KEYWORDS = {"map_location", "weights_only"}
_HANDLERS: Mapping[type[ast.AST], Callable[[_Walker, Any], Any]] = {
    ast.Constant: _Walker.constant,
    ast.Name: _Walker.name,
    ast.Attribute: _Walker.attribute,
    ast.JoinedStr: _Walker.joined,
    ast.List: _Walker.sequence,
    ast.Tuple: _Walker.sequence,
    ast.Set: _Walker.sequence,
    ast.Dict: _Walker.mapping,
    ast.ListComp: _Walker.comprehension,
    ast.SetComp: _Walker.comprehension,
    ast.GeneratorExp: _Walker.comprehension,
    ast.DictComp: _Walker.mapping_comprehension,
    ast.BinOp: _Walker.binary,
    ast.UnaryOp: _Walker.unary,
    ast.Compare: _Walker.compare,
    ast.BoolOp: _Walker.boolean,
    ast.IfExp: _Walker.conditional,
    ast.Subscript: _Walker.subscript,
    ast.Call: _Walker.call,
}
