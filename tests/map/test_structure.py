"""Paths, manifests, labels and variables of the MONAI Application Package specification."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from ctflow import __version__
from map_support import OUTPUT, REPOSITORY, files_of, inspect_image, pinned

LARGEST_BYTES = 1_600_000_000
VARIABLES = {
    "HOLOSCAN_INPUT_PATH": "/var/holoscan/input/",
    "HOLOSCAN_OUTPUT_PATH": "/var/holoscan/output/",
    "HOLOSCAN_WORKDIR": "/var/holoscan/",
    "HOLOSCAN_APPLICATION": "/opt/holoscan/app/",
    "HOLOSCAN_MODEL_PATH": "/opt/holoscan/models/",
    "HOLOSCAN_CONFIG_PATH": "/var/holoscan/app.yaml",
    "HOLOSCAN_APP_MANIFEST_PATH": "/etc/holoscan/app.json",
    "HOLOSCAN_PKG_MANIFEST_PATH": "/etc/holoscan/pkg.json",
    "HOLOSCAN_DOCS": "/opt/holoscan/docs/",
    "HOLOSCAN_LOGS": "/var/holoscan/logs/",
}
SEMANTIC = r"\d+\.\d+\.\d+"


@pytest.fixture(scope="module")
def config() -> dict:
    return inspect_image()["Config"]


@pytest.fixture(scope="module")
def app(root) -> dict:
    return json.loads((root / "etc/holoscan/app.json").read_text())


@pytest.fixture(scope="module")
def package(root) -> dict:
    return json.loads((root / "etc/holoscan/pkg.json").read_text())


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files_of(folder)}


@pytest.mark.parametrize(
    "path",
    ["etc/holoscan", "opt/holoscan/app", "opt/holoscan/models", "opt/holoscan/docs", "var/holoscan",
     "var/holoscan/input", "var/holoscan/output", "var/holoscan/logs", "var/holoscan/cache"],
)  # fmt: skip
def test_the_folders_of_the_specification_are_there(root, path):
    assert (root / path).is_dir()


@pytest.mark.parametrize(
    "path",
    ["etc/holoscan/app.json", "etc/holoscan/pkg.json", "var/holoscan/app.yaml", "var/holoscan/tools",
     "opt/holoscan/app/__main__.py", "opt/holoscan/docs/README.md", "opt/holoscan/docs/LICENSE",
     "opt/holoscan/docs/CHANGELOG.md", "opt/holoscan/docs/map.md", "opt/holoscan/docs/sbom.cdx.json",
     "opt/holoscan/docs/licences.txt"],
)  # fmt: skip
def test_the_files_of_the_specification_are_there(root, path):
    assert (root / path).is_file()


def test_the_application_manifest_has_every_key(app):
    assert app["apiVersion"] == "1.0.0"
    assert app["type"] == "application"
    assert app["command"] == "python3 /opt/holoscan/app"
    assert app["input"]["path"] == "input/"
    assert [form["format"] for form in app["input"]["formats"]] == ["dicom"]
    assert app["output"]["path"] == "output/"
    assert app["output"]["format"]["format"] == "dicom"
    assert app["sdk"] == "monai-deploy"
    assert app["sdkVersion"] == pinned()["monai-deploy-app-sdk"]
    assert app["timeout"] == 0
    assert app["version"] == __version__
    assert app["workingDirectory"] == "/var/holoscan/"


def test_the_package_manifest_has_every_key(package, root):
    assert package["apiVersion"] == "1.0.0"
    assert package["applicationRoot"] == "/opt/holoscan/app/"
    assert package["modelRoot"] == "/opt/holoscan/models/"
    assert re.fullmatch(SEMANTIC, package["version"])
    (model,) = package["models"]
    assert re.fullmatch(r"[a-z0-9_]{1,100}", model["name"])
    assert (root / "opt/holoscan/models" / model["path"] / "configs/metadata.json").is_file()
    assert package["resources"] == {"cpu": 2, "gpu": 0, "memory": "4Gi"}


def test_the_variables_are_in_the_image_and_in_the_manifest(config, app):
    image = dict(line.split("=", 1) for line in config["Env"])
    assert VARIABLES.items() <= image.items()
    assert VARIABLES.items() <= app["environment"].items()
    assert image["CTFLOW_CACHE"] == "/var/holoscan/cache"


def test_the_labels_name_what_is_inside(config):
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "ctflow"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.nvidia.holoscan"] == pinned()["holoscan-cu13"]
    assert labels["org.monai.deploy.app-sdk"] == pinned()["monai-deploy-app-sdk"]
    assert labels["tag"].startswith("localhost/ctflow:")
    assert labels["base"] == labels["org.opencontainers.image.base.name"]


def test_it_runs_as_user_1000_from_the_tools(config):
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/var/holoscan/tools"]
    assert config["WorkingDir"] == "/var/holoscan"


def test_the_application_is_the_tree_of_the_repository(root):
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "app"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    tree = {
        Path(name).relative_to("app").as_posix(): hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest()
        for name in listed
    }
    assert digests(root / "opt/holoscan/app") == tree


def test_the_installed_package_is_the_source_of_the_repository(root):
    (installed,) = (root / "opt/ctflow/lib").glob("python3*/site-packages/ctflow")
    for folder, source in {".": "src/ctflow", "app": "app", "operators": "operators"}.items():
        for path in (REPOSITORY / source).rglob("*.py"):
            copy = installed / folder / path.relative_to(REPOSITORY / source)
            assert copy.read_bytes() == path.read_bytes(), path


def test_it_is_small():
    assert inspect_image()["Size"] <= LARGEST_BYTES


def test_a_change_of_code_leaves_the_large_layers_as_they_are():
    done = subprocess.run(
        ["podman", "history", "--format", "json", inspect_image()["Id"]], capture_output=True, check=True
    )
    # The newest comes first.
    history = json.loads(done.stdout)
    (libraries,) = (at for at, layer in enumerate(history) if "install.sh" in layer["CreatedBy"])
    (finish,) = (at for at, layer in enumerate(history) if "finish.sh" in layer["CreatedBy"])
    assert finish < libraries
    assert sum(layer["size"] for layer in history[:libraries]) < 120_000_000


def test_beside_the_archive_lie_its_digest_and_what_is_inside(root):
    name = f"ctflow-{__version__}-cpu"
    for suffix, inside in {"sbom.cdx.json": "sbom.cdx.json", "licences.txt": "licences.txt"}.items():
        assert (OUTPUT / f"{name}.{suffix}").read_bytes() == (root / "opt/holoscan/docs" / inside).read_bytes()
    subprocess.run(["sha256sum", "--check", "--quiet", f"{name}.tar.sha256"], cwd=OUTPUT, check=True)


def test_the_archive_is_an_oci_image_that_other_tools_read(config):
    archive = OUTPUT / f"ctflow-{__version__}-cpu.tar"
    done = subprocess.run(["skopeo", "inspect", "--config", f"oci-archive:{archive}"], capture_output=True, check=True)
    archived = json.loads(done.stdout)["config"]
    assert archived["Labels"] == config["Labels"]
    assert archived["Entrypoint"] == config["Entrypoint"]
    assert archived["Env"] == config["Env"]
