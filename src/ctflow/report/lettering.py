"""Words in pictures: the font, and lines that fit."""

from __future__ import annotations

from functools import cache

from PIL import ImageFont


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same picture on every machine.

    Args:
        size: Height in pixels.
    """
    return ImageFont.load_default(size)


def shortened(words: str, size: int, room_px: float) -> str:
    """One line that fits; control characters have no picture.

    Args:
        words: Any text.
        size: The font's height in pixels.
        room_px: How long the line may be.
    """
    words = "".join(letter if letter.isprintable() else " " for letter in words)
    if font_of(size).getlength(words) <= room_px:
        return words
    while words and font_of(size).getlength(f"{words}...") > room_px:
        words = words[:-1]
    return f"{words}..."
