from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ctflow.bench import evaluate
from ctflow.bench.evaluate import MOST_FALSE_POSITIVES, case_folders, evaluate_folder, require_accuracy
from ctflow.bundle import read_bundle
from ctflow.cli.phantom import write_phantom
from ctflow.core.errors import AccuracyFailed, BackendUnavailable, BundleInvalid, NoUsableSeries, SettingsInvalid
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.structure_set import structure_set_from_labels
from ctflow.engines.contract import EngineInfo
from ctflow.pipeline.segmentation import Segmentation
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from dicom_support import assembled, small_volume
from reasons import raises_reason

SHAPE = (16, 12, 10)
CPU = Settings(device="cpu", cache=None, engine="eager")
TUMOUR = np.s_[4:9, 3:8, 2:6]


@pytest.fixture(scope="module")
def model(coarse_bundle):
    return read_bundle(coarse_bundle)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms") / "one"
    write_phantom(folder, 3, (32, 64, 64))
    return folder


@pytest.fixture
def write_case(model, tmp_path):
    """Writes a case below tmp_path/cases: noise, and a truth that marks what is given."""

    def make(name, *marked, seed=0, truth=True):
        folder = tmp_path / "cases" / name
        folder.parent.mkdir(exist_ok=True)
        write_ct_series(small_volume(seed=seed), folder / "ct", seed=seed)
        labels = np.zeros(SHAPE, np.uint8)
        for number, place in enumerate(marked, start=1):
            labels[place] = number
        if truth:
            headers = [instance.header for instance in assembled(folder / "ct").instances]
            part = model.spec.segments[0]
            spec = replace(model.spec, segments=tuple(replace(part, number=n) for n in (1, 2, 3)))
            dataset = segmentation_from_labels(labels, headers, spec, Provenance("0", "0" * 64, {}))
            write_dataset(dataset, folder / "truth.dcm")
        return folder

    return make


@pytest.fixture
def finds(monkeypatch):
    """Makes every segmenter find what `answer(volume, settings)` marks, without an engine."""

    def make(answer):
        def segment(self, volume, _progress, meanwhile):
            meanwhile()
            settings = self._settings
            info = EngineInfo("fake", settings.precision, "cpu", (1, 1, 1), (1, 1), "0", 2)
            labels = np.zeros(volume.array.shape, np.uint8)
            answer(labels, volume, settings)
            return Segmentation(labels, info, {}), {"segment": 1.5}

        monkeypatch.setattr(Segmenter, "open", lambda *_: None)
        monkeypatch.setattr(Segmenter, "segment", segment)

    return make


def mark_tumour(labels, *_):
    labels[TUMOUR] = 1


def test_a_phantom_is_evaluated_by_the_real_engine(model, phantom):
    steps = []
    document = evaluate_folder(phantom, model, CPU, reference=True, progress=lambda *step: steps.append(step))
    assert json.loads(json.dumps(document, allow_nan=False)) == document, "plain JSON, no numpy, no tuples"
    assert (document["schema_version"], document["exit_code"]) == (1, 0)
    assert "RESEARCH ONLY" in document["research_only"]
    assert document["model"]["weights_digest"] == model.weights_digest
    assert (document["engine"]["backend"], document["engine"]["precision"]) == ("eager", "fp32")
    (case,) = document["cases"]
    assert case["name"] == "."
    assert case["digest"] == digest_of_uid(str(assembled(phantom / "ct").instances[0].header.SeriesInstanceUID))
    assert case["reference"] == {"dice": 1.0, "voxels_differing": 0}, "the same engine twice"
    assert case["volume_truth_ml"] > 0
    assert case["volume_error_ml"] == pytest.approx(case["volume_found_ml"] - case["volume_truth_ml"], abs=1e-5)
    assert len(case["lesions"]) >= 1
    assert case["seconds"] > 0
    assert case["error"] is None
    assert document["summary"]["overall"]["lesions"] == len(case["lesions"])
    assert steps[0] == ("evaluate", 0, 1)
    assert steps[-1] == ("evaluate", 1, 1)
    assert sum(step == ("restore", 32, 32) for step in steps) == 2


def test_the_truth_found_is_exact(model, phantom, finds):
    """What `write_phantom` wrote comes back on its own grid."""
    truth = evaluate.read_segmentation(
        phantom / "truth.dcm", [instance.header for instance in assembled(phantom / "ct").instances]
    )
    assert truth.any()
    finds(lambda labels, *_: np.copyto(labels, truth))
    (case,) = evaluate_folder(phantom, model, CPU, reference=False)["cases"]
    assert (case["dice"], case["hausdorff95_mm"], case["volume_error_ml"]) == (1.0, 0.0, 0.0)
    assert all(lesion["dice"] == 1.0 and lesion["hit"] for lesion in case["lesions"])
    assert len(case["lesions"]) == ndimage.label(truth, np.ones((3, 3, 3)))[1]
    assert case["false_positives"] == []
    assert case["reference"] is None


def test_cases_are_taken_by_name_and_numbers_by_value(model, write_case, finds, tmp_path):
    for seed, name in enumerate(("10", "9", "b")):
        write_case(name, TUMOUR, seed=seed)
    (tmp_path / "cases" / "notes").mkdir()
    (tmp_path / "cases" / "readme.txt").touch()
    finds(mark_tumour)
    document = evaluate_folder(tmp_path / "cases", model, CPU, reference=False)
    assert [case["name"] for case in document["cases"]] == ["9", "10", "b"]
    assert len({case["digest"] for case in document["cases"]}) == 3
    assert document["exit_code"] == 0
    assert document["summary"]["mean_dice"] == 1.0
    assert document["engine"]["backend"] == "fake"


def test_geometry_and_counts_of_a_known_difference(model, write_case, finds):
    folder = write_case("a", TUMOUR)

    def answer(labels, *_):
        labels[4:9, 3:8, 2:5] = 1  # three of four columns
        labels[0, 0, 0] = labels[15, 11, 9] = 1

    finds(answer)
    document = evaluate_folder(folder, model, CPU, reference=False)
    (case,) = document["cases"]
    voxel_ml = 0.9 * 0.6 * 2.5 / 1000  # small_volume's grid
    assert case["dice"] == pytest.approx(2 * 75 / (100 + 77), abs=1e-6)
    assert case["volume_truth_ml"] == pytest.approx(100 * voxel_ml, abs=1e-6)
    assert case["volume_error_ml"] == pytest.approx(-23 * voxel_ml, abs=1e-6)
    (lesion,) = case["lesions"]
    assert lesion["dice"] == pytest.approx(2 * 75 / (100 + 75), abs=1e-6)
    assert lesion["longest_diameter_mm"] == pytest.approx(np.linalg.norm([4 * 2.5, 4 * 0.6, 3 * 0.9]), abs=1e-5)
    assert [item["volume_ml"] for item in case["false_positives"]] == pytest.approx([voxel_ml] * 2, abs=1e-6)
    corners = [small_volume().geometry.world_from_index(corner) for corner in ((0, 0, 0), (15, 11, 9))]
    assert [item["centroid_mm"] for item in case["false_positives"]] == [pytest.approx(list(mm)) for mm in corners]
    assert lesion["hausdorff95_mm"] == case["lesions_hausdorff95_mm"] == pytest.approx(0.9), "one column was missed"
    assert case["seconds"] == pytest.approx(1.5, abs=1.0)


def test_a_truth_of_several_segments_numbers_its_lesions(model, write_case, finds):
    folder = write_case("a", np.s_[4:6, 3:8, 2:6], np.s_[6:9, 3:8, 2:6])
    finds(mark_tumour)
    (case,) = evaluate_folder(folder, model, CPU, reference=False)["cases"]
    assert case["dice"] == 1.0
    assert [lesion["dice"] for lesion in case["lesions"]] == [1.0, 1.0], "they touch and stay two"


@pytest.mark.parametrize("rois", [["*"], ["first", "second"]])
def test_a_truth_may_be_an_rt_structure_set(model, write_case, finds, rois, caplog):
    folder = write_case("a", truth=False)
    headers = [instance.header for instance in assembled(folder / "ct").instances]
    labels = np.zeros(SHAPE, np.uint8)
    labels[4:6, 3:8, 2:6], labels[6:9, 3:8, 2:6] = 1, 2
    part = model.spec.segments[0]
    spec = replace(model.spec, segments=(replace(part, label="First"), replace(part, number=2, label="Second")))
    drawn = structure_set_from_labels(labels, headers, spec, Provenance("0", "0" * 64, {}))
    drawn.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "OPEN_PLANAR"
    write_dataset(drawn, folder / "truth.dcm")
    finds(mark_tumour)
    (case,) = evaluate_folder(folder, model, CPU, rois=rois)["cases"]
    lesions = 1 if rois == ["*"] else 2
    assert [lesion["hit"] for lesion in case["lesions"]] == [True] * lesions
    assert case["dice"] == pytest.approx(2 * 80 / (80 + 100)), "a slice of it is an open contour"
    assert "OPEN_PLANAR" in case["warnings"][0]
    assert f"case .: truth.dcm: {case['warnings'][0]}" in caplog.text
    (case,) = evaluate_folder(folder, model, CPU)["cases"]
    assert case["error"]["reason"] == "several-regions"


def test_the_reference_is_the_eager_engine_in_fp32(model, write_case, finds):
    folder = write_case("a", TUMOUR)
    asked = []

    def answer(labels, _volume, settings):
        asked.append((settings.engine, settings.precision))
        mark_tumour(labels)
        if settings.precision == "fp32":
            labels[4, 3, 2:6] = 0

    finds(answer)
    document = evaluate_folder(folder, model, replace(CPU, engine="auto", precision="bf16"), reference=True)
    assert asked == [("auto", "bf16"), ("eager", "fp32")]
    assert document["engine"]["precision"] == "bf16"
    (case,) = document["cases"]
    assert case["dice"] == 1.0, "the chosen engine is measured"
    assert case["reference"] == {"dice": pytest.approx(2 * 96 / 196, abs=1e-6), "voxels_differing": 4}


def test_without_tumours(model, write_case, finds, tmp_path):
    write_case("a", seed=1)
    finds(lambda labels, *_: None)
    document = evaluate_folder(tmp_path / "cases", model, CPU, reference=False)
    (case,) = document["cases"]
    assert (case["dice"], case["hausdorff95_mm"], case["lesions"]) == (1.0, None, [])
    assert document["summary"]["tumour_free"]["clean"] == 1
    assert document["summary"]["mean_dice"] is None


def test_many_false_positives_are_counted_and_the_largest_listed(model, write_case, finds):
    folder = write_case("a")

    def answer(labels, *_):
        labels[::2, ::2, ::2] = 1
        labels[0, 0, 0:2] = 1

    finds(answer)
    document = evaluate_folder(folder, model, CPU, reference=False)
    (case,) = document["cases"]
    count = 8 * 6 * 5 - 1  # two of them were joined
    assert len(case["false_positives"]) == MOST_FALSE_POSITIVES
    assert case["false_positives"][0]["volume_ml"] > case["false_positives"][1]["volume_ml"]
    assert case["false_positives_left_out"] == count - MOST_FALSE_POSITIVES
    assert document["summary"]["overall"]["false_positives"] == count


def test_a_failed_case_is_listed_and_the_others_count(model, write_case, finds, tmp_path):
    write_case("good", TUMOUR, seed=1)
    damaged = write_case("cut", TUMOUR, seed=2) / "ct" / "00009.dcm"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    write_case("no truth", seed=3, truth=False)
    write_case("truth of another", TUMOUR, seed=4)
    shutil.copy(tmp_path / "cases" / "good" / "truth.dcm", tmp_path / "cases" / "truth of another" / "truth.dcm")
    (tmp_path / "cases" / "no series").mkdir()
    shutil.copy(tmp_path / "cases" / "good" / "truth.dcm", tmp_path / "cases" / "no series" / "truth.dcm")
    finds(mark_tumour)
    document = evaluate_folder(tmp_path / "cases", model, CPU, reference=True)
    assert document["exit_code"] == 6
    cases = {case["name"]: case for case in document["cases"]}
    reasons = {name: case["error"] and case["error"]["reason"] for name, case in cases.items()}
    assert reasons == {
        "good": None,
        "cut": "unreadable",
        "no truth": "unreadable",
        "truth of another": "other-series",
        "no series": "not-a-folder",
    }
    assert len({frozenset(case) for case in cases.values()}) == 1, "every case has the same keys"
    assert cases["cut"]["digest"] is not None
    assert cases["no series"]["digest"] is None
    assert document["summary"]["cases"] == 1


def test_a_fault_that_one_case_meets_is_its_own(model, write_case, finds, tmp_path, monkeypatch):
    write_case("a", TUMOUR, seed=1)
    write_case("b", TUMOUR, seed=2)
    finds(mark_tumour)
    compare, calls = evaluate.compare_masks, []

    def maybe(*arguments):
        calls.append(None)
        if len(calls) == 1:
            raise KeyError("Doe^John")
        return compare(*arguments)

    monkeypatch.setattr(evaluate, "compare_masks", maybe)
    document = evaluate_folder(tmp_path / "cases", model, CPU)
    failed, done = document["cases"]
    assert (failed["error"]["reason"], done["error"], document["exit_code"]) == ("unexpected", None, 6)
    assert "Doe" not in failed["error"]["message"]


def test_a_resampled_series_is_refused_not_compared_with_another_grid(model, write_case, finds, tmp_path):
    folder = write_case("a", TUMOUR)
    shutil.rmtree(folder / "ct")

    def sheared(dataset, index):
        x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
        dataset.ImagePositionPatient = [x, y + 0.3 * index, z]

    write_ct_series(small_volume(seed=0), folder / "ct", seed=0, adjust=sheared)
    finds(mark_tumour)
    (case,) = evaluate_folder(tmp_path / "cases", model, CPU, reference=False)["cases"]
    assert (case["error"]["type"], case["error"]["reason"]) == ("UnsupportedPixels", "other-grid")


def test_where_all_fail_the_first_decides(model, write_case, finds, tmp_path):
    def fail(*_):
        raise BundleInvalid("not finite", reason="weights")

    write_case("a", TUMOUR)
    finds(fail)
    document = evaluate_folder(tmp_path / "cases", model, CPU, reference=False)
    assert document["exit_code"] == BundleInvalid.exit_code
    assert document["engine"] is None
    facts = {"type": "BundleInvalid", "exit_code": 3, "reason": "weights", "message": "not finite"}
    assert document["cases"][0]["error"] == facts
    assert document["summary"]["cases"] == 0
    json.dumps(document, allow_nan=False)


def test_two_series_in_a_case_are_not_guessed_between(model, write_case, finds, tmp_path):
    folder = write_case("a", TUMOUR)
    write_ct_series(small_volume(seed=7), folder / "ct" / "second", seed=7)
    finds(mark_tumour)
    (case,) = evaluate_folder(folder, model, CPU, reference=False)["cases"]
    assert case["error"]["reason"] == "several-series"


def test_what_cannot_start_is_raised(model, write_case, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, reason in ((tmp_path / "empty", "no-case"), (tmp_path / "nowhere", "folder-unreadable")):
        with raises_reason(NoUsableSeries, reason):
            case_folders(folder)
    folder = write_case("a", TUMOUR)
    with raises_reason(BackendUnavailable, "no-such-device"):
        evaluate_folder(folder, model, Settings(device="cuda:99", cache=None), reference=False)
    several = replace(model, spec=replace(model.spec, segments=model.spec.segments * 2))
    with raises_reason(SettingsInvalid, "several-segments"):
        evaluate_folder(folder, several, CPU, reference=False)


def test_results_of_an_earlier_run_are_compared_without_segmenting(write_case, model, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "open", lambda *_: pytest.fail("nothing is to be segmented"))
    folder = write_case("a", TUMOUR)
    headers = [instance.header for instance in assembled(folder / "ct").instances]
    found = np.zeros(SHAPE, np.uint8)
    found[4:9, 3:8, 2:5] = 1
    key = f"{headers[0].SeriesInstanceUID}-{digest_of_uid(headers[0].StudyInstanceUID)}"
    (tmp_path / "out" / key).mkdir(parents=True)
    segmentation = segmentation_from_labels(found, headers, model.spec, Provenance("0", "0" * 64, {}))
    write_dataset(segmentation, tmp_path / "out" / key / "segmentation.dcm")
    made_by = tmp_path / "out" / key / "result.json"
    made_by.write_text(json.dumps({"model": {"weights_digest": model.weights_digest}}))
    document = evaluate_folder(folder, model, CPU, results=tmp_path / "out")
    (case,) = document["cases"]
    assert case["dice"] == pytest.approx(2 * 75 / (75 + 100))
    assert case["lesions"][0]["hit"]
    assert (case["seconds"], document["engine"]) == (None, None)
    with raises_reason(NoUsableSeries, "folder-unreadable", names="--results"):
        evaluate_folder(folder, model, CPU, results=tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    document = evaluate_folder(folder, model, CPU, results=tmp_path / "elsewhere")
    assert document["cases"][0]["error"]["reason"] == "no-result"
    cohort = tmp_path / "cohort"
    shutil.copytree(tmp_path / "out", cohort / "results" / "row-1")
    for results in (cohort, cohort / "results", cohort / "results" / "row-1"):
        assert evaluate_folder(folder, model, CPU, results=results)["cases"][0]["dice"] == case["dice"]
    shutil.copytree(tmp_path / "out", cohort / ".superseded")
    assert evaluate_folder(folder, model, CPU, results=cohort)["cases"][0]["dice"] == case["dice"]
    shutil.copytree(tmp_path / "out", cohort / "results" / "row-2")
    error = evaluate_folder(folder, model, CPU, results=cohort)["cases"][0]["error"]
    assert error["reason"] == "no-result"
    assert "several" in error["message"]
    for text in ("", "{}", json.dumps({"model": {"weights_digest": "0" * 64}})):
        made_by.write_text(text)
        document = evaluate_folder(folder, model, CPU, results=tmp_path / "out")
        assert document["cases"][0]["error"]["reason"] == "other-model"


def lesion(size_mm, hit):
    return {"equivalent_diameter_mm": size_mm, "hit": hit}


@pytest.mark.parametrize(
    ("dice", "lesions", "reason", "names"),
    [
        (0.9, [lesion(12.0, True), lesion(8.0, False)], None, ()),
        (0.79, [lesion(12.0, True)], "dice-too-low", ("0.790", "0.8")),
        (0.9, [lesion(30.0, True), lesion(10.0, False)], "lesion-missed", "10.0 mm"),
        (None, [], None, ()),
    ],
)
def test_an_accuracy_that_is_asked_for_is_checked(dice, lesions, reason, names):
    document = {"cases": [{"name": "a", "dice": dice, "lesions": lesions}]}
    if reason is None:
        require_accuracy(document, 0.8)
        return
    with raises_reason(AccuracyFailed, reason, names=names) as failure:
        require_accuracy(document, 0.8)
    assert failure.value.exit_code == 3
