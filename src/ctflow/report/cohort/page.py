"""cohort.html: what a cohort came to, in one file that fetches nothing and whose size does not grow with the rows."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import resources
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from ctflow.report.cohort.svg import busy_chart, commits_chart, distribution_chart, number_in_words, share_bar
from ctflow.report.html_report import content_policy, page_template

_CHARTED = 6  # segments whose volumes are drawn; the table has all
_WIDTHS_PX = {1: 1240, 2: 620}  # of a chart, by how many are beside each other
_SMALL_PX = 400
_STATUSES = ("done", "partly", "rejected", "failed")
_STAGES = {
    "read": "read slices",
    "prepare": "prepare the volume",
    "segment": "segment windows",
    "compare": "compare the engine with PyTorch",
    "restore": "back to the source grid",
    "seg": "write the SEG",
    "measure": "measure",
    "write": "write other objects",
    "preview": "draw the preview",
    "report": "write the report",
}


def cohort_page(
    document: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    files: Sequence[str],
    *,
    research_only: str | None,
    result_file: str | None,
) -> str:
    """The page.

    Args:
        document: `ctflow.cohort.report.summary.CohortSummary.document`.
        pictures: Small JPEGs, by row.
        files: Names of the tables beside the page.
        research_only: The notice of a demonstration model.
        result_file: Name of the file in a volume's result folder to which its picture links; None if the page can
            link to no results.

    Returns:
        HTML.
    """
    style = (resources.files("ctflow.report") / "palette.css").read_text(encoding="utf-8") + _text_of("page.css")
    timeline, charted = document["timeline"], [each for each in document["segments"] if each["bins"]][:_CHARTED]
    width = _WIDTHS_PX.get(len(charted), _SMALL_PX)
    busy = busy_chart(timeline)
    page: str = page_template(_text_of("page.html")).render(
        policy=Markup(content_policy(style)),  # noqa: S704
        style=Markup(style),  # noqa: S704  # of the package
        document=document,
        statuses=[status for status in _STATUSES if document["statuses"].get(status)],
        research_only=research_only,
        commits=commits_chart(timeline, is_wide=busy is None),
        busy=busy,
        bins=[each for each in timeline["bins"] if each],
        width=_length(timeline["width_s"]),
        seconds=distribution_chart(document["seconds"]["bins"], "s", "series"),
        stages=_stages(document["stages"]),
        charted=[(segment, distribution_chart(segment["bins"], "ml", "volumes", width)) for segment in charted],
        pictures=[
            each | {"jpeg": Markup(base64.b64encode(pictures[each["id"]]).decode("ascii"))}  # noqa: S704
            for each in document["pictured"]
            if each["id"] in pictures
        ],
        files=files,
        link=None if result_file is None else _link,
        result_file=result_file,
        number=_number,
        few=number_in_words,
        percent=_percent,
        share_bar=share_bar,
        length=_length,
    )
    return page


def _text_of(name: str) -> str:
    return (resources.files("ctflow.report.cohort") / name).read_text(encoding="utf-8")


def _link(*parts: str) -> str:
    """Address of a file below the page, whatever its name."""
    return "/".join(("results", *(quote(part, safe="") for part in parts)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    if share is None:
        return ""
    return "< 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _length(seconds: float) -> str:
    """A length of time in one or two units: 30 s, 5 min, 9 h 20 min, 3 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    days, rest = divmod(timedelta(seconds=round(seconds)), timedelta(days=1))
    hours, minutes = divmod(rest.seconds // 60, 60)
    if days > 1:
        return f"{days} days {hours} h" if hours else f"{days} days"
    return f"{24 * days + hours} h {minutes} min" if minutes else f"{24 * days + hours} h"


def _stages(stages: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The stages in their order, with the share that each takes."""
    known = list(_STAGES)
    ordered = sorted(stages, key=lambda each: (known.index(each[0]) if each[0] in known else len(known), each[0]))
    total = sum(seconds for _, seconds in ordered) or 1.0
    return [
        {"name": _STAGES.get(stage, stage), "seconds": seconds, "share": seconds / total} for stage, seconds in ordered
    ]
