from __future__ import annotations

from ctflow.report.preview import font_of, shortened


def test_lines_are_shortened_to_their_room():
    assert shortened("short", 20, 500) == "short"
    assert shortened("a\nb\x00", 20, 500) == "a b "
    long = shortened("word " * 100, 20, 300)
    assert long.endswith("...")
    assert font_of(20).getlength(long) <= 300
