"""Findings outside the body, or of HU that their segment never has, are told from others."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from ctflow.core.model import Code, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.measurements.components import MOST_FINDINGS
from ctflow.measurements.measure import measure_segments, split_findings
from ctflow.measurements.plausibility import (
    NO_BODY,
    Checks,
    note_of_findings,
    place_to_show,
    text_of_implausible,
    text_of_reasons,
    warnings_of_findings,
)
from ctflow.window.body import Body

ANY = Code("1", "99", "any")
TUMOUR = Segment(1, "Tumour", ANY, ANY, hu_range=(-700.0, 300.0))
LUNG = Segment(2, "Lung", ANY, ANY)
SHAPE = (8, 12, 20)
CELL = (2, 3, 5)


def volume_of(hu, spacing=(2.0, 1.0, 1.0)) -> Volume:
    return Volume(np.ascontiguousarray(hu), Geometry(SHAPE, np.diag([*spacing[::-1], 1.0])[:, [2, 1, 0, 3]]))


def body_of(cells) -> Body:
    return Body(np.array(cells), CELL, SHAPE)


def left_half() -> Body:
    """The body is columns 0 to 9."""
    cells = np.zeros((4, 4, 4), bool)
    cells[:, :, :2] = True
    return body_of(cells)


def three_findings():
    """A small one in the body, a larger one in air beside it, and one of bone in the body."""
    labels, hu = np.zeros(SHAPE, np.uint8), np.full(SHAPE, -1024, np.int16)
    hu[:, :, :10] = 30
    labels[1:3, 1:3, 1:3] = 1
    labels[2:6, 4:8, 12:18] = 1
    labels[6, 8:10, 2:5] = 1
    hu[6, 8:10, 2:5] = 900
    return labels, volume_of(hu)


def test_findings_that_fail_stand_behind_the_others_and_are_counted_by_reason():
    labels, volume = three_findings()
    (measured,) = measure_segments(labels, volume, (TUMOUR,), left_half().count_in_runs)
    assert [finding.implausible for finding in measured.findings] == [(), ("outside-body", "hu-range"), ("hu-range",)]
    assert [finding.outside_body for finding in measured.findings] == [0.0, 1.0, 0.0]
    assert measured.implausible.findings == 2
    assert measured.implausible.volume_ml == pytest.approx((96 + 6) * 2 / 1000)
    assert (measured.implausible.outside_body, measured.implausible.hu_range) == (1, 2)
    assert measured.components == 3
    assert measured.findings[1].largest_at == (2, 4, 12)


def test_with_neither_a_body_nor_a_range_nothing_is_implausible():
    labels, volume = three_findings()
    (measured,) = measure_segments(labels, volume, (replace(TUMOUR, hu_range=None),))
    assert measured.implausible.findings == 0
    assert all(finding.implausible == () and finding.outside_body is None for finding in measured.findings)
    volumes = [finding.volume_ml for finding in measured.findings]
    assert volumes == sorted(volumes, reverse=True)


@pytest.mark.parametrize(("columns", "share", "fails"), [(4, 0.4, False), (5, 0.5, False), (6, 0.6, True)])
def test_more_than_half_of_a_finding_has_to_lie_outside(columns, share, fails):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 5, columns : columns + 10] = 1
    (measured,) = measure_segments(labels, volume_of(np.zeros(SHAPE, np.int16)), (TUMOUR,), left_half().count_in_runs)
    assert measured.findings[0].outside_body == pytest.approx(share)
    assert (measured.findings[0].implausible == ("outside-body",)) is fails


@pytest.mark.parametrize(("hu", "fails"), [(-701, True), (-700, False), (300, False), (301, True)])
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_both_ends_of_the_range_belong_to_it(hu, fails, dtype):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:4, 3:5, 4:7] = 1
    (measured,) = measure_segments(labels, volume_of(np.full(SHAPE, hu, dtype)), (TUMOUR,))
    assert (measured.findings[0].implausible == ("hu-range",)) is fails


def test_voxels_in_the_body_are_counted_as_its_mask_has_them():
    random = np.random.default_rng(2)
    labels = (random.random(SHAPE) < 0.2).astype(np.uint8)
    body = body_of(random.random((4, 4, 4)) < 0.5)
    mask = np.repeat(np.repeat(np.repeat(body.cells, 2, 0), 3, 1), 5, 2)
    (measured,) = measure_segments(labels, volume_of(np.zeros(SHAPE, np.int16)), (TUMOUR,), body.count_in_runs)
    outside = sum(finding.outside_body * finding.volume_ml for finding in measured.findings)
    assert measured.findings_left_out == 0
    assert outside == pytest.approx(np.count_nonzero(labels & ~mask) * 2 / 1000)


def test_a_list_that_is_full_of_air_still_has_the_finding_in_the_body():
    labels, hu = np.zeros(SHAPE, np.uint8), np.full(SHAPE, -1024, np.int16)
    labels[::2, ::2, ::4] = 1
    labels[::2, ::2, 1::4] = 1
    labels[4, 6, 8:10] = 0
    labels[4, 6, 8] = 1
    hu[4, 6, 8] = 20
    (measured,) = measure_segments(labels, volume_of(hu), (TUMOUR,))
    assert measured.components > MOST_FINDINGS
    assert measured.findings[0].mean_hu == 20
    assert measured.implausible.findings == measured.components - 1, "also those that are not listed"
    split, parts = split_findings(labels, (TUMOUR,), Checks(volume_of(hu)))
    assert split[4, 6, 8] == 1
    assert parts[0].rank == 1


def test_the_largest_finding_that_passes_is_shown_of_any_segment():
    labels, volume = three_findings()
    body = left_half().count_in_runs
    assert place_to_show(measure_segments(labels, volume, (TUMOUR,), body)) == (1, 1, 1)
    labels[0, 11, :10] = 2
    assert place_to_show(measure_segments(labels, volume, (TUMOUR, LUNG), body)) == (0, 11, 0)
    labels[labels == 2] = 0
    labels[1:3, 1:3, 1:3] = 0
    assert place_to_show(measure_segments(labels, volume, (TUMOUR, LUNG), body)) is None


def test_a_person_is_told_how_many_where_and_why():
    labels, volume = three_findings()
    body = left_half().count_in_runs
    measured = measure_segments(labels, volume, (TUMOUR, LUNG), body)
    assert warnings_of_findings(measured, Checks(volume, body)) == (
        "Tumour: 2 of 3 findings (0.20 of 0.22 ml) are implausible "
        "(mostly outside the body: 1; mean outside -700 to 300 HU: 2)",
    )
    assert text_of_implausible(asdict(measured[1])) == ""
    assert note_of_findings(measured) == "2 of 3 findings are implausible: see the report"
    air = measured[0].findings[1]
    said = text_of_reasons(air.implausible, air.outside_body, air.mean_hu, TUMOUR.hu_range)
    assert said == "100 % outside the body; mean -1024 HU, not -700 to 300 HU"


def test_findings_that_could_not_be_compared_with_a_body_are_told_of():
    labels, volume = three_findings()
    measured = measure_segments(labels, volume, (LUNG,))
    assert warnings_of_findings(measured, Checks(volume)) == ()
    labels[labels == 1] = 2
    assert warnings_of_findings(measure_segments(labels, volume, (LUNG,)), Checks(volume)) == (NO_BODY,)
