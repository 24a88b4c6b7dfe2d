"""Orthanc sends a series when it is stable, ctflow answers, Orthanc shows the SEG and the SR.

Orthanc binds all addresses, so all of it runs in a network namespace that has a loopback and nothing else.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from orthanc_support import PYTHON, ran_alone

pytestmark = pytest.mark.e2e
PROGRAM = Path(__file__).with_name("orthanc_delivery.py")


@pytest.fixture(scope="module")
def delivered(tmp_path_factory, series):
    """Kind -> one delivery of it (see `orthanc_delivery.py`), and what Orthanc had at its end."""

    @cache
    def run(kind: str) -> dict:
        plugins = (PYTHON,) if kind == "secured" else ()
        return ran_alone(PROGRAM, tmp_path_factory.mktemp("orthanc"), series, kind, plugins=plugins)

    return run


@pytest.fixture(params=["plain", "secured"])
def delivery(request, delivered) -> dict:
    return delivered(request.param)


@pytest.fixture
def secured(delivered) -> dict:
    """With TLS and storage commitment."""
    return delivered("secured")


def test_orthanc_shows_every_kind_of_result_beside_the_series(delivery):
    assert delivery["modalities"] == ["CT", "DOC", "OT", "RTSTRUCT", "SEG", "SR"]
    assert delivery["studies"] == 1
    assert delivery["pdf"] == "%PDF-", "Orthanc itself takes it out of the object"


def test_the_segmentation_refers_to_the_series_that_orthanc_has(delivery):
    assert delivery["referenced_series"] == delivery["source_series"]
    assert set(delivery["referenced_instances"]) <= set(delivery["source_instances"])


def test_the_series_is_delivered_once_and_what_orthanc_has_is_what_the_node_wrote(delivery):
    assert delivery["states"] == ["delivered"]
    assert sorted(delivery["objects_in_orthanc"]) == sorted(delivery["objects_in_journal"])


def test_orthanc_need_not_wait_longer_than_quiet_period_inference_and_two_seconds(delivery):
    """Told and not asserted to the second: a busy machine is no broken promise (benchmarks/prove_node.py measures)."""
    assert delivery["beyond_quiet_and_inference_s"] < 60


def test_with_tls_a_series_goes_through_and_orthanc_commits_to_every_result(secured):
    assert secured["states"] == ["delivered"]
    assert sorted(secured["objects_in_orthanc"]) == sorted(secured["objects_in_journal"])
    assert set(secured["deliveries"]) == {"sent"}
    assert {"stored", "sent", "delivered"} <= set(secured["events"])
    assert "tls-rejected" not in secured["events"]


def test_with_tls_ctflow_commits_to_what_orthanc_sent_and_to_nothing_else(secured):
    assert secured["commitment"] == "Failure"
    assert secured["committed"] == secured["images"]
    assert secured["failed"] == [["1.2.3", 0x0112]]
    assert "commitment-reported" in secured["events"]
