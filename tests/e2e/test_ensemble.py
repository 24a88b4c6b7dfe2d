"""Bundles of several networks: equal to what MONAI's own EnsembleEvaluator makes of the same bundle."""

from __future__ import annotations

import warnings
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
