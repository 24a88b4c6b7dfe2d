"""preview.png: the slices with the largest marked area, in three planes, as a radiologist expects them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ctflow.atomic import write_atomically
from ctflow.volume import Volume

WINDOW_CENTRE_HU, WINDOW_WIDTH_HU = -600.0, 1500.0  # the usual lung window
PANEL_PX = 440
_GAP_PX, _HEADER_PX, _FOOTER_PX = 12, 64, 56
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
)
_OUTLINE_PX = 2

Grey = npt.NDArray[np.uint8]


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
    """Arrays turned so that axes 0, 1, 2 run to the patient's left, posterior and superior, by nearest axis."""

    hu: npt.NDArray[np.generic]
    labels: Grey
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]


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
    oriented = _orient(volume, labels)
    panels = [_panel(oriented, plane) for plane in _PLANES]
    height = max(panel.height for panel in panels)
    width = sum(panel.width for panel in panels) + _GAP_PX * (len(panels) + 1)
    canvas = Image.new("RGB", (width, height + _HEADER_PX + _FOOTER_PX), _BACKGROUND)
    left = _GAP_PX
    for panel in panels:
        canvas.paste(panel, (left, _HEADER_PX + (height - panel.height) // 2))
        left += panel.width + _GAP_PX
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, width, title, research_only)
    _draw_legend(draw, canvas.height - _FOOTER_PX, labels, segment_labels)
    write_atomically(path, lambda stream: canvas.save(stream, format="PNG", compress_level=6))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _orient(volume: Volume, labels: Grey) -> _Oriented:
    directions = volume.geometry.directions  # a column an array axis
    order = _nearest_axes(directions)
    flips = tuple(axis for axis, source in enumerate(order) if directions[axis, source] < 0)
    spacing = volume.geometry.spacing_mm
    corner = [0 if axis not in flips else volume.array.shape[source] - 1 for axis, source in enumerate(order)]
    index = [0, 0, 0]
    for axis, source in enumerate(order):
        index[source] = corner[axis]
    x, y, z = volume.geometry.world_from_index(index)
    return _Oriented(
        np.flip(volume.array.transpose(order), flips),
        np.flip(labels.transpose(order), flips),
        (spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        (float(x), float(y), float(z)),
    )


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
    areas = (oriented.labels != 0).sum(axis=(plane.across, plane.down), dtype=np.int64)
    index = int(areas.argmax()) if areas.any() else oriented.labels.shape[through] // 2
    grey = _windowed(_slice(oriented.hu, plane, through, index))
    marked = _slice(oriented.labels, plane, through, index)
    across_mm = grey.shape[1] * oriented.spacing_mm[plane.across]
    down_mm = grey.shape[0] * oriented.spacing_mm[plane.down]
    scale = PANEL_PX / max(across_mm, down_mm)  # pixels a millimetre
    size = (max(round(across_mm * scale), 1), max(round(down_mm * scale), 1))
    image = Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    _draw_outlines(image, marked)
    panel = Image.new("RGB", (PANEL_PX, max(size[1], PANEL_PX // 2)), (0, 0, 0))
    panel.paste(image, ((PANEL_PX - size[0]) // 2, (panel.height - size[1]) // 2))
    position = oriented.origin_mm[through] + index * oriented.spacing_mm[through]
    _annotate(panel, plane, position, scale, nothing=not oriented.labels.any())
    return panel


def _slice(array: npt.NDArray[np.generic], plane: _Plane, through: int, index: int) -> npt.NDArray[np.generic]:
    """(down, across) picture of one slice."""
    picture = np.take(array, index, axis=through)
    if plane.across < plane.down:
        picture = picture.T
    upright: npt.NDArray[np.generic] = picture[::-1] if plane.down_sign < 0 else picture
    return upright


def _windowed(hu: npt.NDArray[np.generic]) -> Grey:
    low = WINDOW_CENTRE_HU - WINDOW_WIDTH_HU / 2
    scaled = (hu.astype(np.float32) - low) * (255.0 / WINDOW_WIDTH_HU)
    return np.ascontiguousarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _draw_outlines(image: Image.Image, marked: npt.NDArray[np.generic]) -> None:
    """A line around each segment, smooth at the picture's resolution, so that what lies below stays visible."""
    for number in np.unique(marked[marked != 0]).tolist():
        mask = Image.fromarray(np.ascontiguousarray(np.where(marked == number, 255, 0).astype(np.uint8)))
        level = np.asarray(mask.resize(image.size, Image.Resampling.BILINEAR)).astype(np.float32) / 255
        inside = level >= 0.5
        edge = _grown(inside, _OUTLINE_PX) & ~inside
        soft = Image.fromarray(np.where(edge, 255, 0).astype(np.uint8))
        image.paste(_COLOURS[(number - 1) % len(_COLOURS)], (0, 0), soft)


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
    draw.line([(start, base), (end, base)], fill=_INK, width=2)
    for x in (start, end):
        draw.line([(x, base - 5), (x, base + 5)], fill=_INK, width=2)
    _text(draw, (start, base - 8), f"{length_mm} mm", 13, "lb")


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    words: str,
    size: int,
    anchor: str,
    fill: tuple[int, int, int] = _INK,
) -> None:
    draw.text(place, words, font=_font(size), anchor=anchor, fill=fill, stroke_width=2, stroke_fill=(0, 0, 0))


def _draw_header(draw: ImageDraw.ImageDraw, width: int, title: str, research_only: bool) -> None:
    _text(draw, (_GAP_PX + 2, 14), title, 20, "lt")
    window = f"lung window {WINDOW_CENTRE_HU:.0f} / {WINDOW_WIDTH_HU:.0f} HU"
    _text(draw, (_GAP_PX + 2, 40), window, 13, "lt", _DIM)
    if research_only:
        _text(draw, (width - _GAP_PX - 2, 20), "RESEARCH ONLY - NOT FOR CLINICAL USE", 20, "rt", _ALARM)


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, labels: Grey, names: Mapping[int, str]) -> None:
    left, middle = _GAP_PX + 2, top + _FOOTER_PX // 2
    present = [number for number in range(1, 256) if number in names and (labels == number).any()]
    for number in present[:10]:
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        draw.rectangle([(left, middle - 8), (left + 16, middle + 8)], outline=colour, width=3)
        _text(draw, (left + 26, middle), names[number], 15, "lm")
        left += 26 + round(draw.textlength(names[number], font=_font(15))) + 28
    if not present:
        _text(draw, (left, middle), "The algorithm marked nothing, which does not exclude disease.", 15, "lm")
    elif len(present) > 10:
        _text(draw, (left, middle), f"and {len(present) - 10} more", 15, "lm", _DIM)
