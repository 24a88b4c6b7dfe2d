"""Whole processes on small inputs: a small phantom series, and the demonstration bundle on a coarse grid."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ctflow.dicom.ct_series import write_ct_series
from ctflow.phantom import phantom_from_seed

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOORS = ("run", "app", "exec", "monai-deploy")


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


def bundle_with_spacing(folder: Path, spacing_mm: float, roi: int) -> Path:
    """A copy of the demonstration bundle that works on a coarser grid, so that a test takes seconds."""
    shutil.copytree(REPOSITORY / "bundle", folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    for transform in config["preprocessing"]["transforms"]:
        if transform["_target_"].endswith("Spacingd"):
            transform["pixdim"] = [spacing_mm] * 3
    config["inferer"]["roi_size"] = [roi] * 3
    path.write_text(json.dumps(config, indent=2))
    return folder


@pytest.fixture(scope="session")
def coarse_bundle(tmp_path_factory) -> Path:
    return bundle_with_spacing(tmp_path_factory.mktemp("bundle") / "coarse", 6.0, 32)


@pytest.fixture(scope="session")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    write_ct_series(phantom_from_seed(5, (24, 96, 96)).volume, folder / "ct", seed=5)
    return folder / "ct"


@pytest.fixture(scope="session")
def data() -> Path:
    folder = Path(os.environ.get("CTFLOW_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "lidc-idri-0314").is_dir():
        reason = f"no real CT in {folder} (CTFLOW_DATA)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def door() -> Run:
    """Runs ctflow through one of its doors, as a user's shell would."""

    def run(
        name: str, words: Sequence[str | Path], environment: dict[str, str] | None = None, prefix: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = {
            "run": [BIN / "ctflow", "run"],
            "app": [sys.executable, "app"],
            "exec": [BIN / "ctflow", "exec", "app"],
            "monai-deploy": [BIN / "monai-deploy", "exec", "app"],
        }[name]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HOLOSCAN", "CTFLOW", "COV"))}
        return subprocess.run(
            [*prefix, *command, *words], cwd=REPOSITORY, env={**clean, **(environment or {})},
            capture_output=True, text=True, check=False, timeout=580,
        )  # fmt: skip

    return run
