"""What a person reads of a result, in report.html and in the PDF: rows of findings, facts, remarks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from ctflow.measurements.plausibility import text_of_implausible, text_of_reasons
from ctflow.report.views import COLOURS

MINUS = "\N{MINUS SIGN}"
HOW_MEASURED = (
    "Lengths are between voxel centres. Long and short axis lie in one slice of the series. Left, posterior and "
    "superior are the centre in DICOM patient coordinates."
)


def doubts_of(document: Mapping[str, Any]) -> list[str]:
    """Sentences on implausible findings."""
    return [doubt for doubt in map(text_of_implausible, document["segments"]) if doubt]


def colour_of(number: int) -> str:
    """A segment's colour, as "#rrggbb"."""
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
    return f"#{red:02x}{green:02x}{blue:02x}"


def findings_by_segment(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """label, colour and summary (`said`) of each segment, and index, cells and doubt of each of its findings."""
    index = count()
    for segment in document["segments"]:
        yield {
            "label": segment["label"],
            "colour": colour_of(segment["number"]),
            "said": _said_of_segment(segment),
            "findings": [
                {"index": next(index), "cells": _cells(finding), "doubt": _doubt(finding, segment)}
                for finding in segment["findings"]
            ],
        }


def _said_of_segment(segment: Mapping[str, Any]) -> str:
    number, left_out = segment["components"], segment["findings_left_out"]
    said = f"{number} finding{'s' if number > 1 else ''}, {segment['volume_ml']:.2f} ml" if number else "nothing marked"
    doubted = segment["implausible"]["findings"]
    if doubted:
        said += f"; {doubted} of them implausible ({segment['implausible']['volume_ml']:.2f} ml)"
    if left_out:
        rest = f"{left_out} are left out{', implausible ones first' if doubted else ''}"
        said += f"; the {len(segment['findings'])} largest are listed, {rest}"
    return said


def _cells(finding: Mapping[str, Any]) -> list[str]:
    values = (
        "< 0.01" if finding["volume_ml"] < 0.005 else f"{finding['volume_ml']:.2f}",  # 0.00 would say nothing
        *(f"{finding[key]:.1f}" for key in ("long_axis_mm", "short_axis_mm", "longest_diameter_mm")),
        *(f"{round(finding[key])}" for key in ("mean_hu", "sd_hu")),
        *(f"{round(value, 1) + 0.0:+.1f}" for value in finding["centroid_mm"]),  # + 0.0: no minus zero
    )
    return [value.replace("-", MINUS) for value in values]


def _doubt(finding: Mapping[str, Any], segment: Mapping[str, Any]) -> str:
    if not finding["implausible"]:
        return ""
    why = (finding["implausible"], finding["outside_body"], finding["mean_hu"], segment["hu_range"])
    return text_of_reasons(*why).replace(" -", f" {MINUS}")


def _windows(window: Mapping[str, Any]) -> str:
    if "inferer" in window:
        return "by the bundle's own inferer"
    overlap = window["overlap"] if isinstance(window["overlap"], list) else [window["overlap"]]
    return f"overlap {' x '.join(f'{each:g}' for each in overlap)}, {window['blend']}"


def facts_of(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Terms and values: the series, the model and how it was run."""
    series, model, engine, window = (document[key] for key in ("series", "model", "engine", "window"))
    yield "Series", str(series["digest"])
    if "volume" in series:
        volume = series["volume"]
        yield "Volume", f"{volume['label']} ({volume['number']} of {volume['of']} in the series)"
    yield "Voxels", " x ".join(map(str, series["shape"]))
    yield "Spacing", f"{' x '.join(f'{mm:.2f}' for mm in series['spacing_mm'])} mm"
    yield "Model", f"{model['name']} {model['version']}"
    yield "Weights", str(model["weights_digest"])[:12]
    yield "Engine", f"{engine['backend']} {engine['precision']} on {engine['device']}"
    yield "Network", f"{' x '.join(map(str, window['roi']))}, {_windows(window)}"
    if "part" in window:
        windows = f"{window['windows']} of {window['windows_of_all']} windows"
        yield "Looked at", f"the {window['part']} only ({windows}); nothing outside it is marked"
    if "windows_constant" in window:
        yield "Padding", f"{window['windows_constant']} windows hold a single HU value; nothing is marked in them alone"
    yield "ctflow", str(document["ctflow_version"])


def remarks_of(document: Mapping[str, Any]) -> list[str]:
    """The intended use and the warnings."""
    intended = [f"Intended use: {document['intended_use']}"] if document["intended_use"] else []
    return [*intended, *(f"Warning: {warning}" for warning in document["warnings"])]
