"""The examples of docs/cohort.md fit the schemas of Kubernetes and of KubeRay, and the scripts pass shellcheck."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ctflow.cli.cohort import run_command_of_cohort

REPOSITORY = Path(__file__).parents[3]
DEFINITION = REPOSITORY / "tests" / "data" / "kuberay" / "ray.io_rayjobs.json.gz"


def example(name: str) -> str:
    """The block of the document that names this file in its first two lines."""
    text = (REPOSITORY / "docs" / "cohort.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if f"# {name}" in block.splitlines()[:2])
    return block


@pytest.fixture(scope="module")
def definition() -> dict[str, Any]:
    found = json.loads(gzip.decompress(DEFINITION.read_bytes()))
    (version,) = (each for each in found["spec"]["versions"] if each["name"] == "v1")
    return version["schema"]["openAPIV3Schema"]


def unknown(schema: dict[str, Any], value: Any, place: str = "") -> Iterator[str]:
    """Fields that the schema does not have: Kubernetes drops them, or refuses them with --validate=strict."""
    if isinstance(value, dict) and "properties" in schema:
        for name, each in value.items():
            if name in schema["properties"]:
                yield from unknown(schema["properties"][name], each, f"{place}.{name}")
            elif not schema.get("x-kubernetes-preserve-unknown-fields"):
                yield f"{place}.{name}"
    elif isinstance(value, list) and "items" in schema:
        for each in value:
            yield from unknown(schema["items"], each, f"{place}[]")


def test_the_ray_job_fits_the_definition_of_kuberay(definition):
    job = yaml.safe_load(example("rayjob.yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    jsonschema.validate(job, definition)
    del definition["properties"]["metadata"]
    assert list(unknown(definition, {name: each for name, each in job.items() if name != "metadata"})) == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("entrypoint:", "entrypont:"), ("replicas: 4", "replicas: four"), ("image:", "imgae:")]
)
def test_a_fault_in_the_ray_job_is_found(definition, right, wrong):
    text = example("rayjob.yaml")
    assert right in text
    job = yaml.safe_load(text.replace(right, wrong))
    faults = [*jsonschema.Draft202012Validator(definition).iter_errors(job), *unknown(definition, job)]
    assert faults


def test_the_ray_job_computes_on_gpus_of_its_workers_only():
    spec = yaml.safe_load(example("rayjob.yaml"))["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) >= 1


@pytest.mark.parametrize("fault", ["", "completionMode"])
def test_the_indexed_job_fits_the_schema_of_kubernetes(tmp_path, fault):
    path = tmp_path / "job.yaml"
    path.write_text(example("job.yaml").replace(fault, "completionMod") if fault else example("job.yaml"))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode == 0) == (not fault), done.stdout + done.stderr


def test_the_indexed_job_has_as_many_shares_as_completions():
    spec = yaml.safe_load(example("job.yaml"))["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed"
    assert f"/{spec['completions']}" in container["args"][0]


def test_the_slurm_script_passes_shellcheck(tmp_path):
    path = tmp_path / "array.sh"
    path.write_text(example("array.sh"))
    command = [Path(sys.executable).parent / "shellcheck", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["rayjob.yaml", "job.yaml", "array.sh"])
def test_the_examples_use_options_that_there_are(name):
    used = set(re.findall(r"(?<!\S)(--[a-z-]+)", re.sub(r"#SBATCH.*|srun.*?ctflow", "", example(name))))
    known = {option for each in run_command_of_cohort.params for option in each.opts}
    assert used
    assert used <= known | {"--mount"}
