"""Each patch is still needed: where a test fails, its library has moved on, and `compat/` is to be looked at."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from pydicom import config

import ctflow.compat

PATCHED = sorted(path.stem for path in Path(ctflow.compat.__file__).parent.glob("*.py"))


def run_afresh(code: str, *packages: Path) -> str:
    """What a process writes that has imported nothing, and finds these packages first."""
    path = os.pathsep.join([*map(str, packages), *(entry for entry in sys.path if entry)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name for name in PATCHED if name not in {"__init__", "scope"}])
def test_a_patch_says_for_which_versions_why_and_what_upstream_knows(name):
    said = importlib.import_module(f"ctflow.compat.{name}").__doc__
    assert "Read for " in said
    assert any(word in said for word in ("issue", "Issue", "pull request", "Pull request"))


def test_importing_ctflow_leaves_pydicoms_validation_and_log_to_its_process():
    code = """
import io, logging
import pydicom
from pydicom import config
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
heard = io.StringIO()
logging.getLogger("pydicom").addHandler(logging.StreamHandler(heard))
config.debug(True)
config.settings.reading_validation_mode = config.RAISE
import ctflow
for name in ctflow.__all__:
    getattr(ctflow, name)
import ctflow.node.receive.receiver, ctflow.pipeline.run, ctflow.dicom.write.segmentation
dataset = pydicom.Dataset()
dataset[0x00180050] = RawDataElement(Tag(0x00180050), "DS", 24, b"2.5000000000000000000000", 0, False, True)
try:
    dataset.SliceThickness
except OverflowError:
    print("raised")
logging.getLogger("pydicom").debug("heard")
print(heard.getvalue().splitlines()[-1])
"""
    assert run_afresh(code).splitlines() == ["raised", "heard"]


def test_pydicom_keeps_its_switches_for_the_whole_process(monkeypatch):
    monkeypatch.setattr(config.settings, "_reading_validation_mode", config.RAISE)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(config.settings.reading_validation_mode))
    thread.start()
    thread.join()
    assert seen == [config.RAISE]


def test_monai_imports_all_of_itself():
    spec = find_spec("monai")
    assert spec is not None
    folder = Path(spec.origin or "").parent
    assert version("monai").startswith("1.6.")
    assert "load_submodules(" in (folder / "__init__.py").read_text()
    assert "walk_packages(" in (folder / "utils" / "module.py").read_text()


def test_pynetdicom_is_the_version_whose_loops_and_upper_layer_are_known():
    """With another one: read `dul.py`, `dimse.py`, `fsm.py` and `service_class.py` again, then change this line."""
    assert version("pynetdicom") == "3.0.4"


def test_openvino_imports_its_telemetry(tmp_path):
    package = tmp_path / "openvino_telemetry"
    package.mkdir()
    (package / "__init__.py").write_text(
        "class Telemetry:\n    def __getattr__(self, name): return lambda *a, **b: None"
    )
    found = run_afresh("import openvino, sys; print('openvino_telemetry' in sys.modules)", tmp_path)
    assert found.splitlines()[-1] == "True"


def test_torch_gives_up_after_a_few_compilations_and_an_old_one_has_no_argument_for_it():
    from torch._dynamo import config as dynamo  # noqa: PLC0415  # seconds to import

    assert dynamo.recompile_limit < 100
    oldest = next(each for each in map(Requirement, requires("ctflow") or ()) if each.name == "torch")
    assert oldest.specifier.contains("2.12.0"), "torch.compile has had recompile_limit since 2.13"


def test_a_process_that_python_spawns_runs_the_script_first(tmp_path):
    start = "multiprocessing.get_context('spawn').Process(target=print, args=('child',))"
    guarded = f"with bare_start():\n    child = {start}; child.start()\nchild.join()\n"
    script = tmp_path / "script.py"
    for name, body, times in (("plain", f"child = {start}\nchild.start(); child.join()\n", 2), ("bare", guarded, 1)):
        imports = "import multiprocessing, sys\nfrom ctflow.compat.python import bare_start\n"
        end = "if multiprocessing.parent_process(): sys.exit()\n"
        script.write_text(f"{imports}print('script', flush=True)\n{end}{body}")
        done = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)
        assert done.stdout.count("script") == times, name + done.stderr


def test_holoscan_depends_on_no_package_with_the_cuda_runtime():
    needed = [Requirement(each) for each in requires("holoscan-cu13") or ()]
    assert needed
    assert not [each for each in needed if "cuda-runtime" in each.name]
