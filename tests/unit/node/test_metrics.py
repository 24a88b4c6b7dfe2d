from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from node_support import Ward, fill_busy


@pytest.fixture
def ward(tmp_path):
    ward = Ward(tmp_path / "node")
    yield ward
    ward.close()


def samples(ward) -> dict[tuple, float]:
    body, media_type = ward.metrics.exposition()
    assert media_type.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    return {
        (each.name, *sorted(filter(None, each.labels.values()))): each.value
        for family in families
        for each in family.samples
    }


def test_every_state_has_a_number_before_anything_came(ward):
    found = samples(ward)
    assert [found["ctflow_series", state] for state in ("received", "running", "dead", "delivered")] == [0, 0, 0, 0]
    assert found["ctflow_instances_received_total",] == 0
    assert found["ctflow_disk_free_bytes",] > 0


def test_the_queue_is_that_of_the_journal(ward):
    fill_busy(ward)
    found = samples(ward)
    counts = ward.journal.counts()
    assert counts["delivered"] == 6
    assert {state: found["ctflow_series", state] for state in counts} == counts
    assert found["ctflow_deliveries", "pacs", "sent"] == 13
    assert found["ctflow_deliveries", "dead", "pacs"] == 2
    assert found["ctflow_deliveries", "pacs", "waiting"] == 1


def test_what_happens_is_counted(ward):
    metrics = ward.metrics
    metrics.received(500)
    metrics.received(700)
    metrics.duplicate()
    metrics.refused("free-disk")
    metrics.associations(1)
    metrics.associations(1)
    metrics.associations(-1)
    metrics.sent("pacs", "down")
    metrics.stage("segment", 3.0)
    found = samples(ward)
    assert found["ctflow_instances_received_total",] == 2
    assert found["ctflow_received_bytes_total",] == 1200
    assert found["ctflow_instances_duplicate_total",] == 1
    assert found["ctflow_refused_total", "free-disk"] == 1
    assert found["ctflow_associations",] == 1
    assert found["ctflow_sends_total", "down", "pacs"] == 1
    assert found["ctflow_stage_seconds_sum", "segment"] == 3.0
    assert found["ctflow_stage_seconds_bucket", "5.0", "segment"] == 1
    assert found["ctflow_stage_seconds_bucket", "2.5", "segment"] == 0


@pytest.mark.parametrize("word", ["Doe^Jane", "", "1.2.3", "x" * 41, "a b"])
def test_what_a_sender_could_choose_is_no_label(ward, word):
    with pytest.raises(ValueError, match="no word for a label"):
        ward.metrics.refused(word)


def test_two_nodes_in_a_process_do_not_share_their_numbers(ward, tmp_path):
    other = Ward(tmp_path / "other")
    other.metrics.received(1)
    assert samples(ward)["ctflow_instances_received_total",] == 0
    other.close()
