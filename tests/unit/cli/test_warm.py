"""`ctflow warm` prepares what a first run waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import cache_from_source

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.main import main
from ctflow.core.requirements import compile_imported


@pytest.fixture
def warmed(tmp_path, monkeypatch, capsys):
    """The lines that `warm` of some words prints."""
    monkeypatch.setenv("CTFLOW_DEVICE", "cpu")
    bundle = small_unet_bundle(tmp_path / "small")

    def warm(*words, code=0) -> list[str]:
        assert main(["warm", "-m", str(bundle), "--cache", str(tmp_path / "cache"), *words]) == code
        return capsys.readouterr().out.splitlines()

    return warm


def test_an_engine_is_made_compared_and_opened_once(warmed, tmp_path):
    lines = warmed("--engine", "openvino")
    assert [line.partition(":")[0] for line in lines] == ["model", "agreement", "engine", "byte code"]
    assert "openvino fp32 with PyTorch in fp32 on 4 windows" in lines[1]
    (made,) = (tmp_path / "cache").glob("onnx-*/engine.onnx")
    before = made.stat().st_mtime_ns
    assert warmed("--engine", "openvino")[0] == lines[0]
    assert made.stat().st_mtime_ns == before


def test_the_reference_is_opened_without_a_comparison(warmed):
    lines = warmed("--engine", "eager")
    assert [line.partition(":")[0] for line in lines] == ["model", "engine", "byte code"]


def test_what_cannot_be_prepared_ends_with_the_exit_code_of_a_run(warmed, tmp_path):
    warmed("--engine", "nothing", code=64)
    warmed("--engine", "tensorrt", code=4)
    (tmp_path / "small" / "models" / "model.pt").unlink()
    warmed("--engine", "eager", code=3)
    assert main(["warm", "-m", str(tmp_path / "none")]) == 3


PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); import a_module\n"
    "from ctflow.core.requirements import compile_imported; print(*compile_imported())"
)


def test_modules_without_byte_code_get_it_where_python_was_told_to_write_none(tmp_path):
    source = tmp_path / "a_module.py"
    source.write_text("VALUE = 1\n")
    target = cache_from_source(str(source))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "-c", PROGRAM, tmp_path]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) >= 1
    assert os.path.exists(target)  # noqa: PTH110
    again = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.split()[0] == "0"


def test_a_folder_that_cannot_be_written_is_counted(tmp_path, monkeypatch):
    source = tmp_path / "another_module.py"
    source.write_text("VALUE = 1\n")
    (tmp_path / "__pycache__").write_text("a file where the folder would be")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("another_module")
    try:
        assert compile_imported()[1] >= 1
    finally:
        del sys.modules["another_module"]
