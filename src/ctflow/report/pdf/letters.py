"""The letters of the PDF: fonts that it embeds, and what stands for a letter that they lack."""

from __future__ import annotations

import io
import re
from functools import cache
from importlib import resources


def font_name(bold: bool) -> str:
    """The name under which reportlab knows a font, once `known_letters` has been called."""
    return "ctflow-bold" if bold else "ctflow"


@cache
def known_letters() -> frozenset[int]:
    """Register the fonts with reportlab, under names that are ctflow's own; the code points that both have."""
    from reportlab.pdfbase.pdfmetrics import registerFont, registerFontFamily  # noqa: PLC0415
    from reportlab.pdfbase.ttfonts import TTFont  # noqa: PLC0415

    known = []
    for bold, name in ((False, "Roboto-Regular.ttf"), (True, "Roboto-Bold.ttf")):
        content = (resources.files("ctflow.report.pdf") / "fonts" / name).read_bytes()
        font = TTFont(font_name(bold), io.BytesIO(content))
        registerFont(font)
        known.append(frozenset(font.face.charToGlyph))
    registerFontFamily(font_name(False), font_name(False), font_name(True), font_name(False), font_name(True))
    return known[0] & known[1]


def drawable(words: str) -> str:
    """The text with blanks for control characters, and the code points of letters that the fonts lack."""
    plain = "".join(letter if letter.isprintable() else " " for letter in words)
    return re.sub(r"[^\0-\x7f]+", lambda found: _spelt(found[0]), plain)


def _spelt(letters: str) -> str:
    known = known_letters()
    spelt = [letter if ord(letter) in known else f"[U+{ord(letter):04X}]" for letter in letters]
    return "".join(spelt).replace("][", " ")
