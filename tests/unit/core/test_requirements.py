"""Packages of the wrong version end a command in one line, before they end it in a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from ctflow.app.__main__ import main as run_application

import ctflow.core.requirements
from ctflow.cli.main import main
from ctflow.cli.start import main as start
from ctflow.core.errors import RequirementUnmet
from ctflow.core.requirements import check_requirements, version_problem
from ctflow.engines.registry import backends
from reasons import raises_reason


@pytest.fixture
def installed(monkeypatch):
    """Installed versions by name, as a test wants them."""
    real, changed = ctflow.core.requirements._installed, {}
    monkeypatch.setattr(ctflow.core.requirements, "_installed", lambda name: changed.get(name, real(name)))
    return changed


def test_what_is_installed_here_fits():
    for extra in ("", "holoscan", "serve"):
        check_requirements(extra)
    assert version_problem("openvino") == ""


def test_the_message_names_package_version_range_and_command(installed):
    installed |= {"monai": "1.6.0", "scipy": ""}
    with raises_reason(RequirementUnmet, "requirement-unmet") as caught:
        check_requirements()
    message = str(caught.value)
    assert "monai 1.6.0 is installed, and ctflow needs monai <1.7,>=1.6.1" in message
    assert "the package scipy is not installed" in message
    assert "pip install 'monai<1.7,>=1.6.1' 'scipy>=" in message
    assert "\n" not in message


@pytest.mark.parametrize("fits", ["2.13.0+cpu", "2.12.0a0+79aa17489c.nv25.4", "2.11.0rc1"])
def test_a_build_of_others_counts_as_its_release(installed, fits):
    installed["torch"] = fits
    check_requirements()


@pytest.mark.parametrize("bad", ["2.10.1", "no version"])
def test_an_older_or_unreadable_version_does_not_fit(installed, bad):
    installed["torch"] = bad
    with raises_reason(RequirementUnmet, "requirement-unmet", names="torch"):
        check_requirements()


def test_a_command_ends_with_exit_code_4_and_one_line(installed, capsys):
    installed["monai"] = "1.7.2"
    assert start() == 4
    said = capsys.readouterr().err
    assert said.startswith("ctflow: RequirementUnmet [requirement-unmet]: monai 1.7.2")
    assert said.count("\n") == 1


def test_sigterm_is_an_interrupt_while_packages_are_still_imported(monkeypatch, capsys):
    monkeypatch.setattr("ctflow.cli.start.check_requirements", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert start() == 130
    assert capsys.readouterr().err == "ctflow: interrupted\n"


def test_packages_are_checked_before_they_are_imported():
    program = "import sys, ctflow.cli.start; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    needed = {"click", "highdicom", "monai", "numpy", "pydicom", "rich", "scipy", "torch"}
    assert not needed & set(done.stdout.split())


def test_the_application_says_that_holoscan_is_missing(installed, capsys, tmp_path):
    installed["holoscan-cu13"] = ""
    assert run_application(["-i", str(tmp_path), "-o", str(tmp_path / "out")]) == 4
    assert "holoscan-cu13" in capsys.readouterr().err


def test_the_node_says_that_its_packages_are_of_another_version(installed, capsys):
    installed["pynetdicom"] = "3.1.0"
    assert main(["serve", "--check"]) == 4
    assert "pynetdicom 3.1.0" in capsys.readouterr().err


def test_an_engine_of_another_version_is_not_available(installed):
    installed["onnxruntime"] = "1.2.0"
    found = {name: (available, reason) for name, available, reason in backends()}
    available, reason = found["onnxruntime"]
    assert not available
    assert "onnxruntime 1.2.0" in reason
    assert "pip install 'ctflow[onnxruntime]'" in reason


def test_code_without_metadata_is_not_checked(monkeypatch):
    def absent(_name: str) -> None:
        raise ctflow.core.requirements.PackageNotFoundError

    monkeypatch.setattr(ctflow.core.requirements, "requires", absent)
    ctflow.core.requirements._requirements.cache_clear()
    try:
        check_requirements()
    finally:
        monkeypatch.undo()
        ctflow.core.requirements._requirements.cache_clear()
