"""What `--for` stands for: the form of the SEG that a viewer reads right of every series (docs/viewers.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ctflow.settings.document import Given

_BINARY = {"seg": "binary", "seg_grid": "source", "segments": "class", "omit_empty_frames": "yes"}
VIEWERS: Mapping[str, Mapping[str, str]] = {
    "ohif": {**_BINARY, "seg": "labelmap"},
    "slicer": {**_BINARY, "seg_grid": "resampled"},
    "pacs": _BINARY,
}


def choose_for_viewer(given: Given, beside: Iterable[str]) -> None:
    """Replace a viewer by what it chooses.

    Args:
        given: What was said so far; is changed.
        beside: Keys that a person gave in the same place as the viewer, or in one that wins over it: they stay.
    """
    viewer = given.data.get("viewer")
    chosen = VIEWERS.get(viewer, {}) if isinstance(viewer, str) else {}
    if not chosen:
        return  # none is given, or reading will refuse it
    said = set(beside)
    del given.data["viewer"]
    named, line = given.named.pop("viewer", None), given.lines.get(("viewer",))
    for name in chosen.keys() - said:
        given.data[name] = chosen[name]
        if named is not None:
            given.named[name] = named
        elif line is not None:
            given.lines[name,] = line
