from __future__ import annotations

import numpy as np
import pytest

from ctflow.core.errors import BrokenSeries
from ctflow.dicom.read.assemble import _resampled
from ctflow.dicom.read.geometry.spacing import spacing_of_slices
from odd_series import runs


def spacing(places_mm, numbers=None, *, allow_gaps=False):
    def refuse(reason, message):
        return BrokenSeries(message, reason=reason)

    numbers = numbers if numbers is not None else [None] * len(places_mm)
    return spacing_of_slices(np.array(places_mm), numbers, allow_gaps=allow_gaps, refuse=refuse)


def reason(*arguments, **options) -> str:
    with pytest.raises(BrokenSeries) as caught:
        spacing(*arguments, **options)
    return caught.value.reason


def test_a_regular_series_keeps_its_slices():
    found = spacing(runs((10, 2.5)))
    assert found.weights is None
    assert found.nearest == tuple(range(11))
    assert found.warnings == ()


@pytest.mark.parametrize(
    "pieces",
    [((5, 2), (5, 3)), ((3, 1), (4, 2.5), (3, 1)), ((13, 4.002), (1, 1.081), (13, 6.999)), ((5, 3), (1, 3), (5, 2))],
)
def test_pieces_become_a_grid_on_which_every_place_is_met_by_interpolation(pieces):
    places = np.array(runs(*pieces))
    found = spacing(places)
    step = places[-1] / (found.count - 1)
    assert step == pytest.approx(min(width for count, width in pieces if count >= 3), rel=0.1)
    assert np.allclose(found.weights.sum(axis=1), 1)
    assert (found.weights >= 0).all()
    assert np.allclose(found.weights @ places, np.arange(found.count) * step), "a linear field stays as it is"
    assert np.abs(np.array(found.nearest) * step - places).max() <= step / 2 + 1e-9


@pytest.mark.parametrize(
    ("places", "why"),
    [
        (runs((5, 2), (2, 3)), "irregular"),  # a run of two
        (runs((5, 2), (1, 4.5), (5, 3)), "irregular"),  # wider than both: slices may be missing there
        (runs((5, 2), (1, 1), (5, 2)), "irregular"),  # equal pieces out of step
        (runs((1, 1), (5, 2), (5, 3)), "irregular"),
        (runs((5, 2), (1, 4), (5, 2)), "gap"),
        (runs((5, 2), (1, 0.005), (5, 2)), "doubled"),
    ],
)
def test_what_is_no_pieces_is_refused(places, why):
    assert reason(places) == why


def test_instance_numbers_tell_missing_slices_from_a_wider_piece():
    places = runs((6, 2), (4, 4))
    assert spacing(places, list(range(11))).count == 15
    assert reason(places, [*range(7), 8, 10, 12, 14]) == "gap"
    assert reason(places) == "gap", "nothing says that none is missing"
    assert spacing(runs((6, 2), (4, 3))).count == 13, "no slice is missing in a gap of 3 mm beside 2"


def test_missing_slices_in_a_row_of_wide_gaps_are_interpolated_if_allowed():
    places, numbers = runs((10, 2.5), (3, 5), (10, 2.5)), [*range(11), 12, 14, 16, *range(17, 27)]
    assert reason(places, numbers) == "gap"
    found = spacing(places, numbers, allow_gaps=True)
    assert found.count == 27
    assert found.warnings[0].startswith("3 ")
    assert "--allow-gaps" in found.warnings[0]


def test_distances_that_would_make_a_grid_without_end_are_refused():
    assert reason(runs((60, 5), (3, 0.02)), list(range(64))) == "irregular"


def test_a_slice_of_rounding_errors_takes_no_part():
    found = spacing(runs((12, 0.7), (8, 2.1)), list(range(21)))
    padding = np.zeros((21, 1, 1), bool)
    padding[6] = True
    _, marks = _resampled(np.zeros((21, 1, 1), np.int16), padding, found.weights)
    assert np.flatnonzero(marks).tolist() == [6]


def test_single_gaps_are_interpolated_exactly_between_two():
    found = spacing(runs((3, 2), (1, 4.01), (3, 2)), allow_gaps=True)
    assert found.nearest == (0, 1, 2, 3, 5, 6, 7, 8)
    assert found.weights[4].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0]
    assert found.weights[5].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert reason(runs((3, 2), (1, 6), (3, 2)), allow_gaps=True) == "gap"
