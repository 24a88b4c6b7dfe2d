"""A misspelt variable is named, and nothing that others set is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ctflow.settings.run import OPTIONS, settings_from_values
from ctflow.settings.variables import _warn

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _nothing_was_said():
    _warn.cache_clear()


def said_of(*names: str, caplog: pytest.LogCaptureFixture) -> list[str]:
    settings_from_values({}, {"HOME": "/home/a", **dict.fromkeys(names, "")})
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("CTFLOW_SEGG", "do you mean CTFLOW_SEG?"),
        ("CTFLOW_seg", "do you mean CTFLOW_SEG?"),
        ("CTFLOW_ALLOWGAPS", "do you mean CTFLOW_ALLOW_GAPS?"),
        ("CTFLOW_XYZ", "no option has this name"),
    ],
)
def test_an_unknown_variable_is_named_once_with_the_nearest(name, hint, caplog):
    line = f"the environment variable '{name}' is ignored: {hint}"
    assert said_of(name, caplog=caplog) == [line]
    assert said_of(name, caplog=caplog) == [line]


def test_its_value_is_not_said(caplog):
    settings_from_values({}, {"HOME": "/home/a", "CTFLOW_PASSWORD": "secret"})
    assert "CTFLOW_PASSWORD" in caplog.text
    assert "secret" not in caplog.text


def test_options_and_what_kubernetes_sets_are_known(caplog):
    of_services = ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_DICOM", "PORT", "PORT_104_TCP", "PORT_104_TCP_ADDR")
    others = [f"CTFLOW_{node}{each}" for node in ("", "NODE_") for each in of_services]
    names = (*(option.variable for option in OPTIONS), *others, "CTFLOWX", "HOLOSCAN_INPUT_PATH")
    assert said_of(*names, caplog=caplog) == []


def test_every_variable_of_the_repository_is_known(caplog):
    files = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    texts = [REPOSITORY / each for each in files.split() if not each.startswith("tests/unit/settings/")]
    found = {
        name
        for path in texts
        if path.is_file() and path.suffix in {"", ".md", ".py", ".service", ".sh", ".yaml", ".yml"}
        for name in re.findall(r"\bCTFLOW_[A-Z][A-Z_]+\b", path.read_text(errors="replace"))
    }
    assert "CTFLOW_RECORD" in found
    assert said_of(*found, caplog=caplog) == []
