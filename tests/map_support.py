"""Running the image that `make map` built, as a hospital would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ctflow import __version__

REPOSITORY = Path(__file__).parents[1]
OUTPUT = Path(os.environ.get("CTFLOW_MAP_OUTPUT", REPOSITORY / "build" / "map"))
IMAGE = os.environ.get("CTFLOW_MAP_IMAGE", f"localhost/ctflow:{__version__}-cpu")
# A finished image for GPUs, such as `make map-cuda` made; otherwise the tests build one of their own.
CUDA_IMAGE = os.environ.get("CTFLOW_MAP_CUDA_IMAGE", "")
# Debian's crun does not start containers on every machine; limits as high as podman's default may not be allowed.
PODMAN = ["podman", *(["--runtime", "runc"] if shutil.which("runc") else [])]
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"]
HARDENED = [
    "--read-only", "--network", "none", "--cap-drop", "all", "--security-opt", "no-new-privileges",
    "--tmpfs", "/tmp:rw,noexec,nosuid,nodev,size=512m", "--memory", "4g",
]  # fmt: skip


def run_image(
    words: Sequence[str] = (),
    *,
    mounts: Mapping[str, Path] | None = None,
    options: Sequence[str] = (),
    image: str = IMAGE,
) -> subprocess.CompletedProcess[str]:
    """Run the image under the hardened flags.

    Args:
        words: What follows the image's name.
        mounts: Path in the container (with ":ro" to mount it so) -> folder.
        options: More options of `podman run`; a later one wins.
        image: The image.
    """
    volumes = [
        word
        for target, folder in (mounts or {}).items()
        for word in ("-v", f"{folder}:{target.removesuffix(':ro')}{':ro' if target.endswith(':ro') else ''}")
    ]
    command = [*PODMAN, "run", "--rm", *LIMITS, *HARDENED, *volumes, *options, image, *words]
    with tempfile.TemporaryDirectory() as aside:  # where memory runs short, conmon leaves a file named oom
        return subprocess.run(command, cwd=aside, capture_output=True, text=True, check=False, timeout=560)


def inspect_image(image: str = IMAGE) -> dict[str, Any]:
    """What podman says of an image."""
    done = subprocess.run(["podman", "image", "inspect", image], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stderr}: run `make map` first"
    (document,) = json.loads(done.stdout)
    return document


def writable_folder(path: Path) -> Path:
    """A new folder in which any user may write, because the container's user does not exist on this machine."""
    path.mkdir()
    path.chmod(0o777)
    return path


@contextmanager
def mounted(image: str) -> Iterator[Path]:
    """An image's file system, not running."""

    def buildah(*words: str) -> str:
        return subprocess.run(["buildah", *words], capture_output=True, text=True, check=True).stdout.strip()

    container = buildah("from", "--pull=false", image)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


def pinned() -> dict[str, str]:
    """What constraints.txt and the image's own say of a package's version."""
    files = [REPOSITORY / "constraints.txt", REPOSITORY / "MAP/constraints.txt"]
    lines = [line for file in files for line in file.read_text().splitlines()]
    pairs = (line.split("==") for line in lines if "==" in line)
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in pairs}


def files_of(root: Path) -> list[Path]:
    """Every file in a folder, without links."""
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
