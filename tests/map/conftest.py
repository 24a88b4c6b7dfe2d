"""The image's files, and a small chest with what `ctflow run` marks in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bundle_support import small_unet_bundle
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.phantom import phantom_from_seed
from map_support import CUDA_IMAGE, IMAGE, REPOSITORY, mounted

BIN = Path(sys.executable).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.map)


@pytest.fixture(scope="session")
def root() -> Iterator[Path]:
    """The image's file system, not running."""
    with mounted(IMAGE) as folder:
        yield folder


@pytest.fixture(scope="session")
def cuda_image(tmp_path_factory) -> str:
    """The flavour for GPUs; built here with a bundle of its own, as a site would, and pip's torch for CPUs or GPUs."""
    if CUDA_IMAGE:
        return CUDA_IMAGE
    name = "localhost/ctflow-test:cuda"
    bundle = small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")
    words = ["--flavour", "cuda", "--bundle", bundle, "--tag", name, "--no-archive"]
    environment = {**os.environ, "PYTHON": sys.executable, "TORCH": "pip"}
    done = subprocess.run(
        ["bash", "MAP/build.sh", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=1100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return name


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
