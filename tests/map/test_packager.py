"""`monai-deploy package` and `monai-deploy run` of holoscan-cli make and run a working package of the application."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctflow import __version__
from docker_stand_in import instructions_of, offline_dockerfile
from map_support import PODMAN, REPOSITORY, inspect_image, run_image, writable_folder

TAG = "ctflow-packaged"
IMAGE = f"localhost/{TAG}-x64-workstation-dgpu-linux-amd64:{__version__}"
ARTIFACTS = {
    "4.2.0": {
        "holoscan": {
            "debian-version": "4.2.0.0-1",
            "wheel-version": "4.2.0",
            "base-images": {"dgpu": "nvcr.io/nvidia/cuda:13.0.0-runtime-ubuntu24.04"},
            "build-images": {"igpu": {}, "dgpu": {}, "cpu": {}},
        },
        "health-probes": {},
    }
}


def monai_deploy(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """holoscan-cli's own command line, with a stand-in for Docker; what it built lies in `folder`/context."""
    # To read the manifests it starts the program `docker` itself.
    (folder / "docker").write_text(f'#!/bin/sh\nexec {" ".join(PODMAN)} "$@"\n')
    (folder / "docker").chmod(0o755)
    environment = {**os.environ, "HOME": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    program = [sys.executable, REPOSITORY / "tests" / "docker_stand_in.py", folder / "context"]
    return subprocess.run(
        [*program, *words], env=environment, capture_output=True, text=True, check=False, timeout=560
    )  # fmt: skip


@pytest.fixture(scope="module")
def context(tmp_path_factory) -> Iterator[Path]:
    """What holoscan-cli hands to Docker; the image built from it stays for the module."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "artifacts.json").write_text(json.dumps(ARTIFACTS))
    done = monai_deploy(
        folder, "package", REPOSITORY / "app", "-c", REPOSITORY / "app" / "app.yaml", "-m", REPOSITORY / "bundle",
        "--platform", "x86_64", "--tag", f"{TAG}:{__version__}", "--source", folder / "artifacts.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    yield folder / "context"
    subprocess.run(["podman", "rmi", "--force", IMAGE], check=True, capture_output=True)


def test_the_context_holds_the_application_and_the_bundle(context):
    for path in (REPOSITORY / "app").glob("*.*"):
        assert (context / "app" / path.name).read_bytes() == path.read_bytes()
    assert (context / "pip" / "requirements.txt").read_text().strip() == f"ctflow[holoscan]=={__version__}"
    packed = (context / "models" / "bundle" / "models" / "model.pt").read_bytes()
    original = (REPOSITORY / "bundle" / "models" / "model.pt").read_bytes()
    assert hashlib.sha256(packed).digest() == hashlib.sha256(original).digest()


def test_the_manifests_of_the_packager_name_the_formats_and_resources_of_app_yaml(context):
    app = json.loads((context / "map" / "app.json").read_text())
    package = json.loads((context / "map" / "pkg.json").read_text())
    assert app["version"] == __version__
    assert app["input"]["formats"] == app["output"]["formats"] == ["file"]
    assert package["resources"] == {"cpu": 2, "gpu": 0, "memory": "4Gi"}


def test_only_what_fetches_is_left_out_of_its_dockerfile(context):
    whole = instructions_of((context / "Dockerfile").read_text())
    kept = instructions_of(offline_dockerfile((context / "Dockerfile").read_text(), "base"))
    missing = [line for line in whole if line not in kept and not line.startswith("FROM nvcr")]
    assert all(line.startswith("RUN ") for line in missing)
    assert [line for line in kept if line.startswith("COPY ./app ")]


def test_the_package_runs_and_writes_the_seg_of_ctflow_run(context, chest, expected, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    done = monai_deploy(tmp_path, "run", IMAGE, "-i", chest, "-o", output, "--gpus", "void", "--rm")
    assert done.returncode == 0, done.stdout + done.stderr
    (segmentation,) = output.glob("*/segmentation.dcm")
    (wanted,) = expected.glob("*/segmentation.dcm")
    assert segmentation.read_bytes() == wanted.read_bytes()


def test_the_tools_of_holoscan_cli_lose_the_exit_code_which_those_of_make_map_keep(context, tmp_path):
    (tmp_path / "in").mkdir()
    mounts = {"/var/holoscan/input:ro": tmp_path / "in", "/var/holoscan/output": writable_folder(tmp_path / "out")}
    packaged = run_image(mounts=mounts, image=IMAGE)
    assert "exited with 2" in packaged.stderr
    assert packaged.returncode == 0
    assert run_image(mounts=mounts).returncode == 2
    assert inspect_image(IMAGE)["Config"]["Entrypoint"] == inspect_image()["Config"]["Entrypoint"]
