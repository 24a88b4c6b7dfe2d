from __future__ import annotations

import json

import pytest
from PIL import Image

from bundle_support import small_unet_bundle
from ctflow.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


def test_a_ladder_is_shown_drawn_and_written(bundle, tmp_path, capsys):
    options = ["--shape", "120,64,64", "--repeats", "1", "--overlap", "0", "--rows", "1,eager-fp32", "--device", "cpu"]
    assert main(["bench", "ladder", "-m", str(bundle), *options, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    document = json.loads(shown[-1])
    assert [row["id"] for row in document["rows"]] == ["1", "eager-fp32"]
    assert any("the article's loop" in line for line in shown[:-1])
    assert json.loads((tmp_path / "out" / "ladder.json").read_text()) == document
    with Image.open(tmp_path / "out" / "ladder.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("given", [["--python", "4"], ["--python", "=x"], ["--rows", "0q"], ["--shape", "1,2"]])
def test_wrong_arguments_are_refused_by_name(bundle, given, capsys):
    assert main(["bench", "ladder", "-m", str(bundle), "--device", "cpu", *given]) == 64
    assert "SettingsInvalid" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_ends_before_the_work(bundle, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "ladder", "-m", str(bundle), "--device", "cpu", "-o", str(tmp_path / "file" / "x")]) == 5
    assert "NotWritten" in capsys.readouterr().err


def test_files_that_cannot_be_written_have_a_name(bundle, tmp_path, capsys):
    (tmp_path / "rows").touch()
    assert main(["bench", "ladder", "-m", str(bundle), "--device", "cpu", "-o", str(tmp_path)]) == 5
    assert "the ladder's files" in capsys.readouterr().err
