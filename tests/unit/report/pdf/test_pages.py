"""The PDF's pages say what the result does, on paper that one can read."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pypdfium2
import pytest

from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY
from ctflow.report.pdf.pages import pdf_from_document
from report_support import NODE, TUMOUR, document_of, some_labels, some_volume, text_of_pdf

PICTURE = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)


def document(segments=(TUMOUR, NODE), **changed):
    """As result.json has it."""
    return json.loads(json.dumps(document_of(some_volume(), some_labels(), segments, **changed)))


def picture_of(pdf: bytes, page: int = 0) -> np.ndarray:
    return pypdfium2.PdfDocument(pdf)[page].render(scale=2).to_numpy()


def many(count, **changed):
    """A result whose first segment has `count` findings."""
    result = document(**changed)
    findings = result["segments"][0]["findings"]
    findings[:] = [copy.deepcopy(findings[index % 2]) for index in range(count)]
    return result


def test_it_says_what_the_result_says():
    result = document(warnings=["Slices are uneven."])
    (page,) = text_of_pdf(pdf_from_document(result, PICTURE))
    for words in ("Segmentation report", "model 1.0", RESEARCH_ONLY, "page 1 of 1", "series 0123456789ab"):
        assert words in page
    first = result["segments"][0]["findings"][0]
    assert f"Lung tumour 1 {first['volume_ml']:.2f} {first['long_axis_mm']:.1f} {first['short_axis_mm']:.1f}" in page
    assert "Lung tumour 2 findings" in page
    assert "Lymph node 1" in page
    for fact in ("24 x 40 x 48", "5.00 x 1.00 x 2.00 mm", "eager fp32 on cpu", "abababababab", "64 x 64 x 64"):
        assert fact in page
    assert "Intended use: Tests." in page
    assert "Warning: Slices are uneven." in page


def test_the_picture_is_on_the_page_as_it_is():
    picture = np.zeros((40, 100, 3), np.uint8)
    picture[:, :50], picture[:, 50:] = (250, 20, 30), (10, 40, 240)
    page = picture_of(pdf_from_document(document(), picture))[..., :3]
    for colour in ((250, 20, 30), (10, 40, 240)):
        same = (np.abs(page.astype(int) - colour).max(axis=-1) <= 2) | (
            np.abs(page[..., ::-1].astype(int) - colour).max(axis=-1) <= 2
        )
        assert same.mean() > 0.05, "a tenth of the page and more is the picture"


def test_the_same_result_is_the_same_bytes_whatever_its_seconds():
    first, again = (pdf_from_document(document(stage_seconds={"read": seconds}), PICTURE) for seconds in (1.0, 2.0))
    assert first == again
    assert pdf_from_document(document(warnings=["other"]), PICTURE) != first


def test_it_says_which_volume_of_a_series_it_is():
    result = document()
    assert "in the series" not in text_of_pdf(pdf_from_document(result, PICTURE))[0]
    result["series"]["volume"] = {"name": "phase-50", "label": "phase 50 %", "number": 2, "of": 10}
    assert "phase 50 % (2 of 10 in the series)" in text_of_pdf(pdf_from_document(result, PICTURE))[0]


def test_every_font_is_embedded():
    fonts = re.findall(rb"/BaseFont\s*/(\S+)", pdf_from_document(document(), PICTURE))
    assert {font.partition(b"+")[2] for font in fonts} == {b"Roboto-Regular", b"Roboto-Bold"}


def test_only_a_demonstration_is_for_research_only():
    (page,) = text_of_pdf(pdf_from_document(document(research_only=None), PICTURE))
    assert "RESEARCH" not in page


def test_nothing_marked_is_said():
    volume, labels = some_volume(), np.zeros_like(some_labels())
    (page,) = text_of_pdf(pdf_from_document(document_of(volume, labels), PICTURE))
    assert NOTHING_MARKED in page
    assert "Lung tumour" not in page


def test_implausible_findings_are_told_above_and_in_the_table():
    result = document()
    segment = result["segments"][0]
    segment["findings"][0] |= {"implausible": ["outside-body"], "outside_body": 0.97}
    segment["implausible"] = {"findings": 1, "volume_ml": 3.0, "outside_body": 1, "hu_range": 0}
    (page,) = text_of_pdf(pdf_from_document(result, PICTURE))
    assert "Lung tumour: 1 of 2 findings" in page
    assert "Implausible: 97 % outside the body" in page


def test_many_findings_go_on_with_the_heading_and_the_notice_on_every_page():
    pages = text_of_pdf(pdf_from_document(many(120), PICTURE))
    assert len(pages) >= 3
    for number, page in enumerate(pages, start=1):
        assert f"page {number} of {len(pages)}" in page
        assert RESEARCH_ONLY in page
    assert [f"Lung tumour {number} " in " ".join(pages) for number in (1, 60, 120)] == [True] * 3
    assert "Lung tumour 1 " in pages[0], "the table begins below the picture"
    assert all("Volume" in page for page in pages[:-1])


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("Nódulo łódź", "Nódulo łódź"),
        ("Опухоль", "Опухоль"),
        ("Όγκος", "Όγκος"),
        ("腫瘍 1", "[U+816B U+760D] 1"),
        ("שאת", "[U+05E9 U+05D0 U+05EA]"),
        ("<b>&amp;</b>\x07", "<b>&amp;</b>"),
        ("a\u202eb", "a b"),
    ],
)
def test_names_in_any_script_are_readable(label, shown):
    result = document(model={"name": label, "version": "1", "weights_digest": "ab"}, warnings=[label])
    result["segments"][0]["label"] = label
    page = " ".join(text_of_pdf(pdf_from_document(result, PICTURE)))
    assert page.count(shown) >= 3, "head, table and remark"


def test_long_words_stay_on_the_page():
    result = document(model={"name": "m" * 200, "version": "1", "weights_digest": "ab"}, warnings=["w" * 900] * 9)
    for segment in result["segments"]:
        segment["label"] = "L" * 200
    pdf = pdf_from_document(result, PICTURE)
    margin = 25
    for number in range(len(pypdfium2.PdfDocument(pdf))):
        page = picture_of(pdf, number)[margin:-margin]
        assert (page[:, :margin] == 255).all(), "nothing in the left margin"
        assert (page[:, -margin:] == 255).all(), "nor in the right one"


@pytest.mark.parametrize("shape", [(2000, 300, 3), (30, 3000, 3), (1, 1, 3)])
def test_a_picture_of_any_shape_fits(shape):
    assert len(text_of_pdf(pdf_from_document(document(), np.zeros(shape, np.uint8)))) == 1


@pytest.mark.parametrize(
    "letter", ["a", "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "\N{GRINNING FACE}", "<", "\N{RIGHT-TO-LEFT OVERRIDE}"]
)
def test_names_of_any_length_fit_on_pages(letter):
    result = document()
    result["model"]["name"] = 20_000 * letter
    for segment in result["segments"]:
        segment["label"] = 20_000 * letter
    pages = text_of_pdf(pdf_from_document(result, PICTURE))
    assert 1 <= len(pages) <= 10
    assert "Measurements" in " ".join(pages)
