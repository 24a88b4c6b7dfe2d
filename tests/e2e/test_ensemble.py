"""Bundles of several networks: equal to what MONAI's own EnsembleEvaluator makes of the same bundle."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ignite; MONAI remembers if its import failed
    import ignite.engine  # noqa: F401
from monai.bundle import ConfigParser

from agreement_record import record
from ctflow.bundle import read_bundle
from ctflow.core.volume import Volume
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from ensemble_bundles import ENSEMBLES, EnsembleBundle, written_ensemble
from monai_support import scan_for, written_nifti
from zoo_bundles import ZOO

pytestmark = pytest.mark.e2e
LEAST_EQUAL = 0.999
SETTINGS = Settings(engine="eager", precision="fp32", device="cpu", cache=None, constant_windows="compute")


def labels_by_monai(folder: Path, volume: Volume) -> np.ndarray:
    """What the bundle's evaluator stores of a dataset of one file, its checkpoints loaded by its own handlers."""
    path = written_nifti(folder, volume)
    parser = ConfigParser()
    (configuration,) = (folder / "configs").glob("inference.*")
    parser.read_config(configuration)
    parser["bundle_root"] = str(folder)
    parser["device"] = "$torch.device('cpu')"
    parser["dataset"]["data"] = [{"image": str(path)}]
    with torch.inference_mode():
        evaluator = parser.get_parsed_content("evaluator")
        evaluator.run()
    return np.asarray(evaluator.state.output[0]["pred"][0]).astype(np.uint8).transpose(2, 1, 0)


@pytest.mark.parametrize("bundle", ENSEMBLES, ids=lambda bundle: bundle.name)
def test_an_ensemble_gives_what_monai_gives(tmp_path, bundle: EnsembleBundle):
    volume, folder = scan_for(ZOO[0]), written_ensemble(tmp_path / bundle.name, bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = labels_by_monai(folder, volume)
    model = read_bundle(folder)
    with Segmenter(model, SETTINGS) as segmenter:
        found, _ = segmenter.segment(volume)
    counts = np.bincount(expected.ravel(), minlength=max(bundle.channels, 2))
    assert (counts > 0.01 * expected.size).sum() >= 2, counts
    equal = float((found.labels == expected).mean())
    record("ensembles", bundle.name, equal)
    assert equal >= LEAST_EQUAL, equal


@pytest.mark.parametrize("name", ["mean_of_probabilities", "vote_of_restored", "vote_of_labels"])
def test_blocks_and_fractions_give_the_same_labels(tmp_path, monkeypatch, name):
    (bundle,) = (each for each in ENSEMBLES if each.name == name)
    volume, model = scan_for(ZOO[0]), read_bundle(written_ensemble(tmp_path / name, bundle))
    with Segmenter(model, SETTINGS) as segmenter:
        whole, _ = segmenter.segment(volume)
    monkeypatch.setattr("ctflow.pipeline.prediction.WHOLE_BYTES", 0)
    with Segmenter(model, replace(SETTINGS, seg="fractional")) as segmenter:
        found, _ = segmenter.segment(volume)
    assert np.array_equal(found.labels, whole.labels)
    assert found.fractions.shape == (3, *volume.array.shape)
    assert set(np.unique(found.fractions)) == {0, 255} or name == "mean_of_probabilities"
    marked = found.labels > 0
    own = np.take_along_axis(found.fractions, np.maximum(found.labels, 1)[None].astype(int) - 1, 0)[0]
    assert marked.sum() > 100
    assert np.array_equal(own[marked], found.fractions.max(0)[marked])


def test_another_engine_is_compared_with_what_all_networks_mark(tmp_path):
    pytest.importorskip("openvino")
    (bundle,) = (each for each in ENSEMBLES if each.name == "vote_of_labels")
    volume, model = scan_for(ZOO[0]), read_bundle(written_ensemble(tmp_path / "b", bundle))
    with Segmenter(model, SETTINGS) as segmenter:
        expected, _ = segmenter.segment(volume)
    settings = replace(SETTINGS, engine="openvino", cache=tmp_path / "cache")
    with Segmenter(model, settings) as segmenter:
        found, _ = segmenter.segment(volume)
    assert found.agreement is not None
    assert float((found.labels == expected.labels).mean()) >= LEAST_EQUAL
