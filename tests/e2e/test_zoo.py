"""The CT bundles of MONAI's model zoo (minimal equivalents): loaded as they are, and equal to MONAI's own workflow."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of ignite; MONAI remembers if its import failed
    import ignite.engine  # noqa: F401
from monai.bundle import ConfigParser
from monai.transforms import reset_ops_id

from agreement_record import record
from ctflow.bundle import read_bundle
from ctflow.core.volume import Volume
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings
from monai_support import scan_for, written_nifti
from zoo_bundles import OWN_CODE, ZOO, ZooBundle, random_weights, written_bundle

pytestmark = pytest.mark.e2e
LEAST_EQUAL = 0.999


def labels_by_monai(folder: Path, bundle: ZooBundle, volume: Volume) -> np.ndarray:
    """What MONAI's own parser, transforms, inferer and post-processing give, step by step as its evaluator does."""
    path = written_nifti(folder, volume)
    parser = ConfigParser()
    parser.read_config(folder / "configs" / bundle.file)
    parser["bundle_root"] = str(folder)
    if isinstance(parser["network_def"], dict):
        parser["network_def"].pop("img_size", None)  # which this MONAI has removed
    for item in parser["postprocessing"]["transforms"]:
        item["_disabled_"] = item["_target_"] == "SaveImaged"
    network = parser.get_parsed_content("network")
    weights = random_weights(network)
    torch.save(
        {"model": {f"module.{key}": value for key, value in weights.items()}}, folder / "models" / bundle.weights
    )
    network.load_state_dict(weights)
    network.eval()
    if parser["evaluator"]["_target_"] == "scripts.evaluator.Louder":
        return _by_evaluator(parser, path, weights)
    with torch.inference_mode():
        data: dict[str, Any] = parser.get_parsed_content("preprocessing")({"image": str(path)})
        assert min(data["image"].shape[1:]) > bundle.roi, data["image"].shape
        data["image"] = reset_ops_id(data["image"])  # as evaluators do
        prompts = _prompts(bundle)
        data["pred"] = parser.get_parsed_content("inferer")(data["image"][None], network, **prompts)[0]
        data["label_prompt"] = prompts.get("class_vector")  # as the evaluator of vista3d hands it on
        data = parser.get_parsed_content("postprocessing")(data)
    return np.asarray(data["pred"][0]).astype(np.uint8).transpose(2, 1, 0)


def _by_evaluator(parser: ConfigParser, path: Path, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """What the bundle's own evaluator stores of a dataset of one file."""
    parser["dataset"]["data"] = [{"image": str(path)}]
    parser["dataloader"]["num_workers"] = 0
    parser["evaluator"]["val_handlers"] = []
    parser.get_parsed_content("network").load_state_dict(weights)
    evaluator = parser.get_parsed_content("evaluator")
    evaluator.run()
    return np.asarray(evaluator.state.output[0]["pred"][0]).astype(np.uint8).transpose(2, 1, 0)


def _prompts(bundle: ZooBundle) -> dict[str, Any]:
    """What the evaluator of vista3d gives its inferer where a user sets no points."""
    if not bundle.classes:
        return {}
    return {"class_vector": torch.tensor(bundle.classes)[:, None], "point_coords": None, "point_labels": None}


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The bundle's own code, as for `python -m monai.bundle run` in its folder."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "scripts"]:
            del sys.modules[name]


@pytest.mark.parametrize("bundle", [*ZOO, *OWN_CODE], ids=lambda bundle: f"{bundle.folder}-{bundle.file}")
def test_a_bundle_of_the_zoo_gives_what_monai_gives(tmp_path, bundle):
    volume, folder = scan_for(bundle), written_bundle(tmp_path / bundle.folder, bundle)
    with warnings.catch_warnings(), _importable(folder):
        warnings.simplefilter("ignore")
        expected = labels_by_monai(folder, bundle, volume)
    model = read_bundle(folder, bundle.file, allow_code=bundle.scripts is not None and not bundle.classes)
    settings = Settings(engine="eager", precision="fp32", device="cpu", cache=None, constant_windows="compute")
    with Segmenter(model, settings) as segmenter:
        found, _ = segmenter.segment(volume)
    assert len(np.unique(expected)) >= min(3, bundle.channels), "the weights mark one class everywhere"
    equal = float((found.labels == expected).mean())
    record("zoo", f"{bundle.folder} {bundle.file}", equal)
    assert equal >= LEAST_EQUAL, equal
