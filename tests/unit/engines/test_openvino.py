from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ctflow.core.errors import BackendUnavailable
from ctflow.core.processes import usable_cpus
from ctflow.engines import contract, onnxruntime, openvino
from reasons import raises_reason

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")

ASK = """
import sys
from ctflow.engines.openvino import _core
_core()
import openvino.tools.ovc.convert_impl
assert "openvino_telemetry" not in sys.modules, "loaded"
"""


@needs_openvino
def test_telemetry_is_not_even_imported(tmp_path):
    package = tmp_path / "openvino_telemetry"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'sent')!r}, 'w').close()\nclass Telemetry: ...\n")
    (package / "backend.py").write_text("backend_ga4 = None\n")
    source = Path(openvino.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ASK.replace("import openvino.tools", "import openvino.tools", 1)],
        env={"PYTHONPATH": f"{tmp_path}:{source}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "sent").exists()


class Core:
    def get_property(self, *_):
        return ["FP32"]


def test_a_cpu_without_bf16_is_named(monkeypatch):
    monkeypatch.setattr(openvino, "_core", Core)
    with raises_reason(BackendUnavailable, "wrong-precision", names="bf16"):
        openvino.check_settings("cpu", "bf16")


@pytest.mark.parametrize("module", [openvino, onnxruntime])
def test_another_device_is_named(module):
    with raises_reason(BackendUnavailable, "wrong-device", names="cuda:0"):
        module.check_settings("cuda:0", "fp32")


@pytest.mark.parametrize("module", [openvino, onnxruntime])
def test_an_absent_package_says_what_to_install(monkeypatch, module):
    monkeypatch.setattr(contract, "find_spec", lambda _: None)
    available, reason = module.is_available()
    assert not available
    assert "pip install" in reason


def test_a_containers_limit_counts(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    for text, expected in (("250000 100000\n", 3), ("max 100000\n", 64), ("10000 100000\n", 1), ("", 64)):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert usable_cpus() == expected
