"""The flavour for GPUs on a machine without one: what it resolves to, and that it segments on the CPU.

CTFLOW_MAP_CUDA_IMAGE names a finished image, such as `make map-cuda` made. Otherwise one is built with the torch that
pip's index has, which may be the build for CPUs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from map_support import CUDA_IMAGE, REPOSITORY, inspect_image, mounted, pinned, run_image, writable_folder

LARGEST_BYTES = 5_000_000_000
pytestmark = pytest.mark.timeout(1200)  # the first builds the image


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, str]:
    """What the image for GPUs is made of, by the index that uv takes, whose torch for Linux is the CUDA build."""
    wanted = tmp_path_factory.mktemp("wheels") / "requirements.txt"
    extras = re.search(r"^  cuda\) gpus=all extras\+=\(([^)]*)\)", (REPOSITORY / "MAP/build.sh").read_text(), re.M)
    assert extras
    command = [sys.executable, REPOSITORY / "MAP/requirements.py", *extras[1].split()]
    wanted.write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    pins = [word for name in ("constraints.txt", "MAP/constraints.txt") for word in ("-c", REPOSITORY / name)]
    uv = [Path(sys.executable).parent / "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36"]
    done = subprocess.run([*uv, *platform, *pins, wanted], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(line.split("==") for line in done.stdout.splitlines())


def test_its_wheels_resolve_to_the_cuda_build_and_every_version_is_fixed(wheels):
    assert {"torch", "nvidia-cudnn-cu13", "nvidia-cuda-nvrtc", "cuda-bindings", "openvino"} <= wheels.keys()
    free = {name for name in wheels if name not in pinned()}
    assert not [name for name in free if not re.match(r"nvidia-|cuda-toolkit$|triton$|pip$", name)]
    assert {name: pinned()[name] for name in wheels.keys() - free} == {
        name: wheels[name] for name in wheels.keys() - free
    }


def test_what_it_leaves_out_is_among_its_wheels(wheels):
    lines = (REPOSITORY / "MAP/prune-cuda.txt").read_text().splitlines()
    names = {line.split()[0] for line in lines if line and not line.startswith("#") and "/" not in line.split()[0]}
    assert names <= wheels.keys()


def test_it_asks_for_a_gpu_and_leaves_the_choice_of_an_engine_to_the_machine(cuda_image):
    config = inspect_image(cuda_image)["Config"]
    variables = dict(line.split("=", 1) for line in config["Env"])
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert variables["CTFLOW_ENGINE"] == "auto"
    assert config["User"] == "1000:1000"
    package = json.loads(run_image(["show", "pkg"], image=cuda_image).stdout)
    assert package["resources"]["gpu"] == 1
    assert len(package["models"]) == 1


def test_a_gpu_engine_is_made_in_the_mounted_cache_and_the_image_has_one_for_cpus(cuda_image, tmp_path):
    kept = {"/var/holoscan/cache": writable_folder(tmp_path / "cache")}
    ctflow = ["--entrypoint", "ctflow"]
    listed = run_image(["engines", "--json"], options=ctflow, image=cuda_image)
    document = json.loads(listed.stdout)
    (engine,) = document["engines"]
    assert (engine["kind"], engine["state"]) == ("onnx", "ready")
    backends = {entry["name"]: entry for entry in document["backends"]}
    assert backends["eager"]["available"]
    assert backends["openvino"]["available"]
    assert not backends["tensorrt-rtx"]["available"]
    assert "but it needs an NVIDIA GPU" in backends["tensorrt-rtx"]["reason"]
    made = run_image(["export", "--engine", "tensorrt-rtx"], mounts=kept, options=ctflow, image=cuda_image)
    assert made.returncode == 0, made.stderr
    listed = run_image(["engines", "--json"], mounts=kept, options=ctflow, image=cuda_image)
    (engine,) = json.loads(listed.stdout)["engines"]
    assert (engine["kind"], engine["state"]) == ("rtx_plan", "ready")


def test_without_a_gpu_it_segments_by_openvino(cuda_image, chest, tmp_path):
    output = writable_folder(tmp_path / "out")
    done = run_image(mounts={"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}, image=cuda_image)
    assert done.returncode == 0, done.stderr
    (document,) = output.glob("*/result.json")
    engine = json.loads(document.read_text())["engine"]
    assert (engine["backend"], engine["device"]) == ("openvino", "cpu")


@pytest.mark.parametrize("words", [["--engine", "fused"], ["--device", "cuda:0"]])
def test_without_a_gpu_what_needs_one_is_refused_by_name(cuda_image, chest, tmp_path, words):
    output = writable_folder(tmp_path / "out")
    done = run_image(words, mounts={"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}, image=cuda_image)
    assert done.returncode == 4, done.stderr
    assert "GPU" in done.stderr
    assert not list(output.glob("*/segmentation.dcm"))


def test_it_is_small_and_has_kernels_where_it_has_the_build_for_gpus(cuda_image):
    """In CI pip's index may have torch's build for CPUs; then nothing is compiled for a GPU."""
    assert inspect_image(cuda_image)["Size"] <= LARGEST_BYTES
    with mounted(cuda_image) as root:
        (site,) = (root / "opt/ctflow/lib").glob("python3*/site-packages")
        is_for_gpus = (site / "torch/lib/libtorch_cuda.so").is_file()
        assert is_for_gpus or not CUDA_IMAGE, "a finished image has the build for GPUs"
        assert bool(list(site.glob("nvidia/cu13/lib/libcublas.so.*"))) == is_for_gpus
        kernels = list(site.glob("ctflow/made/cubins-*/engine.cubins"))
        assert len(kernels) == (3 if is_for_gpus else 0), "of fp16, bf16 and fp32"
        assert not [path for path in site.rglob("*") if path.suffix in {".a", ".bc"}]
