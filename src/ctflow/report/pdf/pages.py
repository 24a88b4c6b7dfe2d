"""The report as pages to read and print: the same result is the same bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctflow.report.content import HOW_MEASURED, doubts_of, facts_of, findings_by_segment, remarks_of
from ctflow.report.pdf.letters import drawable, font_name, known_letters

if TYPE_CHECKING:
    from reportlab.pdfgen.canvas import Canvas
    from reportlab.platypus import Flowable, Paragraph, Table

TITLE = "Segmentation report"
_MM = 72 / 25.4  # points
_PAGE = (210 * _MM, 297 * _MM)
_SIDE, _TOP, _BOTTOM = 15 * _MM, 30 * _MM, 17 * _MM
_WIDTH = _PAGE[0] - 2 * _SIDE
_INK, _DIM, _LINE, _SHADE, _ACCENT = "#17202b", "#5a6572", "#d3dae1", "#eff3f7", "#17507f"
_ALARM_INK, _ALARM_SHADE, _ALARM_LINE = "#6b4700", "#fff2cf", "#e3a008"
_COLUMNS = (
    ("Finding", "", 48),
    ("Volume", "ml", 17),
    ("Long axis", "mm", 17),
    ("Short axis", "mm", 17),
    ("3D diameter", "mm", 19),
    ("Mean", "HU", 12),
    ("SD", "HU", 11),
    ("Left", "mm", 13),
    ("Posterior", "mm", 13.5),
    ("Superior", "mm", 12.5),
)  # heading, unit, mm
_LONGEST = 300  # characters shown of a name: a cell cannot be higher than a page
_NOTES = (
    HOW_MEASURED,
    "The picture is for orientation, not for diagnosis. It shows the largest plausible finding.",
    "Patient and study are in the DICOM attributes of this document and, for their protection, not on its pages.",
)


def pdf_from_document(document: Mapping[str, Any], picture: npt.NDArray[np.uint8]) -> bytes:
    """Lay out a series' result on A4 pages.

    It says what report.html does, and holds no patient data. Letters that the font lacks (it has Latin, Greek and
    Cyrillic ones) appear as their code points.

    Args:
        document: The series' result (`ctflow.report.result.series_result`), done; its seconds are not used.
        picture: (rows, columns, 3) uint8, RGB: the preview.
    """
    # Late: a run without a PDF does not need it.
    from reportlab.platypus import BaseDocTemplate, Frame, PageTemplate  # noqa: PLC0415

    known_letters()  # registers the fonts
    stream = io.BytesIO()
    pages = BaseDocTemplate(
        stream,
        pagesize=_PAGE,
        title=TITLE,
        author="ctflow",
        creator=f"ctflow {document['ctflow_version']}",
        subject=document["research_only"] or "",
        lang="en",
        invariant=1,  # no date, and an identifier from the content
        pageCompression=1,
        initialFontName=font_name(False),  # else one that is not embedded
    )
    frame = Frame(_SIDE, _BOTTOM, _WIDTH, _PAGE[1] - _TOP - _BOTTOM, 0, 0, 0, 0)
    pages.addPageTemplates(PageTemplate(frames=[frame], onPage=lambda canvas, _: _furnish(canvas, document)))
    pages.build(list(_story(document, picture)), canvasmaker=_numbering_canvas())
    return stream.getvalue()


def _story(document: Mapping[str, Any], picture: npt.NDArray[np.uint8]) -> Iterator[Flowable]:
    from reportlab.platypus import CondPageBreak, KeepTogether, Spacer  # noqa: PLC0415
    from reportlab.platypus import Image as Placed  # noqa: PLC0415

    for doubt in doubts_of(document):
        yield _box(f"{_shortened(doubt)}. The table says which.")
        yield Spacer(1, 2 * _MM)
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "PNG")
    height, width = picture.shape[:2]
    scale = min(_WIDTH / width, 110 * _MM / height)
    yield Placed(stored, width * scale, height * scale)
    yield CondPageBreak(
        45 * _MM
    )  # not a heading that is kept with the table: that would leave the rest of a page empty
    yield _heading("Measurements")
    yield _table_of_findings(document)
    yield KeepTogether([_heading("Case"), _table_of_facts(document)])
    yield CondPageBreak(25 * _MM)
    yield _heading("Remarks")
    for remark in (*remarks_of(document), *_NOTES):
        yield _paragraph(escape(drawable(remark)), size=8, bullet="\N{BULLET}", colour=_INK)


def _heading(words: str) -> Paragraph:
    return _paragraph(words, size=11, bold=True, colour=_ACCENT, above=5 * _MM, below=1.5 * _MM)


def _box(words: str) -> Table:
    """A warning that nobody overlooks."""
    from reportlab.platypus import Table  # noqa: PLC0415

    style = [
        ("FONTNAME", (0, 0), (-1, -1), font_name(False)),
        ("BACKGROUND", (0, 0), (-1, -1), _ALARM_SHADE),
        ("LINEBEFORE", (0, 0), (0, -1), 3, _ALARM_LINE, "butt"),
        ("LEFTPADDING", (0, 0), (-1, -1), 8),
    ]
    return Table([[_paragraph(escape(drawable(words)), size=9, colour=_ALARM_INK)]], [_WIDTH], style=style)


def _table_of_findings(document: Mapping[str, Any]) -> Table:
    """A row for each segment, below it one for each finding; the heading is repeated on every page."""
    from reportlab.platypus import Table  # noqa: PLC0415

    rows: list[list[Any]] = [
        [
            _paragraph(
                f"<b>{name}</b><br/><font size=6.5>{unit or '&nbsp;'}</font>", size=7.5, right=bool(unit), colour=_DIM
            )
            for name, unit, _ in _COLUMNS
        ]
    ]
    style: list[tuple[Any, ...]] = [
        ("FONTNAME", (0, 0), (-1, -1), font_name(False)),
        ("VALIGN", (0, 0), (-1, -1), "MIDDLE"),
        ("FONTSIZE", (0, 0), (-1, -1), 8),
        ("LEADING", (0, 0), (-1, -1), 10.4),
        ("TEXTCOLOR", (0, 0), (-1, -1), _INK),
        ("ALIGN", (1, 0), (-1, -1), "RIGHT"),
        ("LINEBELOW", (0, 1), (-1, -1), 0.3, _LINE),
        ("LINEBELOW", (0, 0), (-1, 0), 0.8, _DIM),
        ("LEFTPADDING", (0, 0), (-1, -1), 3),
        ("LEFTPADDING", (0, 1), (0, -1), 8),
        ("RIGHTPADDING", (0, 0), (-1, -1), 2),
        ("TOPPADDING", (0, 0), (-1, -1), 2.2),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 2.2),
    ]
    if document["statement"]:
        style += _across(len(rows))
        rows.append([_paragraph(escape(document["statement"]), size=9, bold=True)])
    for segment in () if document["statement"] else findings_by_segment(document):
        place, name = len(rows), drawable(_shortened(segment["label"]))
        said = f"<b>{escape(name)}</b> &nbsp;<font color='{_DIM}'>{escape(segment['said'])}</font>"
        rows.append([_paragraph(said, size=8.5)])
        style += [*_across(place), ("LINEBEFORE", (0, place), (0, place), 4, segment["colour"], "butt")]
        style.append(("NOSPLIT", (0, place), (0, place + min(1, len(segment["findings"])))))
        short = _fitting(name, 8, (_COLUMNS[0][2] - 12) * _MM)  # leaves room for the number
        for rank, finding in enumerate(segment["findings"], start=1):
            rows.append([_named(f"{short} {rank}", finding["doubt"]), *finding["cells"]])
    return Table(rows, [mm * _MM for _, _, mm in _COLUMNS], repeatRows=1, style=style)


def _named(name: str, doubt: str) -> Paragraph | str:
    """A finding's name, and below it why it is implausible; without that as mere text, which is laid out faster."""
    if not doubt:
        return name
    why = f"<br/><font size=6.8 color='{_ALARM_INK}'>Implausible: {escape(doubt)}</font>"
    return _paragraph(escape(name) + why, size=8)


def _across(row: int) -> list[tuple[Any, ...]]:
    return [("SPAN", (0, row), (-1, row)), ("BACKGROUND", (0, row), (-1, row), _SHADE)]


def _table_of_facts(document: Mapping[str, Any]) -> Table:
    """Two terms and their values a row, read down the left half first."""
    from reportlab.platypus import Table  # noqa: PLC0415

    facts = [
        (_paragraph(escape(term), size=8, colour=_DIM), _paragraph(escape(drawable(_shortened(value))), size=8))
        for term, value in facts_of(document)
    ]
    half = -(-len(facts) // 2)
    rows = [[*facts[index], *(facts[half + index] if half + index < len(facts) else ("", ""))] for index in range(half)]
    style = [
        ("FONTNAME", (0, 0), (-1, -1), font_name(False)),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LINEBELOW", (0, 0), (-1, -1), 0.3, _LINE),
        ("LEFTPADDING", (0, 0), (-1, -1), 3),
        ("TOPPADDING", (0, 0), (-1, -1), 1.8),
        ("BOTTOMPADDING", (0, 0), (-1, -1), 1.8),
    ]
    return Table(rows, [20 * _MM, 70 * _MM, 20 * _MM, 70 * _MM], style=style)


def _paragraph(
    markup: str,
    *,
    size: float,
    bold: bool = False,
    colour: str = _INK,
    right: bool = False,
    above: float = 0,
    below: float = 0,
    bullet: str | None = None,
) -> Paragraph:
    from reportlab.lib.enums import TA_LEFT, TA_RIGHT  # noqa: PLC0415
    from reportlab.lib.styles import ParagraphStyle  # noqa: PLC0415
    from reportlab.platypus import Paragraph  # noqa: PLC0415

    style = ParagraphStyle(
        "text",
        fontName=font_name(bold),
        bulletFontName=font_name(False),
        fontSize=size,
        bulletFontSize=size,
        leading=1.3 * size,
        textColor=colour,
        alignment=TA_RIGHT if right else TA_LEFT,
        leftIndent=9 if bullet else 0,
        spaceBefore=above,
        spaceAfter=1 * _MM if bullet else below,
    )
    return Paragraph(markup, style, bulletText=bullet)


def _furnish(canvas: Canvas, document: Mapping[str, Any]) -> None:
    """Head and foot of a page, but for its number."""
    model, notice = document["model"], document["research_only"]
    top = _PAGE[1] - 15 * _MM
    canvas.saveState()
    canvas.setFillColor(_ACCENT)
    canvas.rect(0, _PAGE[1] - 3 * _MM, _PAGE[0], 3 * _MM, stroke=0, fill=1)
    canvas.setFillColor(_INK)
    canvas.setFont(font_name(True), 17)
    canvas.drawString(_SIDE, top, TITLE)
    canvas.setFont(font_name(False), 10)
    canvas.setFillColor(_DIM)
    canvas.drawString(_SIDE, top - 5.5 * _MM, _fitting(f"{model['name']} {model['version']}", 10, _WIDTH / 2))
    if notice:
        width = canvas.stringWidth(notice, font_name(True), 9) + 6 * _MM
        canvas.setFillColor(_ALARM_SHADE)
        canvas.setStrokeColor(_ALARM_LINE)
        canvas.roundRect(_PAGE[0] - _SIDE - width, top - 3.2 * _MM, width, 8 * _MM, 1.5 * _MM, stroke=1, fill=1)
        canvas.setFillColor(_ALARM_INK)
        canvas.setFont(font_name(True), 9)
        canvas.drawRightString(_PAGE[0] - _SIDE - 3 * _MM, top - 0.4 * _MM, notice)
    canvas.setStrokeColor(_LINE)
    for height in (top - 9 * _MM, 12.5 * _MM):
        canvas.line(_SIDE, height, _PAGE[0] - _SIDE, height)
    canvas.setFillColor(_DIM)
    canvas.setFont(font_name(False), 7.5)
    canvas.drawString(_SIDE, 8.5 * _MM, f"ctflow {document['ctflow_version']}   series {document['series']['digest']}")
    canvas.restoreState()


def _shortened(words: str) -> str:
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _fitting(words: str, size: float, room: float) -> str:
    from reportlab.pdfbase.pdfmetrics import stringWidth  # noqa: PLC0415

    words = drawable(_shortened(words))
    while stringWidth(words, font_name(False), size) > room:
        words = f"{words[:-4]}..."
    return words


@cache
def _numbering_canvas() -> type[Canvas]:
    """A canvas that writes "page 1 of 2" on its pages once all are there."""
    from reportlab.pdfgen.canvas import Canvas  # noqa: PLC0415

    class NumberingCanvas(Canvas):  # type: ignore[misc]  # reportlab has no types
        def __init__(self, *arguments: Any, **words: Any) -> None:
            super().__init__(*arguments, **words)
            self._pages: list[dict[str, Any]] = []

        def showPage(self) -> None:  # noqa: N802  # its own name
            self._pages.append(dict(vars(self)))
            self._startPage()

        def save(self) -> None:
            for number, page in enumerate(self._pages, start=1):
                self.__dict__.update(page)
                self.setFont(font_name(False), 7.5)
                self.setFillColor(_DIM)
                self.drawRightString(_PAGE[0] - _SIDE, 8.5 * _MM, f"page {number} of {len(self._pages)}")
                super().showPage()
            super().save()

    return NumberingCanvas
