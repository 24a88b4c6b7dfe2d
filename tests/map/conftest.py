"""The image's files, and a small chest with what `ctflow run` marks in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.phantom import phantom_from_seed
from map_support import IMAGE

BIN = Path(sys.executable).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.map)


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    """The image's file system, not running."""

    def buildah(*words: str) -> str:
        return subprocess.run(["buildah", *words], capture_output=True, text=True, check=True).stdout.strip()

    container = buildah("from", "--pull=false", IMAGE)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


@pytest.fixture(scope="session")
def chest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chest") / "ct"
    write_ct_series(phantom_from_seed(5, (32, 96, 96)).volume, folder, seed=5)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    folder.parent.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def expected(chest, root, tmp_path_factory) -> Path:
    """The result folder of `ctflow run` with the engine of the image, outside any container."""
    folder = tmp_path_factory.mktemp("expected")
    shutil.copytree(root / "var/holoscan/cache", folder / "cache")  # the same versions here, the same key
    command = [BIN / "ctflow", "run", "-i", chest, "-o", folder / "out", "--engine", "openvino"]
    subprocess.run([*command, "--cache", folder / "cache"], check=True, capture_output=True, timeout=500)
    return folder / "out"
