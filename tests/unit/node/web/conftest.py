from __future__ import annotations

from pathlib import Path

import pytest

from ctflow.bundle import read_bundle
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from node_support import BACKUP, PACS, Ward


@pytest.fixture
def ward(tmp_path):
    """A node of which only the journal and the page are there."""
    ward = Ward(tmp_path / "node", destinations=(PACS, BACKUP))
    yield ward
    ward.close()


@pytest.fixture(scope="session")
def result_folder(series, coarse_bundle, tmp_path_factory) -> Path:
    """The result folder of a small phantom."""
    out = tmp_path_factory.mktemp("results")
    report = run_folder(series, out, read_bundle(coarse_bundle), Settings(engine="eager", cache=None, device="cpu"))
    assert report.exit_code == 0
    return report.cases[0].folder
