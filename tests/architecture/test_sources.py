"""Each third-party package has its owners, and the environment one reader; a rule that matches nothing fails."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from source_support import Importers, Source, importers_of, sources

OWNERS = {
    "holoscan": ("operators/", "app/"),
    "monai.deploy": ("operators/", "app/"),
    "holoscan_cli": ("src/ctflow/cli/monai_deploy.py",),
    "pynetdicom": ("src/ctflow/node/", "src/ctflow/compat/pynetdicom.py"),
    "argon2": ("src/ctflow/node/access/",),
    "python_multipart": ("src/ctflow/node/dicomweb/",),
    "starlette": ("src/ctflow/node/web/", "src/ctflow/node/dicomweb/"),
    "uvicorn": ("src/ctflow/node/web/",),
    "jinja2": ("src/ctflow/node/web/", "src/ctflow/report/html_report.py"),
    "prometheus_client": ("src/ctflow/node/metrics.py", "src/ctflow/cohort/report/metrics.py"),
    "cryptography": ("src/ctflow/node/tls.py",),
    "yaml": ("src/ctflow/settings/document.py", "src/ctflow/bundle/config/yaml_document.py"),
    "pyarrow": ("src/ctflow/cohort/manifest/parquet_table.py", "src/ctflow/cohort/report/tables.py"),
    "ray": ("src/ctflow/cohort/cluster/",),
    "dicomweb_client": ("src/ctflow/cohort/stores/dicomweb.py",),
    "fsspec": ("src/ctflow/cohort/stores/objects.py",),
    "pydantic": ("src/ctflow/settings/schema.py",),
    "pydantic_core": ("src/ctflow/settings/schema.py",),
    "tensorrt": (
        "src/ctflow/engines/tensorrt/engine.py",
        "src/ctflow/engines/tensorrt/torch_program.py",  # stands on it
    ),
    "tensorrt_rtx": ("src/ctflow/engines/tensorrt/rtx.py",),
    "torch_tensorrt": ("src/ctflow/engines/tensorrt/torch_program.py",),
    "openvino": ("src/ctflow/engines/openvino.py",),
    "onnxruntime": ("src/ctflow/engines/onnxruntime.py",),
    "onnx": ("src/ctflow/export/onnx.py", "src/ctflow/engines/onnxfile.py"),
    "onnxscript": ("src/ctflow/export/onnx.py", "src/ctflow/engines/onnxfile.py"),  # the latter asks for its version
    "cuda": ("src/ctflow/kernels/", "src/ctflow/engines/fused.py"),
    "click": ("src/ctflow/cli/", "src/ctflow/settings/command.py"),
    "rich": ("src/ctflow/report/",),
    "highdicom": ("src/ctflow/dicom/", "src/ctflow/compat/highdicom.py"),
    "dynamic_network_architectures": ("src/ctflow/networks/nnunet.py",),
    "matplotlib": ("src/ctflow/report/charts.py",),
    "PIL": ("src/ctflow/report/",),
    "reportlab": ("src/ctflow/report/pdf/",),
    "contourpy": ("src/ctflow/measurements/contours.py",),
    "shapely": ("src/ctflow/measurements/contours.py",),
}
ENVIRONMENT = {
    "src/ctflow/settings/run.py",
    "src/ctflow/cohort/cluster/connection.py",  # Ray reads its settings there
    "src/ctflow/core/user.py",  # makes up for what other packages look for there
}
# Modules that import by a name that only a run knows: of their own tables, of the project's requirements, of MONAI,
# of the backend that is asked for, of a bundle's own code that was allowed.
COMPUTED = {
    "src/ctflow/__init__.py",
    "src/ctflow/compat/monai.py",
    "src/ctflow/core/requirements.py",
    "src/ctflow/engines/registry.py",
    "src/ctflow/engines/tensorrt/engine.py",
    "src/ctflow/export/prepare.py",
}


@cache
def code(repository: Path) -> tuple[dict[str, Source], Importers]:
    found = sources(repository)
    return found, importers_of(found)


@cache
def names_by_place(repository: Path) -> dict[str, set[str]]:
    found, importers = code(repository)
    return {place: source.statements() | source.called(importers)[0] for place, source in found.items()}


@pytest.mark.parametrize("package", OWNERS)
def test_every_package_has_its_owners(repository, package):
    uses = [
        place
        for place, names in names_by_place(repository).items()
        if any(name == package or name.startswith(f"{package}.") for name in names)
    ]
    owners = OWNERS[package]
    assert not [place for place in uses if not place.startswith(owners)]
    assert not [owner for owner in owners if not any(place.startswith(owner) for place in uses)], "owns nothing"


def test_only_the_settings_read_the_environment(repository):
    assert {place for place, source in code(repository)[0].items() if source.environment_reads()} == ENVIRONMENT


def test_what_is_imported_by_name_is_to_be_seen(repository):
    found, importers = code(repository)
    assert {place for place, source in found.items() if source.called(importers)[1]} == COMPUTED
    assert "ctflow.engines.tensorrt.runtime.load_runtime" in importers


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.environ['A']",
        "import os\nos.environ.get('A')",
        "import os as system\nsystem.getenv('A')",
        "import os\ndef f():\n    return dict(os.environ)",
        "from os import environ",
        "from os import getenv as read",
        "from os import *",
        "import os\nsystem = os\nsystem.getenv('A')",
        "import os\ngetattr(os, 'environ')",
        "import os.path\nos.path.expandvars('$A')",
        "import os\nos.putenv('A', 'b')",
        "import click\n@click.option('--a', envvar='A')\ndef f(a): ...",
    ],
)
def test_a_read_of_the_environment_is_found(text):
    assert Source(text).environment_reads()


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.cpu_count()",
        "def f(environ): return environ['A']",
        "'os.environ'",
        "class A:\n    environ = 1\nA.environ",
        "getattr(a, 'environ')",
    ],
)
def test_what_only_looks_so_is_none(text):
    assert not Source(text).environment_reads()


@pytest.mark.parametrize(
    "text",
    [
        "import p.q",
        "from p import q",
        "import importlib\nimportlib.import_module('p.q')",
        "from importlib import import_module as load\nload('p.q')",
        "import importlib as i\ni.import_module(name='p.q')",
        "__import__('p.q')",
        "import importlib.util\nimportlib.util.find_spec('p.q')",
        "from importlib.metadata import version\nversion('p.q')",
        "from importlib.metadata import distribution\nNAME = 'p.q'\ndistribution(NAME)",
        "from importlib.util import find_spec\nNEEDED = ('a', 'p.q')\n[find_spec(name) for name in NEEDED]",
        "from importlib.util import find_spec\nfor name, word in (('p.q', 'a'), ('b', 'c')):\n    find_spec(name)",
        "from importlib import import_module\nP = 'p'\nimport_module(f'{P}.q')",
        "from importlib import import_module\nload = import_module\nload('p.q')",
        "from importlib import import_module\ndef load(name): return import_module(name)\nload('p.q')",
        "from importlib import import_module\ndef load(a, name): return import_module(str(name))\nload(1, name='p.q')",
    ],
)
def test_an_import_is_found(text):
    source = Source(text, "m")
    names, unknown = source.called(importers_of({"": source}))
    assert {"p.q"} <= names | source.statements()
    assert not unknown


def test_an_import_by_a_computed_name_is_found():
    source = Source("from importlib import import_module\nTABLE = {}\ndef f(key):\n    import_module(TABLE[key])", "m")
    assert source.called(importers_of({"": source})) == (set(), [4])


def test_the_package_is_found_beside_a_folder_of_its_name(repository, tmp_path):
    """As where the checkout is called ctflow and Python starts above it; install.sh puts `src` among the paths."""
    (tmp_path / "ctflow").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import ctflow, ctflow.api, ctflow.app; print(ctflow.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(repository / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == repository / "src" / "ctflow" / "__init__.py"
