"""Paths that the system refuses to look at: a message, not a bug's."""

from __future__ import annotations

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.mark.parametrize(
    "words",
    [
        ["run", "-i", "PATH", "-o", "out", "-m", "BUNDLE", "--device", "cpu"],
        ["run", "-i", ".", "-o", "PATH", "-m", "BUNDLE", "--device", "cpu"],
        ["run", "-i", ".", "-o", "out", "-m", "PATH", "--device", "cpu"],
        ["inspect", "PATH"],
        ["inspect-model", "PATH"],
        ["phantom", "PATH"],
        ["evaluate", "PATH", "-m", "BUNDLE", "--device", "cpu"],
        ["exec", "PATH", "-i", ".", "-o", "out"],
        ["export", "-m", "PATH"],
        ["bench", "compare", "-m", "BUNDLE", "--device", "cpu", "-o", "PATH"],
        ["cohort", "manifest", "PATH", "-o", "manifest.csv"],
        ["cohort", "run", "PATH", "-o", "out"],
        ["cohort", "report", "PATH"],
        ["rules", "test", "PATH"],
        ["serve", "-c", "PATH"],
    ],
    ids=" ".join,
)
def test_a_path_that_the_system_refuses_has_a_named_error(words, bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"PATH": "x" * 300, "BUNDLE": str(bundle)}  # a name that no file can have
    assert main([given.get(word, word) for word in words]) in {2, 3, 5, 64}
    assert "File name too long" in (said := capsys.readouterr().err) or "neither a Python file" in said
