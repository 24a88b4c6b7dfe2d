"""OHIF's reader of SEG, @cornerstonejs/adapters with dcmjs, in Node: every geometry in every form, voxel for voxel."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest

from needs import skip_without
from viewer_record import agrees_with_record
from viewer_support import FORMS, SERIES, forms_of, labels_on_images, objects_of, outcome_of, write_series

HERE = Path(__file__).parent
# OHIF 3.11, 3.12 and 3.13 have the second to fourth; the first had OHIF 3.7, and the last is the newest.
VERSIONS = ("1.32.2", "3.33.5", "4.15.29", "5.6.8", "5.14.0")
LESS_USED = ("1.32.2", "4.15.29")


def program(version: str) -> Path:
    path = HERE / "build" / f"adapters-{version}.cjs"
    if shutil.which("node") is None or not path.is_file():
        skip_without("adapters of OHIF")
    return path


@pytest.fixture(scope="module", params=SERIES)
def series(request, tmp_path_factory):
    """(Name, CT, folder of each form.)"""
    folder = tmp_path_factory.mktemp("viewers")
    program(VERSIONS[0])
    ct = write_series(request.param, folder / "ct")
    return request.param, ct, {form: objects_of(ct, folder / form, **FORMS[form]) for form in forms_of(request.param)}


@pytest.mark.parametrize(
    "version", [pytest.param(each, marks=[pytest.mark.exhaustive] if each in LESS_USED else []) for each in VERSIONS]
)
def test_the_adapters_mark_what_the_record_says(series, version, tmp_path):
    name, ct, folders = series
    segs = [folder / "segmentation.dcm" for folder in folders.values()]
    answers = tmp_path / "answers"
    subprocess.run(["node", program(version), answers, ct, *segs], capture_output=True, check=True, timeout=120)
    for form, seg, line in zip(folders, segs, answers.read_text().splitlines(), strict=True):
        outcome = outcome_of_answer(json.loads(line), labels_on_images(seg, ct))
        agrees_with_record(f"adapters {version}", form, name, outcome)


def outcome_of_answer(answer, truth) -> str:
    if "error" in answer:
        return answer["error"] if answer["error"] == "never finishes" else "rejects it"
    found = {uid: np.frombuffer(base64.b64decode(text), np.uint8) for uid, text in answer["labels"].items()}
    return outcome_of({uid: labels.reshape(truth[uid].shape) for uid, labels in found.items()}, truth)


def test_the_truth_is_what_was_marked(tmp_path):
    """highdicom's reading, with which viewers are compared, is that of the images' own order."""
    ct = write_series("plain", tmp_path / "ct")
    seg = objects_of(ct, tmp_path / "out") / "segmentation.dcm"
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(ct.iterdir())]
    truth = labels_on_images(seg, ct)
    stack = np.stack([truth[header.SOPInstanceUID] for header in headers])
    assert set(np.unique(stack)) == {0, 1, 2}
    assert np.flatnonzero(stack.any(axis=(1, 2))).tolist() == [2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert stack[2, 3, 2:9].tolist() == [2] * 7
    for other in (stack[::-1], stack[:, ::-1], stack[:, :, ::-1]):
        assert not np.array_equal(stack, other)


def test_dcmjs_reads_the_numbers_of_the_report(tmp_path):
    program(VERSIONS[-1])
    ct = write_series("plain", tmp_path / "ct")
    path = objects_of(ct, tmp_path / "out") / "measurements.dcm"
    script = (
        "const dcmjs = require('dcmjs'); const bytes = require('fs').readFileSync(process.argv[1]);"
        "const buffer = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);"
        "const found = []; const walk = item => { for (const value of [item.MeasuredValueSequence || []].flat())"
        " found.push(Number(value.NumericValue)); [item.ContentSequence || []].flat().forEach(walk); };"
        "walk(dcmjs.data.DicomMetaDictionary.naturalizeDataset(dcmjs.data.DicomMessage.readFile(buffer).dict));"
        "process.stdout.write(JSON.stringify(found));"
    )
    done = subprocess.run(
        ["node", "-e", script, path], cwd=HERE, capture_output=True, text=True, check=True, timeout=60
    )
    items, numbers = [pydicom.dcmread(path)], []
    while items:
        item = items.pop(0)
        numbers += [float(value.NumericValue) for value in item.get("MeasuredValueSequence", [])]
        items = [*item.get("ContentSequence", []), *items]
    assert len(numbers) >= 12
    assert json.loads(done.stdout) == numbers
