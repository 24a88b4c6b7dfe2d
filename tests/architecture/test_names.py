"""One name means one thing in the whole project, retired words stay away, and modules and packages stay small."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from source_support import sources

# Public functions of several modules with one name, and why: each is one thing said by several modules.
SHARED = {
    **dict.fromkeys(
        ("check_settings", "is_available", "open_backend", "precisions"),
        "of `Backend`: one of each backend",
    ),
    "main": "where a process begins",
}
MOST_LINES, MOST_MODULES = 400, 12  # give or take a few lines: a module is split where it answers two questions
RETIRED = {"ladder", "foreman", "courier", "crew", "stray"}  # nowhere but in the changelog
RETIRED_PHRASES = ("stands twice", "is none of")
RETIRED_IDENTIFIERS = RETIRED | {"house", "door", "trip", "upright", "ear"}  # words with ordinary meanings, too
ALIASES = (ast.Subscript, ast.BinOp, ast.Attribute, ast.Name)


@cache
def trees(repository: Path) -> dict[str, ast.Module]:
    return {place: source.tree for place, source in sources(repository).items()}


def classes_of(tree: ast.Module) -> set[str]:
    """Classes and aliases of types, without leading underscores."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ALIASES):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name.lstrip("_") for name in found if re.search("^_*[A-Z].*[a-z]", name)}


def functions_of(tree: ast.Module) -> set[str]:
    functions = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name for node in functions if not node.name.startswith("_")}


def places_of_twins(names_of, repository: Path) -> dict[str, list[str]]:
    places = defaultdict(list)
    for place, tree in trees(repository).items():
        for name in names_of(tree):
            places[name].append(place)
    assert len(places) > 200, "it looked at nothing"
    return {name: found for name, found in places.items() if len(found) > 1}


def test_one_class_name_means_one_thing(repository):
    assert places_of_twins(classes_of, repository) == {}


def test_one_public_function_name_means_one_thing(repository):
    assert places_of_twins(functions_of, repository).keys() == SHARED.keys()


@pytest.mark.parametrize("text", ["class _A: ...", "class Aa: ...", "Aa = tuple[int, str]", "_Aa = B | C", "Aa = b.C"])
def test_a_class_or_alias_is_found(text):
    assert classes_of(ast.parse(text + "\nclass Ab: ...")) >= {"Ab"} | ({"Aa"} if "Aa" in text else set())


def identifiers_of(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        for field in ("name", "arg", "id", "attr", "asname"):
            value = getattr(node, field, None)
            found |= {value} if isinstance(value, str) else set()
    return found


def words_of(identifier: str) -> set[str]:
    words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}
    return words | {word.removesuffix("s") for word in words}


def tracked(repository: Path) -> list[str]:
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (repository / name).is_file()]


def test_no_identifier_and_no_file_has_a_retired_word(repository):
    names = tracked(repository)
    found = {name for name in names if words_of(name) & RETIRED_IDENTIFIERS}
    for name in names:
        if name.endswith(".py") and Path(name).name != Path(__file__).name:
            tree = ast.parse((repository / name).read_text(encoding="utf-8"))
            found |= {f"{name}: {each}" for each in identifiers_of(tree) if words_of(each) & RETIRED_IDENTIFIERS}
    assert found == set()


def retired_in(text: str) -> set[str]:
    phrases = [phrase.replace(" ", r"\s+") for phrase in RETIRED_PHRASES]
    retired = re.compile(rf"(?<![a-z])((?:{'|'.join(sorted(RETIRED))})s?|{'|'.join(phrases)})(?![a-z])", re.IGNORECASE)
    return {match[0] for match in retired.finditer(text)}


def test_no_file_has_a_retired_word_in_its_text(repository):
    found = set()
    for name in tracked(repository):
        if name != "CHANGELOG.md" and Path(name).name != Path(__file__).name:
            text = (repository / name).read_bytes().decode("utf-8", "ignore")
            found |= {f"{name}: {each}" for each in retired_in(text)}
    assert found == set()


@pytest.mark.parametrize("text", ["'x' is none of a, b", "a key stands\n    twice", "the Couriers", "a_stray"])
def test_a_retired_word_or_phrase_in_a_text_is_found(text):
    assert retired_in(text)


def test_a_text_without_a_retired_word_is_passed():
    assert not retired_in("bladder, screws, astray, is one of a, b")


@pytest.mark.parametrize("text", ["class Crew: ...", "strays = 1", "a.on_ladder", "def f(door): ...", "LEAST_EAR = 1"])
def test_a_retired_word_is_found(text):
    assert any(words_of(each) & RETIRED_IDENTIFIERS for each in identifiers_of(ast.parse(text)))


@pytest.mark.parametrize("text", ["bladder = 1", "outdoors = 1", "linear = a.appear", "strip = triple"])
def test_a_word_that_holds_one_is_none(text):
    assert not any(words_of(each) & RETIRED_IDENTIFIERS for each in identifiers_of(ast.parse(text)))


def modules(repository: Path) -> list[Path]:
    return [path for folder in ("src", "operators", "app") for path in (repository / folder).rglob("*.py")]


def test_modules_are_short(repository):
    lines = {path: path.read_text("utf-8").count("\n") for path in modules(repository)}
    assert {path.name: count for path, count in lines.items() if count > MOST_LINES + 10} == {}


def test_packages_have_few_modules_at_a_level(repository):
    counts = defaultdict(int)
    for path in modules(repository):
        counts[path.parent.relative_to(repository).as_posix()] += path.name != "__init__.py"
    assert len(counts) > 30
    assert {package: count for package, count in counts.items() if count > MOST_MODULES} == {}
