"""A run of the demonstration model imports only what a CT needs: a second or more for each of the packages below."""

from __future__ import annotations

import subprocess
import sys

from ctflow.dicom.write.ct_series import write_ct_series
from phantom_support import phantom_drawn_once

UNNEEDED = (
    "monai matplotlib ctflow.phantom ctflow.bench ctflow.node scipy.signal scipy.stats scipy.optimize pandas sympy "
    "onnx onnxscript onnxruntime openvino tensorrt triton torch._dynamo torch._inductor nibabel holoscan"
)


def test_a_run_imports_no_package_that_it_does_not_need(tmp_path):
    volume = phantom_drawn_once(3, (18, 80, 80)).volume
    write_ct_series(volume, tmp_path / "in", seed=3)
    words = [
        "-l",
        "INFO",
        "run",
        "-i",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "--engine",
        "eager",
        "--device",
        "cpu",
    ]
    program = (
        "import sys; from ctflow.cli.start import main\n"
        f"sys.argv = ['ctflow', *{words!r}]; assert main() == 0\n"
        f"print('imported:', *(name for name in {UNNEEDED!r}.split() if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["imported:"]
    (line,) = (line for line in done.stderr.splitlines() if "first window" in line)
    parts = line.partition("process: ")[2]
    names = [part.split()[0] for part in parts.split(", ")]
    assert names == ["imports", "scan", "bundle", "engine", "reading", "preparation"]
    assert (tmp_path / "out" / "result.json").is_file()
