"""The examples of docs/map.md: each passes its linter, and none forgets a restriction."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ctflow import __version__
from map_support import REPOSITORY

DOCUMENT = REPOSITORY / "docs" / "map.md"


def example(name: str) -> str:
    """The block of the document that begins with a comment of this file name."""
    blocks = re.findall(r"```\w+\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if block.startswith(f"# {name}\n"))
    return block


def linted(tmp_path: Path, name: str, *command: str | Path) -> None:
    path = tmp_path / name
    path.write_text(example(name))
    done = subprocess.run([*command, path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_compose_file_fits_the_compose_specification(tmp_path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    linted(tmp_path, "compose.yaml", *command)


def test_the_kubernetes_objects_fit_the_schema_of_kubernetes(tmp_path):
    linted(tmp_path, "job.yaml", sys.executable, "-m", "kubernetes_validate", "--strict")


def test_the_linters_find_a_fault(tmp_path):
    for name, right, wrong, command in (
        (
            "compose.yaml",
            "read_only: true",
            "read_only: 7",
            ["check_jsonschema", "--builtin-schema", "vendor.compose-spec"],
        ),
        ("job.yaml", "backoffLimit:", "backofLimit:", ["kubernetes_validate", "--strict"]),
    ):
        path = tmp_path / name
        assert right in example(name)
        path.write_text(example(name).replace(right, wrong))
        done = subprocess.run([sys.executable, "-m", *command, path], capture_output=True, check=False, timeout=120)
        assert done.returncode != 0, name


def test_the_quadlet_has_sections_and_keys_that_podman_knows():
    # Quadlet's own check came with podman 4.4; the keys are those of podman-systemd.unit(5).
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(example("ctflow.container"))
    assert parser.sections() == ["Unit", "Container", "Service"]
    known = {
        "Image", "Volume", "ReadOnly", "DropCapability", "NoNewPrivileges", "Network", "User", "Group", "Tmpfs",
        "PodmanArgs", "AddDevice",
    }  # fmt: skip
    assert set(parser["Container"]) <= known
    assert parser["Service"]["Type"] == "oneshot"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("compose.yaml", ["read_only: true", "network_mode: none", "no-new-privileges", "cap_drop", "mem_limit"]),
        ("job.yaml", ["readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false", "drop", "nvidia.com/gpu"]),
        (
            "ctflow.container",
            ["ReadOnly=true", "Network=none", "NoNewPrivileges=true", "DropCapability=all", "--memory"],
        ),
    ],
)
def test_every_example_is_restricted_and_names_this_version(name, words):
    text = example(name)
    assert not [word for word in words if word not in text]
    assert f"ctflow:{__version__}-" in text


def test_the_kubernetes_job_mounts_its_input_read_only_and_a_cache():
    documents = list(yaml.safe_load_all(example("job.yaml")))
    job = next(document for document in documents if document["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {
        "/var/holoscan/input": True, "/var/holoscan/output": False, "/var/holoscan/cache": False, "/tmp": False
    }  # fmt: skip
