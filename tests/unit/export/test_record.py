from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines.contract import EngineInfo
from ctflow.export import record
from ctflow.export.figures import ParityResult
from ctflow.export.record import EARLIER, THIS, Agreements

INFO = EngineInfo("openvino", "fp32", "cpu", (32, 32, 32), (1, 2), "d" * 64, 1, {"openvino": "1"})
WHAT = (INFO.backend, INFO.precision, INFO.device, INFO.roi)
FOUND = ParityResult(1e-3, 0.9998, 4, "labels")


def model_of(digest: str = "d" * 64) -> Model:
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", {}), 1, 2, (), (32, 32, 32), 0.25, "gaussian", 4, "softmax", None, (), "", False
    )
    return Model(spec, {}, digest)


@pytest.fixture
def agreements(tmp_path):
    return Agreements(model_of(), tmp_path / "cache")


def again(tmp_path) -> Agreements:
    """As another process would find it."""
    return Agreements(model_of(), tmp_path / "cache")


def test_what_was_compared_is_kept_with_its_date(agreements, tmp_path, monkeypatch):
    assert agreements.find([INFO]) is None
    monkeypatch.setattr(record, "today", lambda: "2026-11-29")
    kept = agreements.keep([INFO], FOUND, 48)
    assert (kept.windows, kept.of, kept.dice, kept.relative_error) == (4, 48, 0.9998, 1e-3)
    assert (kept.series, kept.date, kept.kept) == (THIS, "2026-11-29", True)
    assert (kept.engine, kept.reference) == ("openvino fp32", "eager fp32")
    monkeypatch.setattr(record, "today", lambda: "2027-01-01")
    for known in (agreements, again(tmp_path)):
        assert known.find([INFO]) == replace(kept, series=EARLIER)
        assert known.failed_on(*WHAT) is None


@pytest.mark.parametrize(
    "other",
    [
        {"versions": {"openvino": "2"}},
        {"precision": "bf16"},
        {"batch_range": (1, 4)},
        {"backend": "onnxruntime"},
        {"roi": (64, 64, 64)},
    ],
)
def test_another_engine_is_another_record(agreements, tmp_path, other):
    agreements.keep([INFO], FOUND, 48)
    assert again(tmp_path).find([replace(INFO, **other)]) is None


def test_another_model_or_machine_is_another_record(agreements, tmp_path, monkeypatch):
    agreements.keep([INFO], FOUND, 48)
    assert Agreements(model_of("e" * 64), tmp_path / "cache").find([INFO]) is None
    monkeypatch.setattr(record, "_processor", lambda: "another")
    assert again(tmp_path).find([INFO]) is None


def test_every_kind_of_device_has_its_own_and_the_worst_is_told(agreements, monkeypatch):
    monkeypatch.setattr(record, "gpu_identity", lambda device: f"GPU {device}")
    first, second = (replace(INFO, device=device) for device in ("cuda:0", "cuda:1"))
    agreements.keep([first], FOUND, 48)
    assert agreements.find([first, second]) is None
    agreements.keep([second], replace(FOUND, relative_error=5e-3), 30)
    assert agreements.find([first, second]).relative_error == 5e-3
    monkeypatch.setattr(record, "gpu_identity", lambda device: "the same GPU")
    alike = Agreements(model_of(), agreements._cache_dir)
    alike.keep([first], FOUND, 48)
    assert alike.find([second]).relative_error == 1e-3


def test_who_has_failed_is_not_trusted_whatever_agrees_later(agreements, tmp_path):
    agreements.keep([INFO], FOUND, 48)
    agreements.refuse([INFO])
    for known in (agreements, again(tmp_path)):
        assert known.find([INFO]) is None
        assert known.failed_on(*WHAT) == record.today()
        assert known.keep([INFO], FOUND, 48).kept is False
        assert known.find([INFO]) is None


def test_who_has_failed_is_given_up_in_every_batch_and_on_every_device_like_that_one(agreements, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "gpu_identity", lambda device: "another" if device == "cuda:2" else "H200")
    first = replace(INFO, device="cuda:0")
    second = replace(first, device="cuda:1", batch_range=(1, 16), fewest_computed=16)
    agreements.keep([second], FOUND, 48)
    agreements.refuse([first])
    for known in (agreements, again(tmp_path)):
        assert known.failed_on("openvino", "fp32", "cuda:1", INFO.roi) == record.today()
        assert known.find([second]) is None
        others = [("onnxruntime", "fp32", "cuda:1"), ("openvino", "fp16", "cuda:1"), ("openvino", "fp32", "cuda:2")]
        assert [known.failed_on(*other, INFO.roi) for other in others] == [None] * 3
        assert known.failed_on("openvino", "fp32", "cuda:1", (64, 64, 64)) is None
    monkeypatch.setattr(record, "backend_version", lambda name: f"{name} of tomorrow")
    assert again(tmp_path).failed_on("openvino", "fp32", "cuda:1", INFO.roi) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1, "failed": 5, "agreement": null}', '{"format": 0}'])
def test_a_damaged_record_of_a_failure_says_nothing(agreements, tmp_path, text):
    agreements.refuse([INFO])
    (path,) = (tmp_path / "cache").glob("agreement-*.json")
    path.write_text(text)
    assert agreements.failed_on(*WHAT) == record.today()
    assert again(tmp_path).failed_on(*WHAT) is None


def test_another_process_that_trusted_it_hears_of_a_failure(agreements, tmp_path):
    agreements.keep([INFO], FOUND, 48)
    other = again(tmp_path)
    assert other.find([INFO]) is not None
    agreements.refuse([INFO])
    assert other.find([INFO]) is None


@pytest.mark.parametrize("cache", ["file/cache", None])
def test_where_nothing_can_be_kept_this_process_remembers(tmp_path, cache, caplog):
    (tmp_path / "file").touch()
    known = Agreements(model_of(), cache and tmp_path / cache)
    kept = known.keep([INFO], FOUND, 48)
    assert kept.kept is False
    assert known.find([INFO]) == replace(kept, series=EARLIER)
    assert ("cannot store" in caplog.text) == (cache is not None)
    known.refuse([INFO])
    assert known.find([INFO]) is None


def changes() -> list:
    good = {"windows": 0}, {"of": "48"}, {"dice": 2}, {"relative_error": None}, {"date": 5}, {"kept": False}
    return [*good, {"more": 1}]


@pytest.mark.parametrize("change", changes(), ids=str)
def test_a_damaged_record_says_nothing(agreements, tmp_path, change):
    agreements.keep([INFO], FOUND, 48)
    (path,) = (tmp_path / "cache").glob("agreement-*.json")
    document = json.loads(path.read_text())
    document["agreement"] |= change
    for text in (json.dumps(document), "{", "[]", json.dumps({**document, "format": 0})):
        path.write_text(text)
        assert again(tmp_path).find([INFO]) is None
        assert again(tmp_path).failed_on(*WHAT) is None


def test_nothing_segmented_is_kept_as_such(agreements, tmp_path):
    agreements.keep([INFO], replace(FOUND, dice=None, judged="logits"), 48)
    assert again(tmp_path).find([INFO]).dice is None
