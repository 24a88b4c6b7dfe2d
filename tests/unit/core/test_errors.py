"""Reasons: every raise has one, docs/errors.md explains each, and processes hand them on."""

import ast
import inspect
import pickle
import re
from pathlib import Path

import pytest

from ctflow.core import errors
from ctflow.core.errors import BrokenSeries, CtflowError, DeviceOutOfMemory, InputError, StorageFull, counted

REPOSITORY = Path(__file__).parents[3]
CLASSES = {name: each for name, each in vars(errors).items() if inspect.isclass(each) and issubclass(each, CtflowError)}
TABLE = {(reason, each.__name__, str(each.exit_code)) for each in CLASSES.values() for reason in sorted(each.REASONS)}


def calls():
    """Every call in the code that raises errors, with its file."""
    for folder in ("src", "app", "operators"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            yield from ((path.relative_to(REPOSITORY), node) for node in nodes if isinstance(node, ast.Call))


CALLS = tuple(calls())


def error_class(call):
    return CLASSES.get(call.func.id) if isinstance(call.func, ast.Name) else None


def words(call):
    """The literal strings that a call is given."""
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    return {node.value for each in given for node in ast.walk(each) if isinstance(node, ast.Constant)}


def test_every_error_is_made_with_a_reason_of_its_class():
    made = [(file, call, kind) for file, call in CALLS if (kind := error_class(call)) is not None]
    assert len(made) > 200
    wrong = []
    for file, call, kind in made:
        reason = next((keyword.value for keyword in call.keywords if keyword.arg == "reason"), None)
        literal = reason.value if isinstance(reason, ast.Constant) else None
        if (reason is None and len(kind.REASONS) != 1) or (literal is not None and literal not in kind.REASONS):
            wrong.append(f"{file}:{call.lineno}: {kind.__name__} {literal}")
    assert wrong == []


def test_every_reason_is_raised_somewhere():
    given = set().union(*(words(call) for file, call in CALLS if file.name != "errors.py"))
    made = {kind for _, call in CALLS if (kind := error_class(call)) is not None}
    for kind in CLASSES.values():
        if len(kind.REASONS) == 1:
            assert kind in made
        else:
            assert given >= kind.REASONS, kind.__name__


def test_a_reason_belongs_to_one_class_and_is_written_in_kebab_case():
    reasons = [reason for reason, _, _ in TABLE]
    assert len(reasons) == len(set(reasons))
    assert [reason for reason in reasons if not re.fullmatch("[a-z]+(-[a-z0-9]+)*", reason)] == []


def test_the_documentation_explains_every_reason_and_no_other():
    text = (REPOSITORY / "docs" / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| `(\w+)` \| (\d+) \| ([^|]{8,}) \| ([^|]{6,}) \|$", text, re.MULTILINE)
    assert len(rows) == text.count("\n| `"), "a row is not written as the others"
    documented = [row[:3] for row in rows]
    assert sorted(documented) == sorted(TABLE)


@pytest.mark.parametrize(("reason", "name"), [row[:2] for row in sorted(TABLE)])
def test_an_error_keeps_its_reason_between_processes(reason, name):
    error = pickle.loads(pickle.dumps(CLASSES[name]("series 0123: what is wrong", reason=reason)))
    assert (type(error), error.reason, str(error)) == (CLASSES[name], reason, "series 0123: what is wrong")
    assert error.described == f"{name} [{reason}]: series 0123: what is wrong"


def test_a_class_of_one_reason_needs_none_and_another_does():
    assert DeviceOutOfMemory("cuda:0 is full").reason == "out-of-memory"
    assert StorageFull("the disk is full").reason == "disk-full"
    for kind, reason in ((BrokenSeries, None), (BrokenSeries, "no-such-reason"), (InputError, "gap")):
        with pytest.raises(ValueError, match="unknown reason"):
            kind("what is wrong", reason=reason)


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        (0, ("slice",), "0 slices"), (1, ("slice",), "1 slice"), (2, ("slice",), "2 slices"),
        (1, ("slice lies", "slices lie"), "1 slice lies"), (3, ("slice lies", "slices lie"), "3 slices lie"),
    ],
)  # fmt: skip
def test_one_thing_is_not_several(count, names, expected):
    assert counted(count, *names) == expected
