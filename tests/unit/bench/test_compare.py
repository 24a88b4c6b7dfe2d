from __future__ import annotations

import functools
import importlib
import json
import pkgutil
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bundle_support import small_unet_bundle
from ctflow.bench import case, compare
from ctflow.bench.compare import Comparison, compare_configurations
from ctflow.bench.exactness import dice_of
from ctflow.bench.measurement import MeasurementRequest, measure_configuration, on_source, request_from_document
from ctflow.bench.results import configurations_for
from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BackendUnavailable, BundleInvalid, SettingsInvalid
from ctflow.core.volume import Volume
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.phantom import phantom_from_seed
from ctflow.transforms.prepare import prepare_volume
from reasons import raises_reason

SHAPE = (120, 64, 64)


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Each phantom is drawn once for all tests: they ask when the comparison draws one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(case, "phantom_from_seed", functools.cache(case.phantom_from_seed))
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture(scope="module")
def measured(bundle) -> dict:
    """Real processes: stock, the article's loop, ctflow, and a configuration that this machine cannot run."""
    names = ("1", "0a", "4", "5x2", "1", "eager-fp32")  # one is named twice
    comparison = Comparison(bundle, ("cpu",), SHAPE, repeats=2, only=names, overlaps=(0.0, 0.25))
    return compare_configurations(comparison)


@pytest.fixture(scope="module")
def measured_before(bundle, tmp_path_factory) -> tuple[Comparison, dict]:
    """A comparison of one configuration, which its folder keeps, and its document."""
    kept = tmp_path_factory.mktemp("kept") / "kept"
    comparison = Comparison(bundle, ("cpu",), SHAPE, repeats=1, only=("1",), overlaps=(0.0,), kept=kept)
    heard = []
    document = compare_configurations(comparison, heard=heard.append)
    assert heard == [document]
    shutil.copytree(kept, kept.with_name("as measured"))
    return comparison, document


@pytest.fixture
def one_configuration(measured_before) -> tuple[Comparison, dict]:
    """The same, with its folder as it was; a configuration also belongs to its place."""
    comparison, document = measured_before
    shutil.rmtree(comparison.kept)
    shutil.copytree(comparison.kept.with_name("as measured"), comparison.kept)
    return comparison, document


def configuration(document: dict, name: str) -> dict:
    (found,) = [entry for entry in document["configurations"] if entry["id"] == name]
    return found


def test_configurations_are_measured_in_the_order_named_or_say_why_not(measured):
    assert [entry["id"] for entry in measured["configurations"]] == ["1", "0a", "4", "5x2", "eager-fp32"]
    assert [entry["status"] for entry in measured["configurations"]] == [
        "measured",
        "measured",
        "refused",
        "refused",
        "measured",
    ]
    assert [bool(entry["reason"]) for entry in measured["configurations"]] == [False, False, True, True, False]
    assert "tensorrt" in configuration(measured, "4")["reason"]
    assert configuration(measured, "5x2")["reason"] == "needs 2 GPUs; 1 given"
    json.dumps(measured, allow_nan=False)


def test_results_tell_seconds_windows_factors_and_exactness(measured):
    for entry in measured["configurations"]:
        if entry["reason"]:
            assert "results" not in entry
            continue
        assert [result["overlap"] for result in entry["results"]] == [0.0, 0.25]
        assert [result["windows"] for result in entry["results"]] == [8, 18]
        for number, result in enumerate(entry["results"]):
            assert len(result["seconds"]) == 2
            assert min(result["seconds"]) <= result["median_s"] <= max(result["seconds"])
            assert result["dice_to_article"] >= 0.99
            assert result["dice_to_stock"] >= 0.99
            assert result["factor_to_stock_half"] is None  # a CPU has no such configuration
            article = configuration(measured, "1")["results"][number]["median_s"]
            assert result["factor_to_article"] == pytest.approx(article / result["median_s"], rel=0.02)
    assert configuration(measured, "1")["results"][0]["dice_to_article"] == 1.0
    assert configuration(measured, "0a")["results"][1]["dice_to_stock"] == 1.0
    assert configuration(measured, "eager-fp32")["engine_info"]["backend"] == "eager"
    assert configuration(measured, "0a")["engine_info"] is None


def test_the_document_says_on_what(measured):
    assert measured["case"]["shape"] == list(SHAPE)
    assert measured["model"]["network"] == "UNet"
    assert measured["machine"]["gpus"] == []
    assert measured["repeats"] == 2


def test_configurations_have_the_same_names_on_every_machine_with_gpus():
    names = [entry.id for entry in configurations_for(("cuda:0",))]
    assert {
        "5x2",
        "5x4",
        "6",
        "6x4",
        "tensorrt-fp16",
        "tensorrt-fp16x2",
        "tensorrt-fp16x4",
        "eager-fp16",
        "compile-fp16",
        "fused-fp16",
        "fused-fp8",
        "fused-fp8x4",
    } <= {*names}
    assert names == [entry.id for entry in configurations_for(("cuda:0", "cuda:1", "cuda:2", "cuda:3"))]
    assert len(names) == len({*names})
    assert not [name for name in names if "openvino" in name]


def test_a_change_below_a_measured_package_makes_it_measured_again():
    below = {
        name
        for package in compare._MEASURED
        if package != "ctflow"
        for _, name, is_package in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        if is_package
    }
    assert below <= {*compare._MEASURED}


@pytest.mark.parametrize(
    ("devices", "name", "reason"),
    [(("cpu",), "fused-fp16", "needs a GPU"), (("cuda:0",), "openvino-fp32", "needs --device cpu")],
)
def test_a_configuration_of_another_kind_of_device_is_refused_in_the_document(
    bundle, devices, name, reason, monkeypatch
):
    draw = case.phantom_from_seed
    monkeypatch.setattr(case, "phantom_from_seed", lambda seed, _, tumours: draw(seed, (16, 32, 32), tumours=tumours))
    monkeypatch.setattr(compare, "_machine", lambda _: {})
    document = compare_configurations(Comparison(bundle, devices, SHAPE, only=(name,)))
    assert (configuration(document, name)["status"], configuration(document, name)["reason"]) == ("refused", reason)


@pytest.mark.parametrize("options", [{"only": ("0z",)}, {"pythons": {"9": "/bin/true"}}])
def test_an_unknown_configuration_is_refused_before_any_work(bundle, options, monkeypatch):
    monkeypatch.setattr(case, "phantom_from_seed", lambda *_, **__: pytest.fail("drawn"))
    with raises_reason(SettingsInvalid, "invalid-value", names="0a, 0b"):
        compare_configurations(Comparison(bundle, ("cpu",), SHAPE, **options))


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "/nowhere/python does not start: No such file or directory"),
        ("/bin/false", "its process ended with 1: it said nothing"),
    ],
)
def test_an_interpreter_that_cannot_run_a_configuration_is_its_reason(bundle, python, reason, monkeypatch):
    draw = case.phantom_from_seed
    monkeypatch.setattr(case, "phantom_from_seed", lambda seed, _, tumours: draw(seed, (16, 32, 32), tumours=tumours))
    document = compare_configurations(Comparison(bundle, ("cpu",), SHAPE, only=("0a",), pythons={"0a": python}))
    assert configuration(document, "0a")["reason"] == reason
    assert configuration(document, "0a")["status"] == "crashed"


def test_a_configuration_that_hangs_is_ended(bundle, tmp_path, monkeypatch):
    draw = case.phantom_from_seed
    monkeypatch.setattr(case, "phantom_from_seed", lambda seed, _, tumours: draw(seed, (16, 32, 32), tumours=tumours))
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    comparison = Comparison(bundle, ("cpu",), SHAPE, only=("0a",), pythons={"0a": str(python)}, limit_s=1.0)
    assert configuration(compare_configurations(comparison), "0a")["reason"] == "took longer than 1 s"


def test_another_interpreter_gets_no_paths_of_this_one(bundle, tmp_path, monkeypatch):
    draw = case.phantom_from_seed
    monkeypatch.setattr(case, "phantom_from_seed", lambda seed, _, tumours: draw(seed, (16, 32, 32), tumours=tumours))
    monkeypatch.setenv("PYTHONPATH", "/wrong/version")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "path is <$PYTHONPATH>"; exit 3\n')
    python.chmod(0o755)
    document = compare_configurations(Comparison(bundle, ("cpu",), SHAPE, only=("0a",), pythons={"0a": str(python)}))
    assert configuration(document, "0a")["reason"] == "its process ended with 3: path is <>"


def test_a_comparison_that_was_ended_goes_on(one_configuration, monkeypatch):
    comparison, first = one_configuration
    monkeypatch.setattr(compare, "_crash_of_process", lambda *_: pytest.fail("measured again"))
    again = compare_configurations(comparison)
    assert again["configurations"][0]["results"] == first["configurations"][0]["results"]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        compare_configurations(replace(comparison, seed=7))  # another phantom


def test_configurations_of_other_code_are_measured_again(one_configuration, monkeypatch):
    comparison, _ = one_configuration
    monkeypatch.setattr(compare, "_crash_of_process", lambda *_: pytest.fail("measured again"))
    digest = compare.digest_of_package
    for changed in ("ctflow.bench", "ctflow.window"):
        monkeypatch.setattr(
            compare, "digest_of_package", lambda name, at=changed: digest(name)[:: -1 if name == at else 1]
        )
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            compare_configurations(comparison)


def test_what_was_kept_is_shown_without_measuring(one_configuration, monkeypatch):
    comparison, first = one_configuration
    monkeypatch.setattr(compare, "_crash_of_process", lambda *_: pytest.fail("measured"))
    shown = compare_configurations(replace(comparison, only=("0a", "1", "4"), measure=False))
    assert configuration(shown, "1")["results"] == first["configurations"][0]["results"]
    assert configuration(shown, "0a")["status"] == "refused"
    assert configuration(shown, "0a")["reason"] == "it is not stored in this folder"
    with raises_reason(SettingsInvalid, "nothing-kept"):
        compare_configurations(replace(comparison, seed=7, measure=False))


def test_a_crash_is_kept_and_tried_again(bundle, tmp_path):
    comparison = Comparison(bundle, ("cpu",), SHAPE, only=("0a",), pythons={"0a": "/bin/false"}, kept=tmp_path / "kept")
    assert configuration(compare_configurations(comparison), "0a")["status"] == "crashed"
    shown = configuration(compare_configurations(replace(comparison, measure=False)), "0a")
    assert shown["status"] == "crashed"
    assert shown["reason"] == "its process ended with 1: it said nothing"
    (tmp_path / "kept" / "0a" / "log.txt").unlink()
    compare_configurations(comparison)
    assert (tmp_path / "kept" / "0a" / "log.txt").exists()


def test_a_document_has_the_date_of_its_rows(one_configuration, monkeypatch):
    comparison, measured = one_configuration
    assert measured["date"] == configuration(measured, "1")["date"] != "2999-01-01"
    monkeypatch.setattr(compare.time, "strftime", lambda _: "2999-01-01")
    assert compare_configurations(replace(comparison, measure=False))["date"] == measured["date"]


def test_a_phantom_is_drawn_once(bundle, tmp_path, monkeypatch):
    comparison = Comparison(bundle, ("cpu",), SHAPE, only=("5x2",), kept=tmp_path)
    first = compare_configurations(comparison)
    with monkeypatch.context() as patched:
        patched.setattr(case, "phantom_from_seed", None)
        assert compare_configurations(comparison)["case"] == first["case"]
        for other in (replace(comparison, seed=1001), replace(comparison, shape=(130, 64, 64))):
            with pytest.raises(TypeError):
                compare_configurations(other)
    monkeypatch.setattr(compare, "digest_of_package", lambda name: "of other code")
    assert compare_configurations(comparison)["case"] == first["case"]  # drawn anew


def test_a_truth_that_is_not_this_phantoms_is_not_believed(bundle, tmp_path):
    comparison = Comparison(bundle, ("cpu",), SHAPE, only=("5x2",), kept=tmp_path)
    compare_configurations(comparison)
    truth = np.load(tmp_path / "truth.npy")
    np.save(tmp_path / "truth.npy", np.zeros_like(truth))
    compare_configurations(comparison)
    assert truth.any()
    np.testing.assert_array_equal(np.load(tmp_path / "truth.npy"), truth)


@pytest.mark.parametrize("file", ["case.json", "case.npz", "truth.npy"])
def test_a_phantom_that_is_damaged_is_drawn_again(bundle, tmp_path, file):
    comparison = Comparison(bundle, ("cpu",), SHAPE, only=("5x2",), kept=tmp_path)
    first = compare_configurations(comparison)
    whole = (tmp_path / file).read_bytes()
    for damage in (b"", b"{}", whole[: len(whole) // 2]):
        (tmp_path / file).write_bytes(damage)
        assert compare_configurations(comparison)["case"] == first["case"]
        assert (tmp_path / file).read_bytes()[:4] == whole[:4]
        assert (tmp_path / file).stat().st_size == len(whole)


def test_a_configuration_that_was_refused_is_tried_again(bundle, tmp_path):
    comparison = Comparison(
        bundle, ("cpu",), SHAPE, repeats=1, only=("openvino-fp32",), overlaps=(0.0,), kept=tmp_path / "kept"
    )
    cached = replace(comparison, cache=tmp_path / "cache")
    assert "ctflow export" in configuration(compare_configurations(cached), "openvino-fp32")["reason"]
    model = read_bundle(bundle)
    batches = (1, model.spec.batch_size)
    prepare_engine(EngineRequest("openvino", "cpu", "fp32", model.spec.roi, batches, tmp_path / "cache"), model)
    assert configuration(compare_configurations(cached), "openvino-fp32")["status"] == "measured"


def test_a_shape_that_no_phantom_has_is_refused(bundle):
    with raises_reason(SettingsInvalid, "invalid-value", names="--shape"):
        compare_configurations(Comparison(bundle, ("cpu",), (1, 2, 3)))


def test_a_mask_comes_back_to_the_grid_of_the_ct(bundle):
    """The truth, brought to the network's grid by the bundle's own steps, and back."""
    phantom = phantom_from_seed(3, (90, 70, 50), tumours=5)
    steps = read_bundle(bundle).spec.preprocessing
    truth = (phantom.volume.array > 0).astype(np.uint8)  # soft tissue and bone: large and different along every axis
    volume = Volume(truth.astype(np.int16) * 1400 - 1000, phantom.volume.geometry)
    prepared = prepare_volume(volume, steps, "cpu")
    labels = (prepared.tensor[0, 0] > 0.5).numpy().astype(np.uint8)
    assert len(set(labels.shape)) == 3
    found = on_source(labels, prepared, volume)
    assert found.shape == truth.shape
    assert dice_of(found, truth) > 0.93
    assert dice_of(found[::-1], truth) < 0.9


def request_of(bundle: Path, folder: Path, **changes) -> MeasurementRequest:
    given = {"method": "ctflow", "engine": "eager", "precision": "fp32", "stitch": "device", "devices": ["cpu"]}
    given |= {
        "basis": [],
        "model": str(bundle),
        "case": str(folder / "case.npz"),
        "overlaps": [0.0],
        "batch_size": 4,
        "repeats": 1,
    }
    return request_from_document({**given, "cache": None, "result": str(folder), **changes})


def test_a_volume_below_the_window_is_refused(bundle, tmp_path):
    affine = np.diag([6.0, 6.0, 6.0, 1.0])[[2, 1, 0, 3]]
    np.savez(tmp_path / "case.npz", hu=np.zeros((20, 40, 40), np.int16), affine_mm=affine)
    with raises_reason(BundleInvalid, "window-size", names="40 x 40 x 20"):
        measure_configuration(request_of(bundle, tmp_path))


def test_what_a_configuration_cannot_do_has_a_reason(bundle, tmp_path):
    with raises_reason(BackendUnavailable, "wrong-precision"):
        measure_configuration(request_of(bundle, tmp_path, engine="torch", precision="fp16", method="stock"))
    with raises_reason(BackendUnavailable, "wrong-precision"):
        measure_configuration(request_of(bundle, tmp_path, precision="fp16"))
