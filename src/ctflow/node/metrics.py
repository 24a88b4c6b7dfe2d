"""The node's Prometheus metrics: counters of this process, and the journal's state at each scrape."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctflow import __version__
from ctflow.node.journal.reading import JournalReader

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# From the last image to the result: seconds on a GPU, a minute on two cores, more with a queue.
_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """The node's numbers; every method may be called from any thread.

    Labels are ctflow's own words or the site's names: nothing that a sender can choose, and no patient data.

    Args:
        journal: Read at each scrape.
        data: Folder on the monitored disk.
    """

    def __init__(self, journal: JournalReader, data: Path) -> None:
        # Late: only the node needs it, not the library.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram  # noqa: PLC0415

        self._registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self._registry}
        self._received = Counter("ctflow_instances_received", "Instances acknowledged as new.", **made)
        self._bytes = Counter("ctflow_received_bytes", "Their bytes.", **made)
        self._duplicates = Counter("ctflow_instances_duplicate", "Instances received again.", **made)
        self._left_out = Counter("ctflow_objects_left_out", "Objects kept and not run, such as dose reports.", **made)
        self._same_uid = Counter(
            "ctflow_instances_same_uid", "Instances with other content under a known UID.", ["outcome"], **made
        )
        self._refused = Counter("ctflow_refused", "Instances and associations refused.", ["reason"], **made)
        self._associations = Gauge("ctflow_associations", "Associations open now.", **made)
        self._sent = Counter("ctflow_sends", "Attempts to send an object.", ["destination", "outcome"], **made)
        self._stages = Histogram(
            "ctflow_stage_seconds", "Seconds of each stage of a series.", ["stage", "model"], buckets=_BUCKETS_S, **made
        )
        build = Gauge("ctflow_build_info", "Version of ctflow.", ["version"], **made)
        build.labels(__version__).set(1)
        self._registry.register(_JournalCollector(journal, data))

    def received(self, count_bytes: int) -> None:
        """An instance was acknowledged as new."""
        self._received.inc()
        self._bytes.inc(count_bytes)

    def duplicate(self) -> None:
        """An instance came again."""
        self._duplicates.inc()

    def left_out(self) -> None:
        """An object was kept that is not run."""
        self._left_out.inc()

    def same_uid(self, outcome: str) -> None:
        """An instance came with other content under a known UID: `kept-first` or `replaced`."""
        self._same_uid.labels(_word(outcome)).inc()

    def refused(self, reason: str) -> None:
        """An instance or association was refused; `reason` is one of a few words, such as `free-disk` or `peer`."""
        self._refused.labels(_word(reason)).inc()

    def associations(self, change: int) -> None:
        """An association began (1) or ended (-1)."""
        self._associations.inc(change)

    def sent(self, destination: str, outcome: str) -> None:
        """An attempt to send an object ended: `sent`, `refused` or `down`."""
        self._sent.labels(destination, _word(outcome)).inc()

    def stage(self, stage: str, elapsed_s: float, model: str = "") -> None:
        """Seconds of a stage of a series: those of result.json, `queue`, and `turnaround`: last image to result."""
        self._stages.labels(_word(stage), model).observe(elapsed_s)

    def expiries(self, of: Callable[[], Iterable[tuple[str, float]]]) -> None:
        """From now on show when certificates expire: their names in the settings and Unix times, asked each time."""
        self._registry.register(_Expiries(of))

    def exposition(self) -> tuple[bytes, str]:
        """The metrics in Prometheus' format, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _JournalCollector:
    """Gauges that are read at each scrape."""

    def __init__(self, journal: JournalReader, data: Path) -> None:
        self._journal = journal
        self._data = data

    def describe(self) -> Iterable[Metric]:
        """Return nothing: without this method the registry would read the journal at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The journal's counts and the disk's free space."""
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

        series = GaugeMetricFamily("ctflow_series", "Series in each state.", labels=["state"])
        for state, count in self._journal.counts().items():
            series.add_metric([state], count)
        yield series
        runs = GaugeMetricFamily("ctflow_runs", "Runs of each model in each state.", labels=["model", "state"])
        for (model, state), count in self._journal.run_counts().items():
            runs.add_metric([model, state], count)
        yield runs
        objects = GaugeMetricFamily("ctflow_deliveries", "Objects to deliver.", labels=["destination", "state"])
        for destination, states in self._journal.backlog().items():
            for name, count in states.items():
                objects.add_metric([destination, name], count)
        yield objects
        free = GaugeMetricFamily("ctflow_disk_free_bytes", "Free space on the disk of the node's data folder.")
        free.add_metric([], shutil.disk_usage(self._data).free)
        yield free


class _Expiries:
    """When certificates expire, read at each scrape."""

    def __init__(self, of: Callable[[], Iterable[tuple[str, float]]]) -> None:
        self._of = of

    def describe(self) -> Iterable[Metric]:
        """Return nothing, as for the journal."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One gauge."""
        from prometheus_client.core import GaugeMetricFamily  # noqa: PLC0415

        name, meaning = "ctflow_certificate_expires_seconds", "Unix time at which a certificate of the node expires."
        gauge = GaugeMetricFamily(name, meaning, labels=["certificate"])
        for place, expires_at in self._of():
            gauge.add_metric([place], expires_at)
        yield gauge


def _word(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", text):
        raise ValueError(f"{text!r} is no word for a label")
    return text
