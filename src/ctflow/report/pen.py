"""Lines, words and boxes on a picture, with smooth edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ctflow.core.atomic import write_atomically
from ctflow.report.lettering import font_of, shortened

Colour = tuple[int, int, int]
PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 33, 42)
DIM: Colour = (104, 112, 124)
GRID: Colour = (224, 228, 234)
FRAME: Colour = (150, 158, 170)
_FINE = 3  # drawn this much larger and then reduced, which smooths every edge


class Pen:
    """A white picture, and what is drawn on it, in the picture's pixels.

    Args:
        width_px: Its width.
        height_px: Its height.
    """

    def __init__(self, width_px: int, height_px: int) -> None:
        self._size = (width_px, height_px)
        self._canvas = Image.new("RGB", (width_px * _FINE, height_px * _FINE), PAPER)
        self._draw = ImageDraw.Draw(self._canvas, "RGBA")

    def words(
        self, x: float, y: float, words: str, size: int, anchor: str = "ls", fill: Colour = INK, *, bold: bool = False
    ) -> None:
        """One line; the font has no bold cut, so a thin rim of its own colour stands in."""
        place, rim = (x * _FINE, y * _FINE), 0.35 * _FINE if bold else 0
        self._draw.text(place, words, font=font_of(size * _FINE), anchor=anchor, fill=fill, stroke_width=rim)

    def line(self, points: Sequence[tuple[float, float]], fill: Colour, width: float = 1.0) -> None:
        """A line through points."""
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        self._draw.line(fine, fill=fill, width=max(round(width * _FINE), 1))

    def box(self, left: float, top: float, right: float, bottom: float, fill: Colour) -> None:
        """A filled rectangle."""
        self._draw.rectangle([left * _FINE, top * _FINE, right * _FINE, bottom * _FINE], fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: tuple[int, int, int, int]) -> None:
        """A filled circle, with its opacity."""
        edges = [(x - radius) * _FINE, (y - radius) * _FINE, (x + radius) * _FINE, (y + radius) * _FINE]
        self._draw.ellipse(edges, fill=fill)

    def room(self, words: str, size: int) -> float:
        """Length of a line."""
        return font_of(size * _FINE).getlength(words) / _FINE

    def fitted(self, words: str, size: int, room_px: float) -> str:
        """The words, shortened to a length."""
        return shortened(words, size * _FINE, room_px * _FINE)

    def save(self, path: Path) -> None:
        """Write the picture as PNG.

        Raises:
            OutputError: The file cannot be written.
        """
        picture = self._canvas.resize(self._size, Image.Resampling.LANCZOS)
        write_atomically(path, lambda stream: picture.save(stream, format="PNG", compress_level=6))
