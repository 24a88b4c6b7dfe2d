"""Findings that cannot be what the model labels them: outside the body, or with HU that their segment never has.

A model may mark air, and its result then looks like any other. Such findings stay in the result, are called implausible
wherever it is shown, follow the others, and are never shown in a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ctflow.core.errors import counted
from ctflow.core.volume import Indices, Size3, Volume

if TYPE_CHECKING:
    from ctflow.measurements.measure import SegmentMeasurements

OUTSIDE_BODY = "outside-body"
HU_RANGE = "hu-range"
MOST_OUTSIDE = 0.5  # share of a finding's voxels; the detected body is a superset: findings in the skin pass
NO_BODY = "no body was found in the volume: whether the findings lie in it was not checked"

# (n, 2) d and h of lines, (n,) first and (n,) last voxel w on each -> (n,) how many of these voxels are the body's.
CountInBody = Callable[[Indices, Indices, Indices], Indices]


@dataclass(frozen=True, eq=False)
class Checks:
    """The references for the checks of findings.

    Attributes:
        volume: The CT in HU.
        count_in_body: Counts the body's voxels in runs; None if no body is known.
    """

    volume: Volume
    count_in_body: CountInBody | None = None


@dataclass(frozen=True)
class Implausible:
    """Findings of a segment that fail a check.

    Attributes:
        findings: How many.
        volume_ml: Their volume.
        outside_body: How many of them have more than half of their voxels outside the body.
        hu_range: How many of them have a mean outside the segment's range.
    """

    findings: int = 0
    volume_ml: float = 0.0
    outside_body: int = 0
    hu_range: int = 0


def text_of_reasons(
    reasons: Sequence[str], outside_body: float | None, mean_hu: float, hu_range: Sequence[float] | None
) -> str:
    """Why a finding is implausible, for display: "97 % outside the body; mean -1019 HU, not -700 to 300 HU"."""
    said = []
    if OUTSIDE_BODY in reasons and outside_body is not None:
        said.append(f"{100 * outside_body:.0f} % outside the body")
    if HU_RANGE in reasons and hu_range is not None:
        said.append(f"mean {mean_hu:.0f} HU, not {_text_of_range(hu_range)}")
    return "; ".join(said)


def text_of_implausible(segment: Mapping[str, Any]) -> str:
    """One sentence for a segment's implausible findings (of its measurements as a mapping); empty if it has none."""
    implausible, hu_range = segment["implausible"], segment["hu_range"]
    if not implausible["findings"]:
        return ""
    why = []
    if implausible["outside_body"]:
        why.append(f"mostly outside the body: {implausible['outside_body']}")
    if implausible["hu_range"] and hu_range is not None:
        why.append(f"mean outside {_text_of_range(hu_range)}: {implausible['hu_range']}")
    number = f"{implausible['findings']} of {segment['components']} findings"
    share = f"{number} ({implausible['volume_ml']:.2f} of {segment['volume_ml']:.2f} ml)"
    return f"{segment['label']}: {share} are implausible ({'; '.join(why)})"


def warnings_of_findings(measured: Sequence[SegmentMeasurements], checks: Checks) -> tuple[str, ...]:
    """Warnings for the reader of findings: a sentence per segment, and whether the body was found."""
    unchecked = checks.count_in_body is None and any(segment.components for segment in measured)
    return (*(NO_BODY,) * unchecked, *filter(None, (text_of_implausible(asdict(segment)) for segment in measured)))


def note_of_findings(measured: Sequence[SegmentMeasurements]) -> str:
    """The same in one line for a picture; empty if nothing is implausible."""
    implausible = sum(segment.implausible.findings for segment in measured)
    findings = sum(segment.components for segment in measured)
    verb = "is" if implausible == 1 else "are"
    return f"{implausible} of {counted(findings, 'finding')} {verb} implausible: see the report" if implausible else ""


def place_to_show(measured: Sequence[SegmentMeasurements]) -> Size3 | None:
    """Array index (d, h, w) of the largest finding that passes all checks; None if none does."""
    plausible = [each for segment in measured for each in segment.findings if not each.implausible]
    return max(plausible, key=lambda finding: finding.volume_ml).largest_at if plausible else None


def _text_of_range(hu_range: Sequence[float]) -> str:
    return f"{hu_range[0]:g} to {hu_range[1]:g} HU"
