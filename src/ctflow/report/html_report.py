"""report.html: segments, their measurements and a viewer of slices, in one file that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ctflow.core.atomic import write_atomically
from ctflow.core.volume import FloatArray
from ctflow.measurements.plausibility import text_of_implausible, text_of_reasons
from ctflow.report.pixels import Slices, hu_of_codes, jpegs_from_slices, runs_from_labels, steps_for
from ctflow.report.preview import WINDOW_CENTRE_HU, WINDOW_WIDTH_HU
from ctflow.report.views import COLOURS, PLANES, Oriented

if TYPE_CHECKING:
    from jinja2 import Template

_WINDOWS = (  # name, centre and width in HU
    ("Lung", WINDOW_CENTRE_HU, WINDOW_WIDTH_HU),
    ("Mediastinum", 40.0, 400.0),
    ("Bone", 400.0, 1800.0),
)
_MINUS = "\N{MINUS SIGN}"


def write_html_report(oriented: Oriented, document: Mapping[str, Any], path: Path) -> None:
    """Write the report of one series.

    It repeats result.json without the seconds, so that the same result gives the same file. A series is named by
    its digest only: a series description is free text, in which names have been found.

    Args:
        oriented: The CT and its labels.
        document: The series' result (`ctflow.report.result.series_result`), done.
        path: The file.

    Raises:
        OutputError: It cannot be written.
    """
    content = _page(oriented, document).encode("utf-8")
    write_atomically(path, lambda stream: stream.write(content))


def _page(oriented: Oriented, document: Mapping[str, Any]) -> str:
    style, script = _part("report.css"), _part("report.js")
    steps = steps_for(oriented.geometry.shape, oriented.geometry.spacing_mm)
    jpegs, quality = jpegs_from_slices(slices := Slices(oriented, steps))
    data = _viewer_data(oriented, steps, document)
    start = data["start"][2]
    data |= {
        "slices": [_base64(jpeg) for jpeg in jpegs],
        "runs": _base64(runs_from_labels(oriented, steps)),
        # A browser that alters what a page reads from pictures must not go unnoticed.
        "check": {"slice": start, "mean": round(float(slices[start].mean()), 2)},
    }
    encoded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    doubts = map(text_of_implausible, document["segments"])
    page: str = _template().render(
        policy=Markup(_policy(style, script)),  # noqa: S704
        style=Markup(style),  # noqa: S704  # of the package
        script=Markup(script),  # noqa: S704
        data=Markup(encoded),  # noqa: S704  # no "<" is left in it
        model=document["model"],
        research_only=document["research_only"],
        statement=document["statement"],
        doubts=[doubt for doubt in doubts if doubt],
        windows=_WINDOWS,
        segments=[] if document["statement"] else list(_segments(document)),
        facts=list(_facts(document)),
        remarks=_remarks(document),
        pictures=_pictures_note(steps, quality),
    )
    return page


@cache
def _template() -> Template:
    # Late: a run without a report does not need it.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_printable)
    return environment.from_string(_part("report.html"))


def _printable(value: Any) -> Any:
    """Any text in a form for HTML, without control and direction characters."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(letter if letter.isprintable() else " " for letter in value)


def _part(name: str) -> str:
    return (resources.files("ctflow.report") / "viewer" / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: only this script and this style."""
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _viewer_data(oriented: Oriented, steps: tuple[int, int, int], document: Mapping[str, Any]) -> dict[str, Any]:
    """The viewer's data except the pixels; indices run to the left, posterior and superior on the shown grid."""
    affine = oriented.geometry.affine_mm @ np.diag([*steps, 1.0])
    shape = [-(-count // step) for count, step in zip(oriented.geometry.shape, steps, strict=True)]
    listed = [finding for segment in document["segments"] for finding in segment["findings"]]
    findings = [_index_of(finding["centroid_mm"], affine, shape) for finding in listed]
    plausible = [index for index, finding in enumerate(listed) if not finding["implausible"]]
    first = max(plausible, key=lambda index: float(listed[index]["volume_ml"]), default=-1)
    shown = [index // step for index, step in zip(oriented.shown, steps, strict=True)]
    return {
        "shape": shape,
        "affine": [[round(float(value), 6) for value in row] for row in affine[:3]],
        "planes": [
            {"name": plane.name, "across": plane.across, "down": plane.down, "through": plane.through}
            | {"sign": plane.down_sign, "letters": plane.letters, "position": plane.position}
            for plane in PLANES
        ],
        "colours": [_colour(number) for number in range(1, len(COLOURS) + 1)],
        "windows": [{"name": name, "centre": centre, "width": width} for name, centre, width in _WINDOWS],
        "hu": hu_of_codes(),
        "findings": findings,
        "first": first,
        "start": shown if first < 0 else findings[first],
    }


def _index_of(point_mm: tuple[float, float, float], affine_mm: FloatArray, shape: list[int]) -> list[int]:
    index = np.linalg.solve(affine_mm, [*point_mm, 1.0])[:3]
    return [int(np.clip(np.rint(place), 0, count - 1)) for place, count in zip(index, shape, strict=True)]


def _colour(number: int) -> str:
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)]
    return f"#{red:02x}{green:02x}{blue:02x}"


def _segments(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per segment and one per finding, whose button moves the viewer there."""
    index = count()
    for segment in document["segments"]:
        yield {
            "label": segment["label"],
            "colour": _colour(segment["number"]),
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
    return [value.replace("-", _MINUS) for value in values]


def _doubt(finding: Mapping[str, Any], segment: Mapping[str, Any]) -> str:
    if not finding["implausible"]:
        return ""
    why = (finding["implausible"], finding["outside_body"], finding["mean_hu"], segment["hu_range"])
    return text_of_reasons(*why).replace(" -", f" {_MINUS}")


def _windows(window: Mapping[str, Any]) -> str:
    if "inferer" in window:
        return "by the bundle's own inferer"
    overlap = window["overlap"] if isinstance(window["overlap"], list) else [window["overlap"]]
    return f"overlap {' x '.join(f'{each:g}' for each in overlap)}, {window['blend']}"


def _facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    series, model, engine, window = (document[key] for key in ("series", "model", "engine", "window"))
    yield "Series", str(series["digest"])
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


def _remarks(document: Mapping[str, Any]) -> list[str]:
    intended = [f"Intended use: {document['intended_use']}"] if document["intended_use"] else []
    return [*intended, *(f"Warning: {warning}" for warning in document["warnings"])]


def _pictures_note(steps: tuple[int, int, int], quality: int) -> str:
    """The note that the pictures are not the CT itself."""
    thinned = [
        f"one of {step} voxels along {name}"
        for step, name in zip(steps, ("left", "posterior", "superior"), strict=True)
        if step > 1
    ]
    shown = f" Shown is {', '.join(thinned)}." if thinned else ""
    return f"Pictures are for orientation, not for diagnosis: 8 bit, JPEG of quality {quality}.{shown}"
