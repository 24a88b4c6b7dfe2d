"""A run's Prometheus metrics: scraped from a port, or read from a file."""

from __future__ import annotations

import socket
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cohort_rows import DONE, FAILED, REJECTED
from ctflow.cohort.report.metrics import CohortMetrics, metrics_at
from ctflow.cohort.watch import NodeState
from ctflow.core.errors import NotWritten, SettingsInvalid
from reasons import raises_reason


def tell(metrics: CohortMetrics) -> None:
    metrics.began(9, {"done": 4, "rejected": 1})
    for outcome in (DONE, REJECTED, FAILED, FAILED):
        metrics.committed(outcome)
    metrics.retried("row-3", "worker-ended", 1)
    metrics.node(NodeState("gpu-01", 3, 2, 0.75))
    metrics.node(NodeState("gpu-02", 1, 2))
    metrics.node(NodeState("gpu-03", 1, 2, 0.5))
    metrics.node(NodeState("gpu-03", 0, 2, 0.5, is_gone=True))


def parsed(text: str) -> dict[tuple, float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def assert_told(text: str) -> None:
    found = parsed(text)
    assert found["ctflow_rows",] == 9
    assert found["ctflow_rows_before", ("status", "rejected")] == 1
    assert found["ctflow_rows_committed_total", ("reason", "worker-ended"), ("status", "failed")] == 2
    assert found["ctflow_rows_committed_total", ("reason", "done"), ("status", "done")] == 1
    assert found["ctflow_row_attempts_repeated_total", ("reason", "worker-ended")] == 1
    assert found["ctflow_row_seconds_count",] == 4
    assert found["ctflow_row_seconds_bucket", ("le", "2.5")] == 4
    assert found["ctflow_stage_seconds_sum", ("stage", "segment")] == 1.5
    assert found["ctflow_rows_under_way", ("node", "gpu-01")] == 3
    assert found["ctflow_gpu_busy_ratio", ("node", "gpu-01")] == 0.75
    assert ("ctflow_gpu_busy_ratio", ("node", "gpu-02")) not in found
    assert "gpu-03" not in text
    assert "row-" not in text


def test_metrics_are_scraped_from_a_port_until_the_run_ends():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with metrics_at(f"127.0.0.1:{port}") as metrics:
        tell(metrics)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:  # our own
            assert_told(answer.read().decode())
    with pytest.raises(OSError, match="refused"):
        urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)


def test_metrics_are_in_a_file_after_the_run(tmp_path):
    path = tmp_path / "ctflow.prom"
    with metrics_at(str(path)) as metrics:
        assert parsed(path.read_text())["ctflow_rows",] == 0
        tell(metrics)
    assert_told(path.read_text())
    assert [each.name for each in tmp_path.iterdir()] == ["ctflow.prom"]


@pytest.mark.parametrize(
    "place", ["", "9400", ":9400", "127.0.0.1:0", "127.0.0.1:70000", "127.0.0.1:x", "m.txt", "a b:1"]
)
def test_a_place_that_is_neither_is_named(place):
    with raises_reason(SettingsInvalid, "invalid-value", names="--metrics"), metrics_at(place):
        pass


def test_a_port_in_use_and_a_folder_that_is_not_there_are_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as used:
        place = f"127.0.0.1:{used.getsockname()[1]}"
        with raises_reason(SettingsInvalid, "cannot-listen", names=place), metrics_at(place):
            pass
    with (
        raises_reason(NotWritten, "unwritable", names="ctflow.prom"),
        metrics_at(str(tmp_path / "none" / "ctflow.prom")),
    ):
        pass
