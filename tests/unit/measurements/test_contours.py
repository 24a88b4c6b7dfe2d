"""Outlines of masks, and the one line that leads around a region and its holes."""

from __future__ import annotations

import numpy as np
import pytest
from shapely import Polygon, make_valid

from ctflow.measurements.components import without_small
from ctflow.measurements.contours import SIMPLIFIED_MM, Outline, Probabilities, keyhole, outlines_of_labels

SQUARE = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], float)


def test_a_pixel_is_outlined_halfway_to_its_neighbours():
    labels = np.zeros((2, 5, 6), np.uint8)
    labels[1, 2, 3] = 7
    (outline,) = outlines_of_labels(labels, (2.0, 3.0))
    assert (outline.number, outline.plane, outline.holes) == (7, 1, ())
    assert {tuple(point) for point in outline.outer.tolist()} == {(7.5, 4), (9, 5), (10.5, 4), (9, 3)}


def test_a_mask_at_the_side_of_a_slice_is_closed_beyond_it():
    (outline,) = outlines_of_labels(np.ones((1, 4, 5), np.uint8), (1.0, 1.0))
    assert outline.outer.min(axis=0).tolist() == [-0.5, -0.5]
    assert outline.outer.max(axis=0).tolist() == [4.5, 3.5]


def test_outlines_come_by_label_and_slice():
    labels = np.zeros((3, 8, 8), np.uint16)
    labels[:, 1:3, 1:3], labels[1:, 5:7, 5:7] = 300, 2
    found = [(outline.number, outline.plane) for outline in outlines_of_labels(labels, (1.0, 1.0))]
    assert found == [(2, 1), (2, 2), (300, 0), (300, 1), (300, 2)]
    assert outlines_of_labels(np.zeros((3, 8, 8), np.uint8), (1.0, 1.0)) == []


def test_a_circle_keeps_its_shape_with_fewer_points():
    h, w = np.indices((400, 400)) * 0.2
    distance = np.hypot(h - 40, w - 40)
    fractions = np.clip(np.round(127.5 + (20 - distance) * 40), 0, 255).astype(np.uint8)[None, None]
    labels = (fractions[0] > 127).astype(np.uint8)
    (outline,) = outlines_of_labels(labels, (0.2, 0.2), Probabilities(fractions))
    assert np.abs(np.hypot(*(outline.outer - 40).T) - 20).max() < 0.03, "the points that are left lie on the circle"
    assert Polygon(outline.outer).hausdorff_distance(Polygon(circle())) < SIMPLIFIED_MM + 0.03
    assert len(outline.outer) < 100


def circle() -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 1000)
    return 40 + 20 * np.column_stack([np.cos(angles), np.sin(angles)])


def test_one_segment_is_outlined_at_the_models_threshold():
    labels = np.zeros((1, 5, 9), np.uint8)
    labels[0, 1:4, 1:5] = 1
    fractions = np.where(labels == 1, 255, 0)[None].astype(np.uint8)
    (outline,) = outlines_of_labels(labels, (1.0, 1.0), Probabilities(fractions, 0.2))
    assert outline.outer[:, 0].max() == pytest.approx(4.8)


def test_what_the_mask_says_wins_over_probabilities():
    labels = np.zeros((1, 5, 5), np.uint8)
    labels[0, 1:4, 1:4] = 1
    fractions = np.full((2, 1, 5, 5), 100, np.uint8)
    (outline,) = outlines_of_labels(labels, (1.0, 1.0), Probabilities(fractions))
    region = Polygon(outline.outer)
    centres = [(w, h) for h in range(5) for w in range(5) if region.contains(Polygon(square_at(w, h)))]
    assert centres == [(w, h) for h in range(1, 4) for w in range(1, 4)]


def square_at(w: float, h: float) -> np.ndarray:
    return np.array([w, h]) + 0.001 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])


@pytest.mark.parametrize(
    "corners",
    [
        [(2, 2)],
        [(2, 2), (6, 2)],  # one beside the other: a channel ends at the hole before
        [(2, 6), (2, 2)],  # one above the other
        [(2, 2), (4, 4), (6, 6), (6, 2), (2, 6)],
    ],
)
def test_a_keyhole_encloses_what_its_outline_does(corners):
    holes = tuple(
        np.array([(x, y + 1), (x + 1, y), (x, y), (x + 1, y + 1)])[[2, 1, 3, 0]].astype(float) for x, y in corners
    )
    line = keyhole(Outline(1, 0, SQUARE, holes))
    region = Polygon(SQUARE, holes)
    assert make_valid(Polygon(line)).symmetric_difference(region).area == pytest.approx(0, abs=1e-9)
    x, y = line.T
    assert abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 >= region.area - 1e-9
    for hole in holes:
        assert {tuple(point) for point in hole.tolist()} <= {tuple(point) for point in line.tolist()}


def test_small_components_go_and_nothing_else_changes():
    labels = np.zeros((6, 20, 20), np.uint16)
    labels[1:3, 2:5, 2:5] = 1  # 18 voxels
    labels[3, 5, 5] = 1  # touches it at a corner
    labels[5, 1, 1] = labels[5, 19, 19] = 1
    labels[0, 10, 10:15] = 300
    kept, gone = without_small(labels, 5)
    assert gone == 2
    assert kept[5].sum() == 0
    assert np.array_equal(kept[:5], labels[:5])
    assert labels[5].any(), "it is not changed"
    same, none = without_small(labels, 1)
    assert (same is labels, none) == (True, 0)
    assert without_small(np.zeros((2, 3, 4), np.uint8), 5)[1] == 0
