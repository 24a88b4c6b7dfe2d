from __future__ import annotations

from pathlib import Path

import pytest

from ctflow.bundle import read_bundle
from ctflow.config import Settings
from ctflow.pipeline import run_folder
from service_support import Ear


@pytest.fixture
def ear(tmp_path):
    """Makes receivers, and closes them."""
    made = []

    def make(**changes) -> Ear:
        made.append(Ear(tmp_path / f"data{len(made)}", **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def result_folder(series, coarse_bundle, tmp_path_factory) -> Path:
    """The result folder of a small phantom."""
    out = tmp_path_factory.mktemp("results")
    report = run_folder(series, out, read_bundle(coarse_bundle), Settings(engine="eager", device="cpu"))
    assert report.exit_code == 0
    return report.cases[0].folder
