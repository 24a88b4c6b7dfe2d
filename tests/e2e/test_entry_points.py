"""The whole run through every entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from PIL import Image

from bundle_support import bundle_with_spacing, small_unet_bundle
from needs import skip_without
from tests_support import assert_same_points, dciodvfy_errors, report_by_dcmqi, segment_points_by_dcmqi

pytestmark = pytest.mark.e2e
ENTRY_POINTS = ("run", "app", "monai-deploy")  # `ctflow exec` is the last one's verb: below, on the real CT


def only_result(output: Path) -> Path:
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    files = ["measurements.dcm", "preview.png", "report.html", "result.json", "segmentation.dcm"]
    assert sorted(path.name for path in folder.iterdir()) == files
    return folder


@pytest.fixture(scope="module")
def results(entry_point, series, coarse_bundle, tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name in ENTRY_POINTS:
        output = tmp_path_factory.mktemp(name) / "out"
        done = entry_point(name, ["-i", series, "-o", output, "-m", coarse_bundle])
        assert done.returncode == 0, done.stdout + done.stderr
        assert "RESEARCH ONLY - NOT FOR CLINICAL USE" in done.stderr.splitlines()[0]
        assert str(output) in done.stdout
        folders[name] = only_result(output)
    return folders


def test_every_entry_point_writes_the_same_file(results):
    first = (results["run"] / "segmentation.dcm").read_bytes()
    for name in ENTRY_POINTS[1:]:
        assert (results[name] / "segmentation.dcm").read_bytes() == first
        for file in ("measurements.dcm", "preview.png", "report.html"):
            assert (results[name] / file).read_bytes() == (results["run"] / file).read_bytes()


def test_the_seg_conforms_and_two_readers_agree(results, series):
    path = results["run"] / "segmentation.dcm"
    assert dciodvfy_errors(path) == []
    seg = hd.seg.segread(path)
    sources = sorted((pydicom.dcmread(file) for file in series.iterdir()), key=lambda ct: ct.ImagePositionPatient[2])
    pixels = seg.get_pixels_by_source_instance([ct.SOPInstanceUID for ct in sources], segment_numbers=[1])[..., 0]
    assert pixels.any(), "the untrained model is tuned to mark something in every phantom"
    assert_same_points(np.array(list(world_points(pixels, sources))), segment_points_by_dcmqi(path))


def test_the_report_conforms_and_says_what_result_json_says(results):
    path = results["run"] / "measurements.dcm"
    assert dciodvfy_errors(path) == []
    (segment,) = json.loads((results["run"] / "result.json").read_text())["segments"]
    groups = report_by_dcmqi(path)["Measurements"]
    assert len(groups) == len(segment["findings"]) > 0
    for group, finding in zip(groups, segment["findings"], strict=True):
        assert float(group["measurementItems"][0]["value"]) == pytest.approx(finding["volume_ml"] * 1000, abs=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--seg", "fractional", "--nifti"], marks=pytest.mark.exhaustive),
        [
            "--seg",
            "labelmap",
            "--segments",
            "finding",
            "--omit-empty-frames",
            "no",
            "--roi",
            "body",
            "--secondary-capture",
        ],
    ],
)
def test_what_is_written_is_chosen_alike_at_every_entry_point(entry_point, series, tmp_path, words):
    bundle = small_unet_bundle(tmp_path / "bundle")
    written = {}
    for name in ("run", "app"):
        environment = {"CTFLOW_RTSTRUCT": "yes", "CTFLOW_PDF": "yes"}  # as in a container
        done = entry_point(name, ["-i", series, "-o", tmp_path / name, "-m", bundle, *words], environment)
        assert done.returncode == 0, done.stderr
        (folder,) = (path for path in (tmp_path / name).iterdir() if path.is_dir())
        written[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "result.json"}
        for file in ("segmentation.dcm", "structures.dcm", "report.dcm"):
            assert dciodvfy_errors(folder / file) == []
        assert pydicom.dcmread(folder / "segmentation.dcm").SegmentationType == words[1].upper()
    assert written["run"] == written["app"]
    assert ("segmentation.nii.gz" in written["app"]) == ("--nifti" in words)
    assert ("secondary_capture.dcm" in written["app"]) == ("--secondary-capture" in words)


def world_points(pixels, sources):
    """LPS mm of every marked pixel, straight from DICOM PS3.3 C.7.6.2.1.1."""
    for d, h, w in np.argwhere(pixels):
        ct = sources[d]
        row, column = np.split(np.array(ct.ImageOrientationPatient, float), 2)
        between_rows, between_columns = map(float, ct.PixelSpacing)
        yield np.array(ct.ImagePositionPatient, float) + row * between_columns * w + column * between_rows * h


def test_the_result_names_model_engine_times_and_findings(results):
    document = json.loads((results["app"] / "result.json").read_text())
    assert document["status"] == "done"
    assert document["model"]["weights_digest"]
    assert document["engine"]["backend"] == "eager"
    assert {"read", "prepare", "segment", "restore", "write"} <= set(document["stage_seconds"])
    (segment,) = document["segments"]
    assert segment["voxels"] > 0
    assert segment["volume_ml"] > 0
    with Image.open(results["app"] / "preview.png") as image:
        assert image.size[0] > 600
        assert np.asarray(image.convert("L")).std() > 10


def test_the_map_variables_are_the_defaults_and_a_second_run_replaces_the_first(
    entry_point, series, coarse_bundle, results, tmp_path
):
    earlier = tmp_path / "out" / results["run"].name
    shutil.copytree(results["run"], earlier)
    (earlier / "segmentation.dcm").write_bytes(b"an older one")
    environment = {
        "HOLOSCAN_INPUT_PATH": str(series),
        "HOLOSCAN_OUTPUT_PATH": str(tmp_path / "out"),
        "HOLOSCAN_MODEL_PATH": str(coarse_bundle.parent),  # the folder that holds exactly one bundle
    }
    assert entry_point("app", [], environment).returncode == 0
    assert (only_result(tmp_path / "out") / "segmentation.dcm").read_bytes() == (
        results["run"] / "segmentation.dcm"
    ).read_bytes()


@pytest.mark.parametrize("name", ["app", "run"])
def test_an_engine_does_not_import_torch_tensorrt_only_because_it_is_there(
    name, entry_point, series, coarse_bundle, tmp_path
):
    """MONAI would: seconds, and five warnings in every run."""
    package = tmp_path / "packages" / "torch_tensorrt"
    package.mkdir(parents=True)
    told = "import logging, pathlib\nlogging.warning('imported')\npathlib.Path(__file__).with_name('seen').touch()\n"
    (package / "__init__.py").write_text(told)
    environment = {"PYTHONPATH": str(package.parent)}
    assert subprocess.run(
        [sys.executable, "-c", "import torch_tensorrt"], env={**os.environ, **environment}, check=False
    ).returncode == 0  # fmt: skip
    (package / "seen").unlink()
    done = entry_point(name, ["-i", series, "-o", tmp_path / "out", "-m", coarse_bundle], environment)
    assert done.returncode == 0, done.stderr
    assert not (package / "seen").exists()
    assert "imported" not in done.stderr


@pytest.mark.parametrize("name", ["app", pytest.param("run", marks=pytest.mark.exhaustive)])
def test_every_entry_point_opens_where_no_cuda_toolkit_is_installed(
    name, entry_point, series, coarse_bundle, results, tmp_path
):
    """The system's CUDA folders are covered by an empty one, in a mount namespace of the process's own."""
    hide = 'for d in /usr/local/cuda*; do [ -L "$d" ] || mount -t tmpfs none "$d"; done; exec "$@"'
    toolkits = [path for path in Path("/usr/local").glob("cuda*") if not path.is_symlink()]
    if os.geteuid() != 0 and toolkits:
        skip_without("namespaces of its own")
    prefix = ["unshare", "-m", "sh", "-c", hide, "sh"] if toolkits else []
    probe = [*prefix, sys.executable, "-c", "import ctypes; ctypes.CDLL('libcudart.so.13')"]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0, "the toolkit is still visible"
    done = entry_point(name, ["-i", series, "-o", tmp_path / "out", "-m", coarse_bundle], prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert (only_result(tmp_path / "out") / "segmentation.dcm").read_bytes() == (
        results["run"] / "segmentation.dcm"
    ).read_bytes()


@pytest.mark.exhaustive
def test_lidc_runs_through_every_entry_point_to_the_same_seg(entry_point, data, tmp_path_factory):
    """The real CT, on a 3 mm grid so that the test takes a minute; docs/performance.md has the 1.5 mm run."""
    bundle = bundle_with_spacing(tmp_path_factory.mktemp("bundle") / "3mm", 3.0, 96)
    written = []
    for name in ("run", "app", "exec"):
        output = tmp_path_factory.mktemp("lidc") / "out"
        done = entry_point(name, ["-i", data / "lidc-idri-0314", "-o", output, "-m", bundle, "--overlap", "0"])
        assert done.returncode == 0, done.stderr
        written.append(only_result(output) / "segmentation.dcm")
    assert len({path.read_bytes() for path in written}) == 1
    assert dciodvfy_errors(written[0]) == []
    seg = hd.seg.segread(written[0])
    voxels = json.loads((written[0].parent / "result.json").read_text())["segments"][0]["voxels"]
    assert voxels > 0
    assert int(seg.pixel_array.sum()) == voxels == len(segment_points_by_dcmqi(written[0]))
