"""preview.png: the slices with the largest marked area, in three planes, as a radiologist expects them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ctflow.atomic import write_atomically
from ctflow.model import NOTHING_MARKED, RESEARCH_ONLY
from ctflow.report.lettering import font_of, shortened
from ctflow.volume import Geometry, Volume

WINDOW_CENTRE_HU, WINDOW_WIDTH_HU = -600.0, 1500.0  # the usual lung window
PANEL_PX = 440
_GAP_PX, _HEADER_PX, _LEGEND_ROW_PX, _LEGEND_ROWS = 12, 64, 30, 4
_BACKGROUND, _INK, _DIM, _ALARM = (12, 14, 18), (236, 238, 242), (150, 156, 166), (255, 196, 60)
_COLOURS = (
    (255, 92, 92),
    (92, 200, 255),
    (140, 230, 120),
    (255, 190, 80),
    (210, 140, 255),
    (255, 140, 200),
    (110, 235, 215),
    (225, 225, 110),
    (120, 150, 255),
    (200, 120, 60),
    (60, 170, 120),
    (190, 80, 150),
    (160, 100, 80),
    (120, 190, 200),
    (170, 160, 60),
    (200, 190, 255),
)
_OUTLINE_PX = 2

Grey = npt.NDArray[np.uint8]
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Plane:
    """One view: which patient axes run across and down the picture, and the letters at its borders."""

    name: str
    across: int  # patient axis: 0 left, 1 posterior, 2 superior
    down: int
    down_sign: int
    letters: tuple[str, str, str, str]  # left, right, top, bottom of the picture
    position: str


# Patient right on the picture's left, anterior up in axial views, head up in the others.
_PLANES = (
    _Plane("axial", 0, 1, 1, ("R", "L", "A", "P"), "S"),
    _Plane("coronal", 0, 2, -1, ("R", "L", "H", "F"), "P"),
    _Plane("sagittal", 1, 2, -1, ("A", "P", "H", "F"), "L"),
)


@dataclass(frozen=True, eq=False)
class _Oriented:
    """Views turned so that axes 0, 1, 2 run to the patient's left, posterior and superior, by nearest axis.

    Attributes:
        hu: Values.
        labels: Label values.
        geometry: Where the turned arrays lie.
        areas: Marked voxels of every slice across axis 0, 1 and 2.
    """

    hu: npt.NDArray[np.generic]
    labels: Grey
    geometry: Geometry
    areas: tuple[_Counts, _Counts, _Counts]


def write_preview(
    volume: Volume,
    labels: Grey,
    path: Path,
    *,
    title: str,
    research_only: bool,
    segment_labels: Mapping[int, str],
) -> None:
    """Draw axial, coronal and sagittal slices with the outlines of what was marked.

    Args:
        volume: CT in HU.
        labels: (D, H, W), 0 is background.
        path: The PNG.
        title: The model's name.
        research_only: Whether the picture must say that it is not for clinical use.
        segment_labels: Names of the label values.

    Raises:
        OutputError: The file cannot be written.
    """
    areas, present = _marked(labels)
    oriented = _orient(volume, labels, areas)
    panels = [_panel(oriented, plane) for plane in _PLANES]
    height = max(panel.height for panel in panels)
    width = sum(panel.width for panel in panels) + _GAP_PX * (len(panels) + 1)
    legend = _legend_places([(n, segment_labels.get(n, f"segment {n}")) for n in present], width)
    rows = 1 + max((row for _, _, _, row in legend), default=0)
    canvas = Image.new("RGB", (width, _HEADER_PX + height + rows * _LEGEND_ROW_PX + 2 * _GAP_PX), _BACKGROUND)
    left = _GAP_PX
    for panel in panels:
        canvas.paste(panel, (left, _HEADER_PX + (height - panel.height) // 2))
        left += panel.width + _GAP_PX
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, width, title, research_only)
    _draw_legend(draw, _HEADER_PX + height + _GAP_PX, legend)
    write_atomically(path, lambda stream: canvas.save(stream, format="PNG", compress_level=6))


def _marked(labels: Grey) -> tuple[tuple[_Counts, _Counts, _Counts], list[int]]:
    """Marked voxels of every slice across each array axis, and the label values that occur.

    Slice by slice along the first axis, where the memory is contiguous: reductions over turned views take seconds.
    """
    depth, rows, columns = labels.shape
    across_depth, through = np.zeros(depth, np.int64), np.zeros((rows, columns), np.int32)
    occurs = np.zeros(256, np.int64)
    for index, picture in enumerate(labels):
        mask = picture != 0
        across_depth[index] = np.count_nonzero(mask)
        if across_depth[index]:
            through += mask
            occurs += np.bincount(picture[mask], minlength=256)
    return (across_depth, through.sum(axis=1), through.sum(axis=0)), np.flatnonzero(occurs).tolist()


def _orient(volume: Volume, labels: Grey, areas: tuple[_Counts, _Counts, _Counts]) -> _Oriented:
    directions = volume.geometry.directions  # a column an array axis
    order = _nearest_axes(directions)
    flips = tuple(axis for axis, source in enumerate(order) if directions[axis, source] < 0)
    hu = np.flip(volume.array.transpose(order), flips)
    turn = np.zeros((4, 4))  # turned index -> array index
    turn[3, 3] = 1
    for axis, source in enumerate(order):
        turn[source, axis] = -1 if axis in flips else 1
        turn[source, 3] = hu.shape[axis] - 1 if axis in flips else 0
    left, posterior, superior = (
        areas[source][::-1] if axis in flips else areas[source] for axis, source in enumerate(order)
    )
    geometry = Geometry((hu.shape[0], hu.shape[1], hu.shape[2]), volume.geometry.affine_mm @ turn)
    return _Oriented(hu, np.flip(labels.transpose(order), flips), geometry, (left, posterior, superior))


def _nearest_axes(directions: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    """For each patient axis (left, posterior, superior) the array axis that runs along it best."""
    strength = np.abs(directions)
    order = [0, 0, 0]
    for _ in range(3):
        patient, axis = np.unravel_index(int(strength.argmax()), strength.shape)
        order[int(patient)] = int(axis)
        strength[patient] = -1
        strength[:, axis] = -1
    return order[0], order[1], order[2]


def _panel(oriented: _Oriented, plane: _Plane) -> Image.Image:
    through = 3 - plane.across - plane.down
    areas, spacing_mm = oriented.areas[through], oriented.geometry.spacing_mm
    marks = bool(areas.any())
    index = int(areas.argmax()) if marks else len(areas) // 2
    grey = _windowed(_slice(oriented.hu, plane, through, index))
    across_mm = grey.shape[1] * spacing_mm[plane.across]
    down_mm = grey.shape[0] * spacing_mm[plane.down]
    scale = PANEL_PX / max(across_mm, down_mm)  # pixels a millimetre
    size = (max(round(across_mm * scale), 1), max(round(down_mm * scale), 1))
    # Not bicubic: it draws dark rims around nodules in thick slices, which look like findings.
    image = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    if marks:
        _draw_outlines(image, _slice(oriented.labels, plane, through, index))
    panel = Image.new("RGB", (PANEL_PX, max(size[1], PANEL_PX // 2)), (0, 0, 0))
    panel.paste(image, ((PANEL_PX - size[0]) // 2, (panel.height - size[1]) // 2))
    middle = [(count - 1) / 2 for count in oriented.geometry.shape]
    middle[through] = index
    position = float(oriented.geometry.world_from_index(middle)[through])
    _annotate(panel, plane, position, scale, nothing=not marks)
    return panel


def _slice(array: npt.NDArray[np.generic], plane: _Plane, through: int, index: int) -> npt.NDArray[np.generic]:
    """(down, across) picture of one slice."""
    whole = slice(None)
    picture = array[tuple(index if axis == through else whole for axis in range(3))]
    if plane.across < plane.down:
        picture = picture.T
    upright: npt.NDArray[np.generic] = np.ascontiguousarray(picture[::-1] if plane.down_sign < 0 else picture)
    return upright


def _windowed(hu: npt.NDArray[np.generic]) -> Grey:
    low = WINDOW_CENTRE_HU - WINDOW_WIDTH_HU / 2
    scaled = (hu.astype(np.float32) - low) * (255.0 / WINDOW_WIDTH_HU)
    grey: Grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return grey


def _draw_outlines(image: Image.Image, marked: npt.NDArray[np.generic]) -> None:
    """A line around each segment, smooth at the picture's resolution, so that what lies below stays visible."""
    for number in np.unique(marked[marked != 0]).tolist():
        inside = _enlarged(marked == number, image.size)
        edge = _grown(inside, _OUTLINE_PX) & ~inside
        soft = Image.fromarray(np.where(edge, 255, 0).astype(np.uint8))
        image.paste(_COLOURS[(number - 1) % len(_COLOURS)], (0, 0), soft)


def _enlarged(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask on a picture of `size` (width, height); where that is smaller, a single marked pixel still shows."""
    picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    inside = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) >= 128
    down, across = np.nonzero(mask)
    scale = (size[1] / mask.shape[0], size[0] / mask.shape[1])
    inside[((down + 0.5) * scale[0]).astype(int), ((across + 0.5) * scale[1]).astype(int)] = True
    return inside


def _grown(mask: npt.NDArray[np.bool_], steps: int) -> npt.NDArray[np.bool_]:
    for _ in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        grown[:, 1:] |= mask[:, :-1]
        grown[:, :-1] |= mask[:, 1:]
        mask = grown
    return mask


def _annotate(panel: Image.Image, plane: _Plane, position_mm: float, scale: float, *, nothing: bool) -> None:
    draw = ImageDraw.Draw(panel)
    width, height = panel.size
    left, right, top, bottom = plane.letters
    _text(draw, (10, height // 2), left, 18, "lm")
    _text(draw, (width - 10, height // 2), right, 18, "rm")
    _text(draw, (width // 2, 8), top, 18, "mt")
    _text(draw, (width // 2, height - 8), bottom, 18, "mb")
    _text(draw, (10, 8), f"{plane.name}  {plane.position} {position_mm:+.1f} mm", 14, "lt")
    if nothing:
        _text(draw, (10, 28), "nothing marked", 14, "lt", _ALARM)
    length_mm = next(mm for mm in (100, 50, 20, 10, 5) if mm * scale <= width * 0.4 or mm == 5)
    start, base = 12, height - 14
    end = start + round(length_mm * scale)
    for colour, thick in (((0, 0, 0), 3), (_INK, 1)):  # a black rim, to be seen on white as well
        draw.rectangle([(start - thick + 1, base - thick + 1), (end + thick - 1, base + thick - 1)], fill=colour)
        for x in (start, end):
            draw.rectangle([(x - thick + 1, base - 4 - thick), (x + thick - 1, base + 4 + thick)], fill=colour)
    _text(draw, (start, base - 8), f"{length_mm} mm", 13, "lb")


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    words: str,
    size: int,
    anchor: str,
    fill: tuple[int, int, int] = _INK,
) -> None:
    draw.text(place, words, font=font_of(size), anchor=anchor, fill=fill, stroke_width=2, stroke_fill=(0, 0, 0))


def _draw_header(draw: ImageDraw.ImageDraw, width: int, title: str, research_only: bool) -> None:
    notice = RESEARCH_ONLY if research_only else ""
    room = width - round(draw.textlength(notice, font=font_of(20))) - 4 * _GAP_PX
    _text(draw, (_GAP_PX + 2, 14), shortened(title, 20, room), 20, "lt")
    window = f"lung window {WINDOW_CENTRE_HU:.0f} / {WINDOW_WIDTH_HU:.0f} HU"
    _text(draw, (_GAP_PX + 2, 40), window, 13, "lt", _DIM)
    _text(draw, (width - _GAP_PX - 2, 20), notice, 20, "rt", _ALARM)


def _legend_places(segments: list[tuple[int, str]], width: int) -> list[tuple[int, str, int, int]]:
    """Label value (0: no colour), words, x and row of each entry; the last says how many had no room."""
    places: list[tuple[int, str, int, int]] = []
    left, row = _GAP_PX + 2, 0
    more_px = 120
    for count, (number, name) in enumerate(segments):
        words = shortened(name, 15, 300)
        length = 26 + round(font_of(15).getlength(words)) + 28
        if left + length > width - (more_px if row == _LEGEND_ROWS - 1 else 0):
            left, row = _GAP_PX + 2, row + 1
        if row == _LEGEND_ROWS:
            x = places[-1][2] + 26 + round(font_of(15).getlength(places[-1][1])) + 28
            return [*places, (0, f"and {len(segments) - count} more", x, row - 1)]
        places.append((number, words, left, row))
        left += length
    return places


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, places: list[tuple[int, str, int, int]]) -> None:
    for number, words, left, row in places:
        middle = top + row * _LEGEND_ROW_PX + _LEGEND_ROW_PX // 2
        if number:
            colour = _COLOURS[(number - 1) % len(_COLOURS)]
            draw.rectangle([(left, middle - 8), (left + 16, middle + 8)], outline=colour, width=3)
            _text(draw, (left + 26, middle), words, 15, "lm")
        else:
            _text(draw, (left, middle), words, 15, "lm", _DIM)
    if not places:
        _text(draw, (_GAP_PX + 2, top + _LEGEND_ROW_PX // 2), NOTHING_MARKED, 15, "lm")
