"""Reading and writing a case need no torch, whose import takes longer than either."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from ctflow.export.figures import Agreement, Measured, ParityResult
from ctflow.pipeline.case import find_cases
from ctflow.pipeline.stages import load_case, segment_case
from ctflow.pipeline.write import write_case
from ctflow.settings.run import Settings
from marking_support import MarkingSegmenter, marking_model

SETTINGS = Settings(device="cpu", cache=None)
STAGE = """
import pickle, sys
from pathlib import Path
from ctflow.pipeline import {module}
arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
Path(sys.argv[1]).write_bytes(pickle.dumps({module}.{stage}(*arguments)))
print(*sorted({{"torch", "monai", "matplotlib"}} & set(sys.modules)))
"""


def in_a_process(module, stage, arguments, tmp_path):
    """The result of a stage in a new process, which must not have imported the heavy packages."""
    file = tmp_path / "arguments.pickle"
    file.write_bytes(pickle.dumps(arguments))
    program = STAGE.format(module=module, stage=stage)
    done = subprocess.run([sys.executable, "-c", program, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "imported"
    return pickle.loads(file.read_bytes())


def test_a_case_is_read_and_written_without_torch_and_is_the_same(series, tmp_path):
    model = marking_model()
    (found,) = find_cases(series, model.spec, SETTINGS).cases
    here = load_case(found)
    there = in_a_process("stages", "load_case", (found,), tmp_path)
    assert there.error is None
    assert (there.loaded.volume.array == here.loaded.volume.array).all()
    case = segment_case(there, MarkingSegmenter(model, SETTINGS))
    agreement = Agreement(4, 8, 0.9999, 1e-4, "labels", "fused fp16", "eager fp32", "this series", "2026-01-01", True)
    measured = (Measured("fused", "fp16", 0.1, ParityResult(1e-4, 0.9999, 4, "labels"), None, 4),)
    case = replace(case, segmentation=replace(case.segmented, agreement=agreement, measured=measured))
    folders = [tmp_path / "here", tmp_path / "there"]
    assert write_case(case, model, SETTINGS, folders[0]).error is None
    written = in_a_process("write", "write_case", (case, model, SETTINGS, folders[1]), tmp_path)
    assert written.error is None
    for name in ("segmentation.dcm", "measurements.dcm", "preview.png"):
        first, second = ((folder / case.key / name).read_bytes() for folder in folders)
        assert first == second, name


@pytest.mark.parametrize("module", ["ctflow.dicom.read.select.selection", "ctflow.pipeline.case"])
def test_finding_the_cases_of_a_folder_needs_no_torch(module):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
