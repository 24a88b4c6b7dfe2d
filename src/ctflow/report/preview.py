"""preview.png: the largest plausible finding in three planes, as a radiologist expects them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ctflow.core.atomic import write_atomically
from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY
from ctflow.report.views import COLOURS, PLANES, Grey, Oriented, Plane, picture_of_slice

WINDOW_CENTRE_HU, WINDOW_WIDTH_HU = -600.0, 1500.0  # the usual lung window
PANEL_PX = 440
_GAP_PX, _HEADER_PX, _LEGEND_ROW_PX, _LEGEND_ROWS = 12, 64, 30, 4
_BACKGROUND, _INK, _DIM, _ALARM = (12, 14, 18), (236, 238, 242), (150, 156, 166), (255, 196, 60)
_OUTLINE_PX = 2
_THUMBNAIL_PX = 600


def draw_preview(
    oriented: Oriented, *, title: str, research_only: bool, segment_labels: Mapping[int, str], note: str = ""
) -> Grey:
    """Draw axial, coronal and sagittal slices with the outlines of the segments.

    Args:
        oriented: The CT, its labels, and the slices to show.
        title: The model's name.
        research_only: Whether the picture must say that it is not for clinical use.
        segment_labels: Names of the label values.
        note: A warning that belongs on the picture.

    Returns:
        (rows, columns, 3) uint8, RGB. It holds no patient data: only positions in the patient, and the model.
    """
    panels = [_panel(oriented, plane) for plane in PLANES]
    height = max(panel.height for panel in panels)
    width = sum(panel.width for panel in panels) + _GAP_PX * (len(panels) + 1)
    legend = _legend_places([(n, segment_labels.get(n, f"segment {n}")) for n in oriented.present], width)
    rows = 1 + max((row for _, _, _, row in legend), default=0)
    canvas = Image.new("RGB", (width, _HEADER_PX + height + rows * _LEGEND_ROW_PX + 2 * _GAP_PX), _BACKGROUND)
    left = _GAP_PX
    for panel in panels:
        canvas.paste(panel, (left, _HEADER_PX + (height - panel.height) // 2))
        left += panel.width + _GAP_PX
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, width, title, research_only, note)
    _draw_legend(draw, _HEADER_PX + height + _GAP_PX, legend)
    return np.array(canvas)


def write_picture(picture: Grey, path: Path) -> None:
    """Write a PNG.

    Args:
        picture: (rows, columns, 3) uint8, RGB.
        path: The file.

    Raises:
        OutputError: It cannot be written.
    """
    image = Image.fromarray(picture)
    # Level 6 takes twice as long for a hundredth less.
    write_atomically(path, lambda stream: image.save(stream, format="PNG", compress_level=3))


def thumbnail_from_preview(png: bytes) -> bytes | None:
    """A small JPEG of a picture that `draw_preview` drew, without its header.

    Args:
        png: The file's content.

    Returns:
        The file's content; None if the picture is damaged.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            below = image.convert("RGB").crop((0, _HEADER_PX, image.width, image.height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    below.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    below.save(small, format="JPEG", quality=72, optimize=True)
    return small.getvalue()


def _panel(oriented: Oriented, plane: Plane) -> Image.Image:
    spacing_mm, marks = oriented.geometry.spacing_mm, bool(oriented.present)
    index = oriented.shown[plane.through]
    grey = _windowed(picture_of_slice(oriented.hu, plane, index))
    across_mm = grey.shape[1] * spacing_mm[plane.across]
    down_mm = grey.shape[0] * spacing_mm[plane.down]
    scale = PANEL_PX / max(across_mm, down_mm)  # pixels per millimetre
    size = (max(round(across_mm * scale), 1), max(round(down_mm * scale), 1))
    # Not bicubic: it draws dark rims around nodules in thick slices, which look like findings.
    image = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
    if marks:
        _draw_outlines(image, picture_of_slice(oriented.labels, plane, index))
    panel = Image.new("RGB", (PANEL_PX, max(size[1], PANEL_PX // 2)), (0, 0, 0))
    panel.paste(image, ((PANEL_PX - size[0]) // 2, (panel.height - size[1]) // 2))
    middle = [(count - 1) / 2 for count in oriented.geometry.shape]
    middle[plane.through] = index
    position = float(oriented.geometry.world_from_index(middle)[plane.through])
    _annotate(panel, plane, position, scale, nothing=not marks)
    return panel


def _windowed(hu: npt.NDArray[np.generic]) -> Grey:
    low = WINDOW_CENTRE_HU - WINDOW_WIDTH_HU / 2
    scaled = (hu.astype(np.float32) - low) * (255.0 / WINDOW_WIDTH_HU)
    grey: Grey = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return grey


def _draw_outlines(image: Image.Image, marked: npt.NDArray[np.generic]) -> None:
    """A line around each segment, smooth at the picture's resolution, so that the image below stays visible."""
    for number in np.unique(marked[marked != 0]).tolist():
        inside = _enlarged(marked == number, image.size)
        edge = ndimage.binary_dilation(inside, iterations=_OUTLINE_PX) & ~inside
        soft = Image.fromarray(np.where(edge, 255, 0).astype(np.uint8))
        image.paste(COLOURS[(number - 1) % len(COLOURS)], (0, 0), soft)


def _enlarged(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """The mask on a picture of `size` (width, height); where that is smaller, a single marked pixel still shows."""
    picture = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    inside = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) >= 128
    down, across = np.nonzero(mask)
    scale = (size[1] / mask.shape[0], size[0] / mask.shape[1])
    inside[((down + 0.5) * scale[0]).astype(int), ((across + 0.5) * scale[1]).astype(int)] = True
    return inside


def _annotate(panel: Image.Image, plane: Plane, position_mm: float, scale: float, *, nothing: bool) -> None:
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
    for colour, thick in (((0, 0, 0), 3), (_INK, 1)):  # a black rim, visible also on white
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


def _draw_header(draw: ImageDraw.ImageDraw, width: int, title: str, research_only: bool, note: str) -> None:
    notice = RESEARCH_ONLY if research_only else ""
    room = width - round(draw.textlength(notice, font=font_of(20))) - 4 * _GAP_PX
    _text(draw, (_GAP_PX + 2, 14), shortened(title, 20, room), 20, "lt")
    window = f"lung window {WINDOW_CENTRE_HU:.0f} / {WINDOW_WIDTH_HU:.0f} HU"
    _text(draw, (_GAP_PX + 2, 40), window, 13, "lt", _DIM)
    _text(draw, (width - _GAP_PX - 2, 14), notice, 20, "rt", _ALARM)
    left = 2 * _GAP_PX + round(font_of(13).getlength(window))
    _text(draw, (width - _GAP_PX - 2, 40), shortened(note, 15, width - left - _GAP_PX), 15, "rt", _ALARM)


def _legend_places(segments: list[tuple[int, str]], width: int) -> list[tuple[int, str, int, int]]:
    """Label value (0: no colour), text, x and row of each entry; the last gives the number that did not fit."""
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
            colour = COLOURS[(number - 1) % len(COLOURS)]
            draw.rectangle([(left, middle - 8), (left + 16, middle + 8)], outline=colour, width=3)
            _text(draw, (left + 26, middle), words, 15, "lm")
        else:
            _text(draw, (left, middle), words, 15, "lm", _DIM)
    if not places:
        _text(draw, (_GAP_PX + 2, top + _LEGEND_ROW_PX // 2), NOTHING_MARKED, 15, "lm")


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, for the same picture on every machine.

    Args:
        size: Height in pixels.
    """
    return ImageFont.load_default(size)


def shortened(words: str, size: int, room_px: float) -> str:
    """One line that fits, without control characters.

    Args:
        words: Any text.
        size: The font's height in pixels.
        room_px: Largest length of the line.
    """
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    if font_of(size).getlength(words) <= room_px:
        return words
    while words and font_of(size).getlength(f"{words}...") > room_px:
        words = words[:-1]
    return f"{words}..."
