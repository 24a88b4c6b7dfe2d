"""What source code reads of the environment and which packages it imports, also by name in a call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

READS = {
    *("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv", "os.unsetenv"),
    *("os.path.expandvars", "posix.environ"),
}
KEYWORDS = frozenset({"envvar", "auto_envvar_prefix"})  # click reads the variables that these name
# Functions that are given the name of a module or of a distribution: position and name of that parameter.
IMPORTERS = {
    "importlib.import_module": (0, "name"),
    "__import__": (0, "name"),
    "importlib.util.find_spec": (0, "name"),
    "pkgutil.resolve_name": (0, "name"),
    "importlib.metadata.version": (0, "distribution_name"),
    "importlib.metadata.requires": (0, "distribution_name"),
    "importlib.metadata.metadata": (0, "distribution_name"),
    "importlib.metadata.distribution": (0, "distribution_name"),
    "importlib.metadata.files": (0, "distribution_name"),
}
Importers = dict[str, tuple[int, str]]


class Source:
    """One module's code, with what its names stand for.

    Args:
        text: Its source.
        module: Its name, which qualifies its functions.
    """

    def __init__(self, text: str, module: str = "") -> None:
        self.tree, self.module = ast.parse(text), module
        self._stands_for: dict[str, str] = {}
        self._texts: dict[str, set[str]] = {}
        self._lists: dict[str, list[ast.expr]] = {}
        self._around: dict[ast.AST, ast.FunctionDef | ast.AsyncFunctionDef] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._around.update({each: node for each in ast.walk(node) if each is not node})
                self._stands_for.setdefault(node.name, f"{module}.{node.name}")
            elif isinstance(node, ast.Import):
                self._stands_for.update({each.asname or each.name.partition(".")[0]: each.name if each.asname
                                         else each.name.partition(".")[0] for each in node.names})  # fmt: skip
            elif isinstance(node, ast.ImportFrom):
                self._stands_for.update({each.asname or each.name: f"{node.module}.{each.name}" for each in node.names})
        for node in ast.walk(self.tree):
            self._note_values(node)

    def _note_values(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, [node.value])
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self._assign(node.target, [node.value])
        elif isinstance(node, (ast.For, ast.comprehension)):
            self._assign(node.target, list(self._items(node.iter)))

    def _assign(self, target: ast.expr, values: list[ast.expr]) -> None:
        if isinstance(target, ast.Tuple):
            for index, each in enumerate(target.elts):
                parts = [value.elts[index] for value in values if isinstance(value, ast.Tuple)]
                self._assign(each, parts)
        elif isinstance(target, ast.Name):
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    self._texts.setdefault(target.id, set()).add(value.value)
                elif isinstance(value, (ast.Tuple, ast.List, ast.Set)):
                    self._lists[target.id] = value.elts
                elif isinstance(value, (ast.Name, ast.Attribute)) and (name := self.qualified(value)):
                    self._stands_for.setdefault(target.id, name)

    def _items(self, node: ast.expr) -> Iterator[ast.expr]:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            yield from node.elts
        elif isinstance(node, ast.Name):
            yield from self._lists.get(node.id, [])

    def qualified(self, node: ast.AST) -> str:
        """The full name of what an expression stands for; empty if it is not from another module."""
        if isinstance(node, ast.Name):
            return self._stands_for.get(node.id, node.id if node.id == "__import__" else "")
        if isinstance(node, ast.Attribute):
            before = self.qualified(node.value)
            return f"{before}.{node.attr}" if before else ""
        return ""

    # -- the environment ----------------------------------------------------------------------------------------------

    def environment_reads(self) -> list[int]:
        """Lines that read or change an environment variable, or import what does."""
        return sorted({node.lineno for node in ast.walk(self.tree) if self._reads(node)})

    def _reads(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.qualified(node) in READS
        if isinstance(node, ast.ImportFrom):
            return bool({f"{node.module}.{each.name}" for each in node.names} & (READS | {"os.*", "posix.*"}))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            named = self.texts(node.args[1]) or set()
            return bool({f"{self.qualified(node.args[0])}.{name}" for name in named} & READS)
        return isinstance(node, ast.keyword) and node.arg in KEYWORDS

    # -- packages -----------------------------------------------------------------------------------------------------

    def statements(self) -> set[str]:
        """What import statements name."""
        names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return names

    def calls(self, importers: Importers) -> Iterator[tuple[ast.Call, ast.expr]]:
        """Calls of functions that import by name, with the argument that names."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and (place := importers.get(self.qualified(node.func))):
                index, keyword = place
                given = [each.value for each in node.keywords if each.arg == keyword]
                given = [node.args[index]] if len(node.args) > index else given
                if given:
                    yield node, given[0]

    def forwarded(self, importers: Importers) -> Importers:
        """The functions of this module that pass one of their own arguments on to such a function."""
        found: Importers = {}
        for node, argument in self.calls(importers):
            function = self._around.get(node)
            if (place := _parameter(function, argument)) is not None:
                found[f"{self.module}.{function.name}"] = place
        return found

    def called(self, importers: Importers) -> tuple[set[str], list[int]]:
        """What such calls name, and the lines of those that name what only a run knows."""
        names: set[str] = set()
        unknown: list[int] = []
        for node, argument in self.calls(importers):
            if _parameter(self._around.get(node), argument) is not None:
                continue  # whoever calls this function names it
            found = self.texts(argument)
            names |= {name.replace("-", "_") for name in found or ()}
            if not found:
                unknown.append(node.lineno)
        return names, unknown

    def texts(self, node: ast.expr) -> set[str] | None:
        """The strings that an expression may be; None where that is not to be seen here."""
        if isinstance(node, ast.Constant):
            return {node.value} if isinstance(node.value, str) else None
        if isinstance(node, ast.Name):
            return self._texts.get(node.id)
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = [self.texts(part) for part in node.values]
            return {"".join(each) for each in product(*parts)} if None not in parts else None  # type: ignore[arg-type]
        return None


def _parameter(function: ast.FunctionDef | ast.AsyncFunctionDef | None, argument: ast.expr) -> tuple[int, str] | None:
    """Which of a function's own arguments this is."""
    while isinstance(argument, ast.Call) and argument.args:  # `_module_name(name)` is as `name`
        argument = argument.args[0]
    if function is None or not isinstance(argument, ast.Name):
        return None
    names = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    if argument.id not in names:
        return None
    return names.index(argument.id) - (names[0] in {"self", "cls"}), argument.id


def sources(repository: Path) -> dict[str, Source]:
    """Every module that is installed, by its path in the repository."""
    found: dict[str, Source] = {}
    for folder, package in (("src/ctflow", "ctflow"), ("operators", "ctflow.operators"), ("app", "ctflow.app")):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository / folder).with_suffix("").parts
            module = ".".join((package, *parts)).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            found[path.relative_to(repository).as_posix()] = Source(text, module)
    return found


def importers_of(found: dict[str, Source]) -> Importers:
    """The functions that import by name: Python's, and the project's own that pass a name on to one of them."""
    own: Importers = {}
    for source in found.values():
        own |= source.forwarded(IMPORTERS)
    return IMPORTERS | own
