from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ctflow.core.errors import NotWritten
from ctflow.core.model import Code, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.measurements.measure import measure_segments
from ctflow.measurements.plausibility import place_to_show
from ctflow.report import preview
from ctflow.report.preview import PANEL_PX, draw_preview, write_picture
from ctflow.report.views import COLOURS, oriented_from_volume
from reasons import raises_reason

ANY = Code("1", "99", "any")
RED = (255, 92, 92)  # the first segment's
HEADER_PX, GAP_PX = 64, 12
WIDTH = 3 * PANEL_PX + 4 * GAP_PX


def geometry_from(columns, shape) -> Geometry:
    """A grid around the origin, with the given steps along its axes."""
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(columns)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Geometry(shape, affine)


def sphere(geometry, centre_mm, radius_mm):
    points = geometry.world_from_index(np.stack(np.indices(geometry.shape), axis=-1))
    return ((points - centre_mm) ** 2).sum(axis=-1) < radius_mm**2


@pytest.fixture
def draw(tmp_path):
    def make(labels, geometry, names=None, hu=None, title="model 1", research_only=False, note=""):
        array = np.full(geometry.shape, -850, np.int16) if hu is None else hu
        names = {1: "Tumour"} if names is None else names
        path = tmp_path / "preview.png"
        volume, labels = Volume(array, geometry), labels.astype(np.uint8)
        segments = [Segment(number, "any", ANY, ANY) for number in np.unique(labels[labels > 0]).tolist()]
        at = place_to_show(measure_segments(labels, volume, segments))
        oriented = oriented_from_volume(volume, labels, at)
        picture = draw_preview(oriented, title=title, research_only=research_only, segment_labels=names, note=note)
        write_picture(picture, path)
        return np.asarray(Image.open(path).convert("RGB"))

    return make


def marked_in_panels(picture, colour=RED):
    """For each panel where the colour is: (across, down) pixels from the panel's middle, row and column arrays."""
    bottom = HEADER_PX + PANEL_PX
    found = []
    for index in range(3):
        left = GAP_PX + index * (PANEL_PX + GAP_PX)
        panel = picture[HEADER_PX:bottom, left : left + PANEL_PX]
        down, across = np.nonzero((panel == colour).all(axis=-1))
        found.append((across - PANEL_PX / 2, down - panel.shape[0] / 2))
    return found


TURN = 0.4
CUBE = (60, 60, 60)
GRIDS = {
    "head first": [(0, 0, 3), (0, 3, 0), (3, 0, 0)],
    "feet first": [(0, 0, -3), (0, 3, 0), (-3, 0, 0)],
    "prone": [(0, 0, 3), (0, -3, 0), (-3, 0, 0)],
    "oblique": [(0, -3 * np.sin(TURN), 3 * np.cos(TURN)), (0, 3 * np.cos(TURN), 3 * np.sin(TURN)), (3, 0, 0)],
    "sagittal": [(3, 0, 0), (0, 0, -3), (0, 3, 0)],
    "coronal": [(0, 3, 0), (0, 0, -3), (3, 0, 0)],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_right_is_left_and_anterior_and_head_are_up(draw, grid):
    geometry = geometry_from(GRIDS[grid], CUBE)
    picture = draw(sphere(geometry, (-45, -45, 45), 12), geometry)
    axial, coronal, sagittal = marked_in_panels(picture)
    for across, down in (axial, coronal, sagittal):  # right or anterior; anterior or head
        assert across.mean() < -20
        assert down.mean() < -20
    picture = draw(sphere(geometry, (45, 45, -45), 12), geometry)
    for across, down in marked_in_panels(picture):
        assert across.mean() > 20
        assert down.mean() > 20


def test_the_planes_are_told_apart(draw):
    """Left, anterior and low: each panel shows its own two axes."""
    geometry = geometry_from(GRIDS["head first"], CUBE)
    panels = marked_in_panels(draw(sphere(geometry, (45, -45, -45), 12), geometry))
    signs = [(np.sign(across.mean()), np.sign(down.mean())) for across, down in panels]
    assert signs == [(1, -1), (1, 1), (-1, 1)]


@pytest.mark.parametrize(
    "columns", [[(0, 0, 5), (0, 0.8, 0), (1.6, 0, 0)], [(0, 0, 1.25), (0, 2.5, 0), (1.0, 0, 0)], GRIDS["sagittal"]]
)
def test_a_sphere_looks_round_in_anisotropic_voxels(draw, columns):
    steps = np.abs(columns).max(axis=1)
    shape = tuple(int(n) for n in np.rint(160 / steps))
    geometry = geometry_from(columns, shape)
    for across, down in marked_in_panels(draw(sphere(geometry, (0, 0, 0), 50), geometry)):
        assert np.ptp(across) == pytest.approx(np.ptp(down), rel=0.1)


def test_every_picture_has_the_same_width(draw):
    for shape in (CUBE, (8, 64, 64), (200, 20, 20)):
        geometry = geometry_from(GRIDS["head first"], shape)
        picture = draw(np.zeros(shape), geometry)
        assert picture.shape[1] == WIDTH
        assert PANEL_PX < picture.shape[0] < PANEL_PX + 200


def test_the_same_input_gives_the_same_bytes(draw, tmp_path):
    geometry = geometry_from(GRIDS["oblique"], CUBE)
    labels = sphere(geometry, (10, 20, 30), 20)
    draw(labels, geometry)
    first = (tmp_path / "preview.png").read_bytes()
    draw(labels, geometry)
    assert (tmp_path / "preview.png").read_bytes() == first


def test_the_outline_lies_around_the_mask_and_not_inside(draw):
    geometry = geometry_from(GRIDS["head first"], CUBE)
    labels = np.zeros(CUBE, bool)
    labels[25:35, 20:40, 15:45] = True
    (across, down), *_ = marked_in_panels(draw(labels, geometry))
    scale = PANEL_PX / CUBE[2]
    half_width, half_height = 15 * scale, 10 * scale
    inside = (np.abs(across) < half_width - 3) & (np.abs(down) < half_height - 3)
    outside = (np.abs(across) > half_width + 4) | (np.abs(down) > half_height + 4)
    assert not inside.any()
    assert not outside.any()
    assert len(across) > 2 * (2 * half_width + 2 * half_height)


def test_one_marked_voxel_shows_where_the_picture_shrinks(draw):
    shape = (16, 900, 900)
    geometry = geometry_from([(0, 0, 5), (0, 0.4, 0), (0.4, 0, 0)], shape)
    labels = np.zeros(shape, bool)
    labels[5, 301, 303] = True
    for across, _ in marked_in_panels(draw(labels, geometry)):
        assert len(across) > 0


def test_the_slices_with_most_of_the_largest_finding_are_shown(draw):
    """Not those with most marks: many small findings in a slice do not turn the eye from the largest."""
    geometry = geometry_from(GRIDS["head first"], CUBE)
    labels = np.zeros(CUBE, bool)
    labels[5, 30::2, 30::2] = True
    labels[20:23, 4:10, 4:10] = True
    labels[21, 4:12, 4:12] = True
    for across, _ in marked_in_panels(draw(labels, geometry)):
        assert len(across) > 50
        assert across.mean() < -50
    axial, *_ = marked_in_panels(draw(labels, geometry))
    assert np.ptp(axial[0]) == pytest.approx(8 * PANEL_PX / CUBE[2], abs=8), (
        "its widest slice, and nothing of the others"
    )


def test_a_note_is_written_in_the_colour_of_alarms(draw):
    geometry = geometry_from(GRIDS["head first"], (8, 20, 20))
    loud = [
        (draw(np.zeros(geometry.shape), geometry, note=note)[:HEADER_PX] == preview._ALARM).all(axis=-1).sum()
        for note in ("", "3 of 4 findings are implausible: see the report", "a long note " * 50)
    ]
    assert loud[0] == 0
    assert loud[1] > 300
    assert loud[2] > 300


def legend_of(picture):
    return picture[HEADER_PX + PANEL_PX :]


def test_nothing_marked_is_said(draw):
    geometry = geometry_from(GRIDS["head first"], CUBE)
    empty = draw(np.zeros(CUBE), geometry)
    marked = draw(sphere(geometry, (0, 0, 0), 20), geometry)
    assert not (legend_of(empty) == RED).all(axis=-1).any()
    assert (legend_of(marked) == RED).all(axis=-1).any()
    wordy = [(legend_of(picture) > 200).all(axis=-1).sum() for picture in (empty, marked)]
    assert wordy[0] > 2 * wordy[1], "a whole sentence"
    assert all(len(across) > 50 for across, _ in marked_in_panels(empty, preview._ALARM))
    assert all(len(across) == 0 for across, _ in marked_in_panels(marked, preview._ALARM))


def test_a_mark_without_a_name_is_not_called_nothing(draw):
    geometry = geometry_from(GRIDS["head first"], CUBE)
    picture = draw(sphere(geometry, (0, 0, 0), 20), geometry, names={})
    assert (legend_of(picture) == RED).all(axis=-1).any()


def test_research_only_is_said_beside_any_title(draw):
    geometry = geometry_from(GRIDS["head first"], (8, 20, 20))
    notice = []
    for title, research_only in (("m", True), ("m" * 300 + "\n\x00", True), ("m", False)):
        picture = draw(np.zeros(geometry.shape), geometry, title=title, research_only=research_only)
        notice.append((picture[:HEADER_PX] == preview._ALARM).all(axis=-1))
    assert notice[0].sum() > 300
    assert np.array_equal(notice[0], notice[1])
    assert not notice[2].any()


def test_many_segments_are_listed_in_rows_and_the_rest_counted(draw):
    shape = (20, 60, 60)
    geometry = geometry_from(GRIDS["head first"], shape)
    heights = []
    for count in (1, 14, 200):
        labels = np.zeros(shape, np.uint8)
        labels[10].flat[: 2 * count] = np.repeat(np.arange(1, count + 1), 2)
        names = {number: f"Structure number {number}" for number in range(1, count + 1)}
        heights.append(len(draw(labels, geometry, names)))
    assert heights[0] < heights[1] < heights[2] < heights[0] + 200
    places = preview._legend_places([(n, f"Structure number {n}") for n in range(1, 201)], WIDTH)
    assert places[-1][:2] == (0, f"and {200 - len(places) + 1} more")
    assert max(x for _, _, x, _ in places) < WIDTH - 100
    colours = {COLOURS[number - 1] for number in range(1, 15)}
    assert len(colours) == 14


def test_segments_have_their_own_colours(draw):
    geometry = geometry_from(GRIDS["head first"], CUBE)
    labels = np.where(sphere(geometry, (-40, 0, 0), 20), 1, 0) + np.where(sphere(geometry, (40, 0, 0), 22), 2, 0)
    picture = draw(labels, geometry, {1: "One", 2: "Two"})
    assert marked_in_panels(picture, COLOURS[0])[0][0].max() < 0
    assert marked_in_panels(picture, COLOURS[1])[0][0].min() > 0


def test_float_values_and_the_lung_window(draw):
    shape = (20, 40, 40)
    geometry = geometry_from(GRIDS["head first"], shape)
    hu = np.full(shape, -600.0, np.float32)
    hu[:, :, 20:] = 3000
    picture = draw(np.zeros(shape), geometry, hu=hu)
    row = picture[HEADER_PX + PANEL_PX // 4, GAP_PX : GAP_PX + PANEL_PX, 0].astype(int)
    assert row[PANEL_PX // 4] == pytest.approx(127, abs=1)
    assert row[3 * PANEL_PX // 4] == 255


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with raises_reason(NotWritten, "unwritable", names="preview.png"):
        write_picture(np.zeros((4, 4, 3), np.uint8), tmp_path / "absent" / "preview.png")
