from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctflow.core.errors import SettingsInvalid
from ctflow.settings.document import given_in_file
from ctflow.settings.schema import (
    FilePath,
    Group,
    Key,
    Refused,
    Switch,
    Text,
    documented,
    effective,
    key_text,
    real,
    size,
    size_text,
    whole,
)
from reasons import raises_reason


@dataclass(frozen=True)
class Inner(Group):
    number: Annotated[int, whole(1, 9), Key("A number.")] = 3
    word: Annotated[Text, Key("A word.")] = "blue"


@dataclass(frozen=True)
class Outer(Group):
    MEANT = {"most": "many"}  # noqa: RUF012

    must: Annotated[Text, Key("A word.")]
    inner: Annotated[Inner, Key("More.")] = Inner()
    many: Annotated[tuple[Text, ...], Key("Words.", most=3)] = ()
    on: Annotated[Switch, Key("Whether.")] = False
    share: Annotated[float, real(0, 2), Key("How much.")] = 1.0
    room: Annotated[int, size(0, 10**12), Key("Bytes.")] = 0
    colour: Annotated[Literal["red", "green"], Key("Colour.")] = "red"
    file: Annotated[FilePath, Key("A file.")] = Path("x")
    groups: Annotated[tuple[Inner, ...], Key("Several.")] = ()


def read(tmp_path, content, kind=Outer):
    file = tmp_path / "node.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return given_in_file(file).read(kind)


def test_values_are_of_the_kind_that_the_key_has(tmp_path):
    found = read(
        tmp_path,
        "must: NO\nmany: [010, on, 'a b']\non: true\nshare: 0.5\nroom: 20 GB\ncolour: green\nfile: a/b\n"
        "inner: {number: 4}",
    )
    assert found == Outer(
        "NO", Inner(4), ("010", "on", "a b"), True, 0.5, 20 * 10**9, "green", tmp_path.absolute() / "a/b"
    )


def test_one_value_alone_is_a_list_of_one(tmp_path):
    assert read(tmp_path, "must: x\nmany: y").many == ("y",)


def test_a_group_or_list_whose_lines_are_comments_is_the_default(tmp_path):
    assert read(tmp_path, "must: x\ninner:\n  # number: 4\nmany:\n") == Outer("x")


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "null\n"])
def test_a_file_without_a_value_gives_the_defaults(tmp_path, content):
    assert read(tmp_path, content, Inner) == Inner()


def test_every_value_is_shown_with_the_line_that_says_it(tmp_path):
    file = tmp_path / "node.yaml"
    file.write_text("must: x\nroom: 1000\ngroups:\n  - number: 4\nmany: y\ninner: {word: z}")
    given = given_in_file(file)
    shown = {key_text(loc): (value, given.origin(loc)) for loc, value in effective(given.read(Outer))}
    assert shown == {
        "must": ("x", "line 1"),
        "inner.number": ("3", "default"),
        "inner.word": ("z", "line 6"),
        "many": ("y", "line 5"),
        "on": ("false", "default"),
        "share": ("1", "default"),
        "room": ("1 kB", "line 2"),
        "colour": ("red", "default"),
        "file": ("x", "default"),
        "groups[1].number": ("4", "line 4"),
        "groups[1].word": ("blue", "default"),
    }


def test_every_key_is_documented_with_its_default():
    assert [(row.name, row.default) for row in documented(Outer)] == [
        ("must", "must be given"), ("inner.number", "3"), ("inner.word", "blue"), ("many", "none"), ("on", "false"),
        ("share", "1"), ("room", "0"), ("colour", "red"), ("file", "x"), ("groups", "none"),
        ("groups[].number", "3"), ("groups[].word", "blue"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "reason", "names"),
    [
        ("must: x\ninner:\n  numbr: 3", "unknown-key", ("line 3: inner.numbr:", "number")),
        ("must: x\nIn-ner: 3", "unknown-key", ("line 2: In-ner:", "inner")),
        ("must: x\nmost: 3", "unknown-key", ("line 2: most:", "many")),
        ("must: x\ncolour: [red]", "invalid-value", "line 2: colour: must be text, not a list"),
        ("must: x\ngroups: {number: 0}", "invalid-value", ("line 2: groups.number:", "from 1 to 9", "'0'")),
        ("must: x\ngroups:\n  - {number: 2}\n  - {wrd: a}", "unknown-key", ("line 4: groups[2].wrd:", "word")),
        ("must: x\nshare: 3\ninner: {number: 0}", "invalid-value", "line 2: share: "),
        ("must: x\ninner: {number: 0}\nshare: 3", "invalid-value", "line 2: inner.number:"),
        ("mst: x", "unknown-key", ("line 1: mst:", "must")),
        ('must: x\n"\\e[31m": 3', "unknown-key", ("line 2:", "'\\x1b[31m'")),
        ("must: x\n? " + "k" * 200 + "\n: 3", "unknown-key", f"line 3: '{'k' * 40}...': unknown key; there are "),
        ('must: x\n"": 3', "unknown-key", "line 2: '': unknown key; there are "),
        ("must: x\non: [true]", "invalid-value", "line 2: on: must be true or false, not a list"),
        ("must: x\nMUST: 3", "unknown-key", ("line 2: MUST:", "must")),
        (
            "must: x\nzzz: 3",
            "unknown-key",
            "line 2: zzz: unknown key; there are colour, file, groups, inner, many, must, on, room, share",
        ),
        ("must: x\n\nmust: y", "duplicate-key", ("line 3:", "'must'", "line 1")),
        ("on: true", "missing-key", "line 1: the key must is missing"),
        ("must:", "invalid-value", "line 1: must: has no value"),
        ("must: [x]", "invalid-value", "line 1: must:"),
        ("must: {a: b}", "invalid-value", "line 1: must: must be text, not a group of keys"),
        ("must: ' '", "invalid-value", "must: must be one line of 1 to 400 letters"),
        ('must: "a\\nb"', "invalid-value", "must: must be one line"),
        ("must: " + "x" * 401, "invalid-value", "must:"),
        (
            "must: x\ninner: [1]",
            "invalid-value",
            "line 2: inner: must be a group of keys (`key: value` lines), not a list",
        ),
        ("must: x\ninner: 5", "invalid-value", ("line 2: inner:", "'5'")),
        ("must: x\ninner:\n  number: 10", "invalid-value", ("line 3: inner.number:", "from 1 to 9", "'10'")),
        ("must: x\ninner:\n  number: '3'", "invalid-value", "line 3: inner.number: must be a whole number"),
        ("must: x\ninner:\n  number: 1.0", "invalid-value", "line 3: inner.number:"),
        ("must: x\ninner:\n  number: 0x3", "invalid-value", "inner.number:"),
        ("must: x\ninner:\n  number: -3", "invalid-value", "inner.number:"),
        ("must: x\ninner:\n  number: ٣", "invalid-value", "inner.number:"),
        ("must: x\nmany: [a, ]\nshare: .nan", "invalid-value", ("line 3: share:", "from 0 to 2", "'.nan'")),
        ("must: x\nshare: 1e0", "invalid-value", "share: must be a number"),
        ("must: x\non: yes", "invalid-value", ("line 2: on:", "'yes'")),
        ("must: x\non: 'true'", "invalid-value", "on: must be true or false"),
        ("must: x\nroom: 5 apples", "invalid-value", ("room:", "'5 apples'")),
        ("must: x\nroom: 2 TB", "invalid-value", ("room:", "from 0 to 1", "'2 TB'")),
        ("must: x\ncolour: gren", "invalid-value", ("colour:", "'gren'", "(choose from red, green)", "green")),
        ("must: x\nmany: [a, b, c, d]", "invalid-value", "many: has 4 entries, more than 3"),
        ("must: x\nmany:\n  - a\n  -", "invalid-value", "line 4: many[2]: is empty"),
        ("must: x\nfile: ~/x", "invalid-value", "file: ~ is not followed"),
        ("- must", "invalid-value", "line 1:"),
        ("must: x\n? [a]\n: b", "invalid-value", "line 2: a key must be one word"),
        ("must: &a x\nmany: [*a]", "yaml", ("line 1:", "(& and *)")),
        ("must: !!python/object/apply:os.system [x]", "yaml", ("line 1:", "(!)")),
        ("must: !!str x", "yaml", ("line 1:", "(!)")),
        ("must: x\nmany: " + "[" * 30 + "]" * 30, "yaml", "line 2: nested too deeply"),
        ("must: x\nmany: [a", "yaml", "line 2: not YAML"),
        ("must: x\n\tmany: y", "yaml", "line 2:"),
        ("must: x\n---\nmust: y", "yaml", "line 2:"),
        ("must: x\nmany: \x07", "yaml", "line 2: a control character"),
        (b"must: x\nmany: \xff", "settings-file", "line 2: not UTF-8 text"),
        ("#" * 300_000, "settings-file", "larger than 256 kB"),
    ],
)
def test_what_is_wrong_is_named_with_file_line_and_key(tmp_path, content, reason, names):
    with raises_reason(SettingsInvalid, reason, names=names) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith("node.yaml")


def test_a_file_of_aliases_of_aliases_is_refused_at_once(tmp_path):
    """The billion laughs: 10 levels of 10 references each."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    with raises_reason(SettingsInvalid, "yaml", names="line 1"):
        read(tmp_path, "\n".join(lines))


def test_a_file_that_is_absent_or_a_folder_is_named(tmp_path):
    with raises_reason(SettingsInvalid, "settings-file", names=("none.yaml", "No such file")):
        given_in_file(tmp_path / "none.yaml")
    with raises_reason(SettingsInvalid, "settings-file", names="Is a directory"):
        given_in_file(tmp_path)


def test_what_a_group_itself_refuses_is_named_with_its_line(tmp_path):
    @dataclass(frozen=True)
    class Picky(Group):
        low: Annotated[int, whole(0, 9), Key("Low.")] = 0
        high: Annotated[int, whole(0, 9), Key("High.")] = 9

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError("low is above high")
            if self.high == 9:
                raise Refused("is too high", "high")

    with raises_reason(SettingsInvalid, "invalid-value", names="node.yaml, line 2: low is above high"):
        read(tmp_path, "# picky\nlow: 3\nhigh: 2", Picky)
    with raises_reason(SettingsInvalid, "invalid-value", names="node.yaml, line 3: high: is too high"):
        read(tmp_path, "# picky\nlow: 3\nhigh: 9", Picky)


@given(st.integers(0, 10**15))
def test_a_size_is_read_as_it_is_shown(count):
    unit = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "": 1}
    number, _, name = size_text(count).partition(" ")
    assert int(number) * unit[name] == count


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["must", "inner", "many", "on", "share", "room", "colour", "file", "number", "groups"])
relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@relaxed
@given(content=st.dictionaries(names, json_like, max_size=5).map(yaml.safe_dump) | st.text(max_size=80) | st.binary())
def test_any_file_gives_settings_or_the_named_error(tmp_path, content):
    try:
        assert isinstance(read(tmp_path, content if isinstance(content, bytes) else content.encode()), Outer)
    except SettingsInvalid as error:
        assert str(error).startswith("node.yaml")


@relaxed
@given(word=st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=30))
def test_any_quoted_word_is_read_as_written(tmp_path, word):
    quoted = yaml.safe_dump(word, allow_unicode=True, default_style='"', width=1000)
    assert read(tmp_path, f"must: {quoted}").must == word
