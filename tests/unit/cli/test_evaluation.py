from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ctflow.bundle import read_bundle
from ctflow.cli.evaluation import evaluate_command
from ctflow.cli.main import cli
from ctflow.core.errors import BundleInvalid, NotWritten, NoUsableSeries, SettingsInvalid
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.pipeline.segmenter import Segmenter
from dicom_support import assembled, small_volume
from reasons import raises_reason

OPTIONS = {"device": "cpu", "engine": "eager"}


@pytest.fixture
def case(coarse_bundle, tmp_path):
    """One case: noise, and a truth that marks a box in it."""
    folder = tmp_path / "case"
    folder.mkdir()
    write_ct_series(small_volume(), folder / "ct")
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[4:9, 3:8, 2:6] = 1
    headers = [instance.header for instance in assembled(folder / "ct").instances]
    spec = read_bundle(coarse_bundle).spec
    write_dataset(segmentation_from_labels(labels, headers, spec, Provenance("0", "0" * 64, {})), folder / "truth.dcm")
    return folder


def last_line(text):
    return json.loads(text.splitlines()[-1])


def test_a_case_becomes_a_table_a_document_and_a_chart(case, coarse_bundle, tmp_path, capsys):
    assert evaluate_command(case, str(coarse_bundle), OPTIONS, tmp_path / "out" / "deep", reference=True) == 0
    shown = capsys.readouterr()
    document = last_line(shown.out)
    assert "sensitivity" in shown.out
    assert "RESEARCH ONLY" in shown.out
    assert document["cases"][0]["reference"] == {"dice": 1.0, "voxels_differing": 0}
    assert json.loads((tmp_path / "out" / "deep" / "evaluation.json").read_text()) == document
    with Image.open(tmp_path / "out" / "deep" / "evaluation.png") as picture:
        assert picture.format == "PNG"
    assert len(list((tmp_path / "out" / "deep").iterdir())) == 2


def test_the_model_may_come_from_the_environment(case, coarse_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOLOSCAN_MODEL_PATH", str(tmp_path / "no bundle"))
    monkeypatch.setenv("HOLOSCAN_INPUT_PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(Segmenter, "open", lambda *_: pytest.fail("the bundle comes first"))
    with raises_reason(BundleInvalid, "no-bundle"):
        evaluate_command(case, None, OPTIONS, None, reference=False)
    assert capsys.readouterr().out == ""


def test_where_every_case_fails_nothing_is_written(case, coarse_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Segmenter, "open", lambda *_: None)
    (case / "truth.dcm").write_bytes(b"")
    code = evaluate_command(case, str(coarse_bundle), OPTIONS, tmp_path / "out", reference=False)
    assert code == NoUsableSeries.exit_code
    assert last_line(capsys.readouterr().out)["cases"][0]["error"]["reason"] == "unreadable"
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_that_cannot_be_is_named_before_the_work(case, coarse_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "open", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with raises_reason(NotWritten, "unwritable"):
        evaluate_command(case, str(coarse_bundle), OPTIONS, tmp_path / "file" / "out", reference=False)


def test_wrong_settings_are_named(case):
    with raises_reason(SettingsInvalid, "invalid-value", names="--overlap"):
        evaluate_command(case, None, {"overlap": "3"}, None, reference=False)


def test_regions_of_a_truth_are_named_one_after_another(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("ctflow.cli.evaluation.evaluate_command", lambda *_, **words: given.update(words) or 0)
    CliRunner().invoke(cli, ["evaluate", str(tmp_path), "--truth-roi", "GTV*", "--truth-roi", "PTV"])
    assert given["rois"] == ("GTV*", "PTV")
