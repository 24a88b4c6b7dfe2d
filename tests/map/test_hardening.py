"""What must not be in an image, for CPUs or GPUs, and its SBOM and licences."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from licence_support import is_gpl
from map_support import IMAGE, files_of, mounted, pinned

LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-toolkit$")  # its CUDA build requires one version of each
pytestmark = pytest.mark.timeout(1200)  # the first builds the image for GPUs


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def root(request) -> Iterator[Path]:
    with mounted(IMAGE if request.param == "cpu" else request.getfixturevalue("cuda_image")) as folder:
        yield folder


@pytest.fixture(scope="module")
def sbom(root) -> dict:
    return json.loads((root / "opt/holoscan/docs/sbom.cdx.json").read_text())


def test_no_file_is_setuid_or_setgid(root):
    assert not [path for path in files_of(root) if path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)]


def test_no_compiler_installer_test_or_secret_is_inside(root):
    names = {path.name for path in files_of(root)}
    assert "python3.11" in names
    assert not names & {
        "gcc",
        "cc",
        "g++",
        "c++",
        "ld",
        "as",
        "make",
        "clang",
        "nvcc",
        "pip",
        "pip3",
        "apt-get",
        "ptxas",
    }
    assert not names & {".netrc", ".git-credentials", "pip.conf", "id_rsa", "id_ed25519", ".pypirc", ".env"}
    (site,) = (root / "opt/ctflow/lib").glob("python3*/site-packages")
    folders = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_dir()}
    assert (
        not {"pip", "setuptools", "pytest", "cupy", "triton", "openvino_telemetry", "torch/test", "torch/include"}
        & folders
    )
    assert not [path for path in folders if path.endswith("/tests") and ".dist-info" not in path]
    for path in files_of(root / "etc") + files_of(root / "opt/holoscan") + files_of(root / "var/holoscan"):
        assert b"PRIVATE KEY-----" not in path.read_bytes(), path


def test_no_compiled_file_holds_a_date_so_that_each_build_gives_the_same(root):
    compiled = list((root / "opt/ctflow").rglob("*.pyc"))
    assert len(compiled) > 1000
    assert {path.read_bytes()[4:8] for path in compiled} == {b"\1\0\0\0"}  # by the source's digest, unchecked (PEP 552)


def test_the_sbom_is_valid_cyclonedx(root):
    text = (root / "opt/holoscan/docs/sbom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def test_the_sbom_lists_every_package_at_its_pinned_version(root, sbom):
    listed = {part["purl"].replace("%2B", "+").replace(".", "-") for part in sbom["components"]}
    (site,) = (root / "opt/ctflow/lib").glob("python3*/site-packages")
    installed = list(site.glob("*.dist-info"))
    assert len([part for part in listed if part.startswith("pkg:pypi/")]) == len(installed), "and no other"
    for folder in installed:
        name, _, version = folder.name.removesuffix(".dist-info").partition("-")
        name = name.lower().replace("_", "-").replace(".", "-")
        assert f"pkg:pypi/{name}@{version}".replace(".", "-") in listed
        if name != "ctflow" and not (name not in pinned() and LEFT_TO_TORCH.match(name)):
            assert pinned()[name] == version.partition("+")[0], name
    debian = re.findall(r"^Package: (.*)$", (root / "var/lib/dpkg/status").read_text(), re.MULTILINE)
    assert set(debian) == {part["name"] for part in sbom["components"] if part["purl"].startswith("pkg:deb/")}


def test_no_gpl_python_package_is_inside(sbom):
    python = [part for part in sbom["components"] if part["purl"].startswith("pkg:pypi/")]
    assert len(python) > 50
    for part in python:
        licences = [
            one.get("expression") or one["license"].get("id") or one["license"]["name"] for one in part["licenses"]
        ]
        assert licences, part["name"]
        assert not [licence for licence in licences if is_gpl(licence)], part["name"]


def test_the_licence_list_names_every_component(root, sbom):
    lines = (root / "opt/holoscan/docs/licences.txt").read_text().splitlines()
    assert len(lines) == 1 + len(sbom["components"])
    assert not [line for line in lines if line.startswith("pypi") and line.endswith("not stated")]


def test_the_terms_of_nvidia_are_in_the_image(root, sbom):
    site = next((root / "opt/ctflow/lib").glob("python3*/site-packages"))
    folders = [path for path in site.glob("*.dist-info") if re.match("nvidia_|tensorrt_rtx.*_|holoscan_cu", path.name)]
    assert folders
    for folder in folders:
        beside = site / "nvidia" / folder.name.split("_")[1]  # cuSPARSELt has it there
        texts = [path for place in (folder, beside) if place.is_dir() for path in place.rglob("*")]
        assert [path for path in texts if path.name.lower() in {"license.txt", "license"}], folder.name
