"""The demonstration bundle's two documents and a small bundle to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ctflow.bundle import demonstration_bundle

SMALL_NETWORK = {"_target_": "BasicUNet", "out_channels": 2, "features": [2, 2, 2, 2, 2, 2]}


@pytest.fixture
def inference() -> dict[str, Any]:
    return json.loads((demonstration_bundle() / "configs" / "inference.json").read_text())


@pytest.fixture
def metadata() -> dict[str, Any]:
    return json.loads((demonstration_bundle() / "configs" / "metadata.json").read_text())


@pytest.fixture
def bundle(tmp_path, inference, metadata) -> Path:
    """A bundle of a tiny network, whole and valid."""
    inference["network_def"] = SMALL_NETWORK
    folder = tmp_path / "small"
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    from ctflow.core.model import NetworkSpec  # noqa: PLC0415
    from ctflow.networks.build import network_from_spec  # noqa: PLC0415

    arguments = {key: value for key, value in SMALL_NETWORK.items() if key != "_target_"}
    torch.save(network_from_spec(NetworkSpec("BasicUNet", arguments)).state_dict(), folder / "models" / "model.pt")
    return folder
