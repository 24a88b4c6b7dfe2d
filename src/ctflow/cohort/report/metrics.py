"""Prometheus metrics of a run, named as the node's are: on a port, or in a file for node_exporter."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ctflow import __version__
from ctflow.cohort.outcome import RowOutcome, RowStatus
from ctflow.cohort.watch import NodeState
from ctflow.core.atomic import output_error_from_oserror
from ctflow.core.errors import OutputError, SettingsInvalid
from ctflow.core.requirements import check_requirements
from ctflow.settings.schema import shown

# From a second on a GPU to ten minutes on two cores; stages take less.
_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FILE_S = 15.0  # between two versions of the file: node_exporter is scraped as often
log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]+):(?P<port>[0-9]{1,5})")


class CohortMetrics:
    """A run's numbers, as a `ctflow.cohort.watch.CohortWatcher`.

    Labels are ctflow's own words and names of machines: no row, no path, and no patient data.
    """

    def __init__(self) -> None:
        # Late: of the extra `cohort`.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: PLC0415

        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        seconds: dict[str, Any] = {"buckets": _BUCKETS_S, **made}
        self._rows = Gauge("ctflow_rows", "Rows of the share.", **made)
        self._before = Gauge("ctflow_rows_before", "Rows committed before the run.", ["status"], **made)
        self._committed = Counter("ctflow_rows_committed", "Rows committed by the run.", ["status", "reason"], **made)
        self._repeated = Counter("ctflow_row_attempts_repeated", "Attempts that were repeated.", ["reason"], **made)
        self._seconds = Histogram("ctflow_row_seconds", "Seconds of a row, from its attempt to its result.", **seconds)
        self._stages = Histogram("ctflow_stage_seconds", "Seconds of each stage of a series.", ["stage"], **seconds)
        self._under_way = Gauge("ctflow_rows_under_way", "Rows that a machine has.", ["node"], **made)
        self._done = Gauge("ctflow_node_rows", "Rows that a machine committed.", ["node"], **made)
        self._busy = Gauge("ctflow_gpu_busy_ratio", "Share of ten seconds in which GPUs computed.", ["node"], **made)
        build = Gauge("ctflow_build_info", "Version of ctflow.", ["version"], **made)
        build.labels(__version__).set(1)

    def began(self, rows: int, before: Mapping[RowStatus, int]) -> None:
        """As `CohortWatcher.began`."""
        self._rows.set(rows)
        for status, count in before.items():
            self._before.labels(status).set(count)

    def committed(self, outcome: RowOutcome) -> None:
        """As `CohortWatcher.committed`."""
        self._committed.labels(outcome.status, outcome.reason).inc()
        self._seconds.observe(outcome.seconds)
        for stage, elapsed_s in outcome.stage_seconds.items():
            self._stages.labels(stage).observe(elapsed_s)

    def retried(self, row_id: str, reason: str, attempt: int) -> None:
        """As `CohortWatcher.retried`."""
        self._repeated.labels(reason).inc()

    def node(self, state: NodeState) -> None:
        """As `CohortWatcher.node`."""
        if state.is_gone:
            for gauge in (self._under_way, self._done, self._busy):
                with suppress(KeyError):  # of a machine without a GPU
                    gauge.remove(state.name)
            return
        self._under_way.labels(state.name).set(state.under_way)
        self._done.labels(state.name).set(state.done)
        if state.gpu_busy is not None:
            self._busy.labels(state.name).set(state.gpu_busy)


@contextmanager
def metrics_at(place: str) -> Iterator[CohortMetrics]:
    """Metrics that can be scraped, or read from a file.

    Args:
        place: "HOST:PORT", or a file whose name ends in .prom; its folder exists.

    Yields:
        A watcher of the run.

    Raises:
        RequirementUnmet: prometheus-client is not installed.
        SettingsInvalid: Neither, or the port is in use.
        OutputError: The file cannot be written.
    """
    address = _ADDRESS.fullmatch(place)
    if not place.endswith(".prom") and (address is None or not 0 < int(address["port"]) < 65536):
        raise SettingsInvalid(
            f"--metrics: must be HOST:PORT, such as 127.0.0.1:9400, or a file that ends in .prom, not {shown(place)}",
            reason="invalid-value",
        )
    check_requirements("cohort")
    metrics = CohortMetrics()
    if address is None or place.endswith(".prom"):
        with _in_file(metrics, Path(place)):
            yield metrics
    else:
        with _served(metrics, address["host"].strip("[]"), int(address["port"])):
            yield metrics


@contextmanager
def _served(metrics: CohortMetrics, host: str, port: int) -> Iterator[None]:
    from prometheus_client import start_http_server  # noqa: PLC0415

    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        what = f"--metrics: cannot listen on {host}:{port} ({error.strerror}): give another port"
        raise SettingsInvalid(what, reason="cannot-listen") from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _in_file(metrics: CohortMetrics, path: Path) -> Iterator[None]:
    ending = threading.Event()
    _write(metrics, path)

    def write_all() -> None:
        is_last = False
        while not is_last:
            is_last = ending.wait(_FILE_S)
            try:
                _write(metrics, path)
            except OutputError as error:  # rows matter more
                log.warning("%s", error.described)

    thread = threading.Thread(target=write_all, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()


def _write(metrics: CohortMetrics, path: Path) -> None:
    from prometheus_client import write_to_textfile  # noqa: PLC0415

    try:
        write_to_textfile(str(path), metrics.registry)
    except OSError as error:
        raise output_error_from_oserror(error, path.name, "check --metrics") from error
