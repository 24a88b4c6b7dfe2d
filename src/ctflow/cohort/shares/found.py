"""What a marker keeps of the documents of a row's volumes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ctflow.cohort.outcome import RowFinding, RowSegment

_KEPT = ("volume_ml", "longest_diameter_mm", "long_axis_mm", "short_axis_mm", "mean_hu")


def row_segments_from_documents(documents: Iterable[Mapping[str, Any]]) -> tuple[RowSegment, ...]:
    """The segments of volumes that are done.

    Args:
        documents: Results of volumes (`ctflow.report.result.series_result`).
    """
    return tuple(
        RowSegment(document["folder"], segment["label"], segment["volume_ml"], segment["components"])
        for document in documents
        for segment in document["segments"]
    )


def row_findings_from_documents(documents: Iterable[Mapping[str, Any]]) -> tuple[RowFinding, ...]:
    """Their listed findings; as `row_segments_from_documents`."""
    return tuple(
        RowFinding(
            folder=document["folder"],
            label=segment["label"],
            number=number,
            implausible=tuple(finding["implausible"]),
            **{name: finding[name] for name in _KEPT},
        )
        for document in documents
        for segment in document["segments"]
        for number, finding in enumerate(segment["findings"], 1)
    )


def stage_seconds_of(documents: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each stage, over all volumes; as `row_segments_from_documents`."""
    total: Counter[str] = Counter()
    for document in documents:
        total.update(document["stage_seconds"])
    return {stage: round(seconds, 4) for stage, seconds in total.items()}
