"""The flavour for GPUs, built on the Debian base, which stands in for a CUDA runtime; no GPU is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bundle_support import small_unet_bundle
from map_support import REPOSITORY, inspect_image, run_image, writable_folder

IMAGE = "localhost/ctflow-test:cuda"
pytestmark = pytest.mark.timeout(1200)  # the first builds the image


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> str:
    """Built with a bundle of its own, as a site would."""
    bundle = small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")
    base = inspect_image()["Config"]["Labels"]["base"]
    command = ["MAP/build.sh", "--flavour", "cuda", "--base", base, "--bundle", bundle, "--tag", IMAGE, "--no-archive"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=1100
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return IMAGE


def test_it_asks_for_a_gpu_and_leaves_the_choice_of_an_engine_to_the_machine(image):
    config = inspect_image(image)["Config"]
    variables = dict(line.split("=", 1) for line in config["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert variables["CTFLOW_ENGINE"] == "auto"
    package = json.loads(run_image(["show", "pkg"], image=image).stdout)
    assert package["resources"]["gpu"] == 1
    assert len(package["models"]) == 1


def test_a_gpu_engine_is_made_in_the_mounted_cache_and_none_is_in_the_image(image, tmp_path):
    cache = writable_folder(tmp_path / "cache")
    kept = {"/var/holoscan/cache": cache}
    ctflow = ["--entrypoint", "ctflow"]
    listed = run_image(["engines", "--json"], options=ctflow, image=image)
    document = json.loads(listed.stdout)
    assert document["engines"] == []
    backends = {entry["name"]: entry for entry in document["backends"]}
    assert backends["eager"]["available"]
    assert not backends["tensorrt-rtx"]["available"]
    assert "is installed and computes on NVIDIA GPUs only" in backends["tensorrt-rtx"]["reason"]
    made = run_image(["export", "--engine", "tensorrt-rtx"], mounts=kept, options=ctflow, image=image)
    assert made.returncode == 0, made.stderr
    listed = run_image(["engines", "--json"], mounts=kept, options=ctflow, image=image)
    (engine,) = json.loads(listed.stdout)["engines"]
    assert (engine["kind"], engine["state"]) == ("rtx_plan", "ready")


def test_without_a_gpu_it_segments_on_the_cpu(image, chest, tmp_path):
    output = writable_folder(tmp_path / "out")
    done = run_image(mounts={"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}, image=image)
    assert done.returncode == 0, done.stderr
    (document,) = output.glob("*/result.json")
    engine = json.loads(document.read_text())["engine"]
    assert (engine["backend"], engine["device"]) == ("eager", "cpu")
