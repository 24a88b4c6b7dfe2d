"""Expressions: what Python gives, or a rejection; never anything executed, unbounded or slow."""

from __future__ import annotations

import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctflow.bundle.config import Config
from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.expressions.values import NameValue
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

FILE = "configs/inference.json"
SCOPE = {"highres": True, "sizes": [96, 96, 32], "root": "a", "labels": {"liver": 1, "spleen": 2}, "none": None}


def value(text, files=None, **more):
    config = Config({**SCOPE, **more, "x": text}, FILE, files)
    return config.plain(config.top("x"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$[1.5, 1.5, 1.5] if @highres else [3.0, 3.0, 3.0]", [1.5, 1.5, 1.5]),
        ("$@root + '/models/' + ('m.pt' if @highres else 'low.pt')", "a/models/m.pt"),
        ("$len(@sizes)", 3),
        ("$ max(@sizes) * 2 - @sizes[-1] // 3", 182),
        ("$tuple(s // 2 for s in @sizes if s > 32)", [48, 48]),
        ("$list(set([i + 1 for i in range(9)]) - set([2, 4]))", [1, 3, 5, 6, 7, 8, 9]),
        ("$list(range(3, 5)) + list(range(6, 8)) + [9]", [3, 4, 6, 7, 9]),
        ("$sorted(@labels.values())[::-1]", [2, 1]),
        ("${k.upper(): v for k, v in @labels.items() if v != 1}", {"SPLEEN": 2}),
        ("$f'{@root}-{@sizes[2]:03d}'", "a-032"),
        ("$'%s/%02d' % (@root, 7)", "a/07"),
        ("$'{}_{}'.format(@root, 1)", "a_1"),
        ("$@labels#liver + @labels::spleen", 3),
        ("$not @none and 1 < 2 <= 2 and 'a' in 'cat'", True),
        ("$[[a, b] for a, b in zip([1, 2], [3, 4])]", [[1, 3], [2, 4]]),
        ("$torch.float32", "torch.float32"),
        ("$monai.utils.BlendMode.GAUSSIAN", "gaussian"),
        ("$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')", "torch.device"),
        ("$os.path.join(@root, 'models', 'model.pt')", "a/models/model.pt"),
        ("$2 ** 10 + round(2.567, 1) + abs(-1)", 1027.6),
        ("$@root", "a"),
        ("$copy.deepcopy(@sizes)", [96, 96, 32]),
    ],
)
def test_the_subset_gives_what_python_gives(text, expected):
    assert value(text) == expected


def test_an_element_type_is_a_name_and_no_text():
    assert isinstance(value("$torch.float32"), NameValue)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("$__import__('os').system('x')", "__import__"),
        ("$open('/etc/passwd').read()", "open('/etc/passwd')"),
        ("$().__class__.__bases__", "().__class__"),
        ("$(lambda: 1)()", "lambda"),
        ("$@labels.__class__", "@labels.__class__"),
        ("$[x for x in @sizes for y in missing]", "missing"),
        ("$1 +", "1 +"),
        ("$10 ** 10 ** 10", "10 ** 10"),
        ("$9 ** 64", "9 ** 64"),
        ("$'a' * 10 ** 9", "'a' * 10 ** 9"),
        ("$[0] * 10_001 * 10_001", "[0] * 10_001"),
        ("$list(range(10 ** 12))", "range(10 ** 12)"),
        ("$sum(range(100_000))", "range(100_000)"),
        ("$[i for i in range(9999) for j in range(9999)]", ""),
        ("$'%99999d' % 1", "%99999d"),
        ("$f'{1:99999d}'", ""),
        ("$'{0.__class__}'.format(1)", ""),
        ("$1 / 0", "1 / 0"),
        ("$@sizes[7]", "@sizes[7]"),
        ("$'@root'", "a text"),
        ("$'$' + 'x'", "begins with $"),
        ("${1, 2}", "a set"),
        ("$torch.load('../x.pt')", "../x.pt"),
        ("$torch.load('/etc/passwd')", "/etc/passwd"),
        ("$pathlib.Path('x').unlink()", "unlink"),
        ("$torch.cuda.is_available()", "torch.cuda.is_available"),
        ("$@x + 1", "of itself"),
        ("$" + "-" * 3000 + "1", ""),
        ("$" + "(" * 300 + ")" * 300, ""),
        ("$1" + " + 1" * 3000, ""),
        ("$(y := 3)", ""),
        ("$[*@sizes, *1]", "1"),
        ("$\0", ""),
        ("$a" + ".b" * 1900, ""),
        ("$np.array([32]) * 3", "np.array([32]) * 3"),  # 96, where a list would be [32, 32, 32]
        ("$np.array([1, 2]) + np.array([3, 4])", "+"),
        ("$torch.tensor([1, 2, 3])[0:2] * 2", "*"),
        ("$np.array([[1, 2]])[0] * 2", "*"),
        ("$np.array([1, 2]) == [1, 2]", "=="),
    ],
)
def test_anything_else_is_rejected_with_the_key_the_text_and_the_part(text, part, tmp_path):
    began = time.perf_counter()
    reason = "reference" if part == "of itself" else "expression"
    with raises_reason(BundleInvalid, reason, names=(f"{FILE}: x ", part)):
        value(text, BundleFiles(tmp_path))
    assert time.perf_counter() - began < 2


def test_files_of_the_bundle_are_read_and_no_others(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "labels.json").write_text('{"0": {"name": "liver"}}')
    torch.save({"code": np.array([[1, 0], [0, 1]]), "t": torch.ones(2)}, tmp_path / "models" / "code.pt")
    files = BundleFiles(tmp_path)
    loaded = "$json.loads(pathlib.Path(@bundle_root + '/labels.json').read_text())"
    assert value("$@meta['0']['name']", files, meta=loaded) == "liver"
    code = "$torch.load(@bundle_root + '/models/code.pt', map_location=torch.device('cuda'))"
    assert value("$@arch['code'].tolist() + [len(@arch)]", files, arch=code) == [[1, 0], [0, 1], 2]
    np.testing.assert_array_equal(value("$torch.from_numpy(@arch['code'])", files, arch=code), np.eye(2))
    torch.save(torch.zeros(1).expand(40_000_000), tmp_path / "wide.pt")  # a file of 1.3 kB
    with raises_reason(BundleInvalid, "expression", names="tolist"):
        value("$torch.load('wide.pt').tolist()", files)
    with zipfile.ZipFile(tmp_path / "models" / "code.pt") as saved:
        members = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with raises_reason(BundleInvalid, "weights", names="compressed"):
        value("$torch.load('small.pt')", files)
    (tmp_path / "out").symlink_to("/etc")
    with raises_reason(BundleInvalid, "expression", names="outside the bundle"):
        value("$torch.load('out/passwd')", files)

    class Exploit:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"a": Exploit()}, tmp_path / "models" / "evil.pt")
    with raises_reason(BundleInvalid, "expression", names="evil.pt"):
        value("$torch.load('models/evil.pt')", files)


NUMBERS = st.integers(-40, 40).map(str) | st.floats(-9, 9, allow_nan=False).map(repr)
TEXTS = st.sampled_from(["''", "'ab'", "'c'"])


def _grown(inner):
    pair = st.tuples(inner, inner)
    operators = st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "<", "<=", "==", "!=", "and", "or", "in", "is"])
    return (
        st.tuples(inner, operators, inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})")
        | st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})")
        | st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(
            st.sampled_from(
                ["len", "int", "float", "str", "bool", "list", "tuple", "sorted", "min", "max", "sum", "abs"]
            ),
            inner,
        ).map(lambda t: f"{t[0]}({t[1]})")
        | pair.map(lambda t: f"{t[0]}[{t[1]}]")
        | pair.map(lambda t: f"[i for i in {t[0]} if {t[1]}]")
        | inner.map(lambda t: f"(not {t})")
    )


@settings(max_examples=400, deadline=None)
@given(st.recursive(NUMBERS | TEXTS | st.sampled_from(["True", "None", "[1, 2]"]), _grown, max_leaves=8))
def test_what_is_computed_is_what_python_computes(text):
    try:
        found = value(f"${text}")
    except BundleInvalid as error:
        assert error.reason == "expression"
        return
    import warnings  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = eval(text, {"__builtins__": __builtins__})  # of the strategies above
    assert found == (list(expected) if isinstance(expected, tuple) else expected)


WORDS = st.sampled_from(
    [
        "@x",
        "@sizes",
        "@labels",
        "torch",
        ".",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        "+",
        "-",
        "*",
        "**",
        "/",
        "%",
        "if",
        "else",
        "for",
        "in",
        "lambda",
        "'a'",
        "1",
        "9",
        "load",
        "range",
        "list",
        "__class__",
        "f'{1}'",
        ":=",
        "yield",
        "await",
        "not",
        "is",
        "==",
        ";",
        "\n",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS | st.text(max_size=3), max_size=14).map(" ".join) | st.text(max_size=40))
def test_any_text_ends_as_a_value_or_a_rejection(text):
    try:
        value(f"${text}")
    except BundleInvalid as error:
        assert error.reason in ("expression", "reference", "value")
        assert len(str(error)) < 1000
