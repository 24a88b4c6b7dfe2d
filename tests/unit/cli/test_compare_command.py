from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from bundle_support import small_unet_bundle
from ctflow.cli.main import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


def test_a_comparison_is_shown_drawn_and_written(bundle, tmp_path, capsys):
    options = [
        "--shape",
        "120,64,64",
        "--repeats",
        "1",
        "--overlap",
        "0",
        "--configurations",
        "1,eager-fp32",
        "--device",
        "cpu",
    ]
    assert main(["bench", "compare", "-m", str(bundle), *options, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out.splitlines()
    document = json.loads(shown[-1])
    assert [configuration["id"] for configuration in document["configurations"]] == ["1", "eager-fp32"]
    assert any("the article's loop" in line for line in shown[:-1])
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == document
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    "given",
    [
        ["--python", "4"],
        ["--python", "=x"],
        ["--python", "4=/no/such"],
        ["--configurations", "0q"],
        ["--shape", "1,2"],
        ["--shape", "1,2,3"],
        ["--only-kept"],
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(bundle, given, capsys):
    assert main(["bench", "compare", "-m", str(bundle), "--device", "cpu", *given]) == 64
    assert "SettingsInvalid" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--configurations", "0q"], ["--shape", "1,2,3"], ["--only-kept"]])
def test_a_refused_comparison_makes_no_folder(bundle, tmp_path, given):
    words = ["bench", "compare", "-m", str(bundle), "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main([*words, *given]) == 64
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_ends_before_the_work(bundle, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["bench", "compare", "-m", str(bundle), "--device", "cpu", "-o", str(tmp_path / "file" / "x")]) == 5
    assert "NotWritten [unwritable]" in capsys.readouterr().err


def test_files_that_cannot_be_written_have_a_name(bundle, tmp_path, capsys):
    (tmp_path / "configurations").touch()
    assert main(["bench", "compare", "-m", str(bundle), "--device", "cpu", "-o", str(tmp_path)]) == 5
    assert "the comparison's files" in capsys.readouterr().err


def test_a_program_is_found_from_where_the_command_is_given(bundle, tmp_path, monkeypatch, capsys):
    (tmp_path / "python").write_text("#!/bin/sh\necho not today\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    options = ["--shape", "24,32,32", "--configurations", "0a", "--python", "0a=./python", "--device", "cpu"]
    assert main(["bench", "compare", "-m", str(bundle), *options]) == 6
    (configuration,) = json.loads(capsys.readouterr().out.splitlines()[-1])["configurations"]
    assert configuration["reason"] == "its process ended with 3: not today"


def is_running(pid: int) -> bool:
    """Whether it is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's list of processes")
def test_a_comparison_that_is_ended_takes_its_configuration_along(bundle, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.part; mv {tmp_path}/pid.part {tmp_path}/pid\nexec sleep 300\n"
    )
    python.chmod(0o755)
    options = [
        "--shape",
        "24,32,32",
        "--configurations",
        "0a",
        "--python",
        f"0a={python}",
        "--device",
        "cpu",
        "-m",
        str(bundle),
    ]
    script = "import sys; from ctflow.cli.main import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", script, "bench", "compare", *options], stderr=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.05)
        configuration = int((tmp_path / "pid").read_text())
        assert is_running(configuration)
        run.terminate()
        assert run.wait(timeout=60) not in (0, -signal.SIGTERM)
    assert not is_running(configuration)
