"""Whole processes on small inputs: a small phantom series, and the demonstration bundle on a coarse grid."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests_support import KEEPS_FREED_MEMORY

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENTRY_POINTS = ("run", "app", "exec", "monai-deploy")


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def entry_point() -> Run:
    """Runs ctflow through one of its entry points, as a user's shell would."""

    def run(
        name: str, words: Sequence[str | Path], environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = {
            "run": [BIN / "ctflow", "run"],
            "debug": [BIN / "ctflow", "--debug", "-l", "DEBUG", "run"],
            "app-debug": [sys.executable, "app", "--debug", "-l", "DEBUG"],
            "app": [sys.executable, "app"],
            "exec": [BIN / "ctflow", "exec", "app"],
            "monai-deploy": [BIN / "monai-deploy", "exec", "app"],
        }[name]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HOLOSCAN", "CTFLOW", "COV"))}
        clean |= KEEPS_FREED_MEMORY
        clean |= {key: os.environ[key] for key in ("CTFLOW_ENGINE", "CTFLOW_CACHE")}  # the tests' own
        return subprocess.run(
            [*prefix, *command, *words], cwd=REPOSITORY, env={**clean, **(environment or {})},
            capture_output=True, text=True, check=False, timeout=580,
        )  # fmt: skip

    return run
