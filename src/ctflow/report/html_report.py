"""report.html: segments, their measurements and a viewer of slices, in one file that fetches nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from ctflow.core.atomic import write_atomically
from ctflow.core.volume import FloatArray
from ctflow.report.content import HOW_MEASURED, colour_of, doubts_of, facts_of, findings_by_segment, remarks_of
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
    page: str = page_template(_part("report.html")).render(
        policy=Markup(content_policy(style, script)),  # noqa: S704
        style=Markup(style),  # noqa: S704  # of the package
        script=Markup(script),  # noqa: S704
        data=Markup(encoded),  # noqa: S704  # no "<" is left in it
        model=document["model"],
        research_only=document["research_only"],
        statement=document["statement"],
        doubts=doubts_of(document),
        windows=_WINDOWS,
        segments=[] if document["statement"] else list(findings_by_segment(document)),
        facts=list(facts_of(document)),
        remarks=remarks_of(document),
        how_measured=HOW_MEASURED,
        pictures=_pictures_note(steps, quality),
    )
    return page


@cache
def page_template(text: str) -> Template:
    """A template of a page in one file: all values are escaped, and unknown ones are an error.

    Args:
        text: The template.
    """
    # Late: a run without a report does not need it.
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, finalize=_printable)
    return environment.from_string(text)


def _printable(value: Any) -> Any:
    """Any text in a form for HTML, without control and direction characters."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(letter if letter.isprintable() else " " for letter in value)


def _part(name: str) -> str:
    return (resources.files("ctflow.report") / "viewer" / name).read_text(encoding="utf-8")


def content_policy(style: str, script: str = "") -> str:
    """Content-Security-Policy: only this script and this style, and pictures within the file.

    Args:
        style: The text of the page's style.
        script: That of its script; empty if it has none.
    """
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    scripts = f"script-src 'sha256-{hashes[1]}'" if script else "img-src data:"
    return f"default-src 'none'; style-src 'sha256-{hashes[0]}'; {scripts}; base-uri 'none'; form-action 'none'"


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
        "colours": [colour_of(number) for number in range(1, len(COLOURS) + 1)],
        "windows": [{"name": name, "centre": centre, "width": width} for name, centre, width in _WINDOWS],
        "hu": hu_of_codes(),
        "findings": findings,
        "first": first,
        "start": shown if first < 0 else findings[first],
    }


def _index_of(point_mm: tuple[float, float, float], affine_mm: FloatArray, shape: list[int]) -> list[int]:
    index = np.linalg.solve(affine_mm, [*point_mm, 1.0])[:3]
    return [int(np.clip(np.rint(place), 0, count - 1)) for place, count in zip(index, shape, strict=True)]


def _pictures_note(steps: tuple[int, int, int], quality: int) -> str:
    """The note that the pictures are not the CT itself."""
    thinned = [
        f"one of {step} voxels along {name}"
        for step, name in zip(steps, ("left", "posterior", "superior"), strict=True)
        if step > 1
    ]
    shown = f" Shown is {', '.join(thinned)}." if thinned else ""
    return f"Pictures are for orientation, not for diagnosis: 8 bit, JPEG of quality {quality}.{shown}"
