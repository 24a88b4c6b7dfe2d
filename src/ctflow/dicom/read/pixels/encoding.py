"""Warnings about encoding flaws in a series' files, which were read nevertheless."""

from __future__ import annotations

from collections.abc import Sequence

from ctflow.compat.pydicom import lenient
from ctflow.dicom.attributes import integer
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.structure import Note

_MOST_NAMED = 3


@lenient()
def encoding_warnings(instances: Sequence[Instance]) -> tuple[str, ...]:
    """Describe files that are not encoded as the standard says.

    Args:
        instances: The slices of a series.

    Returns:
        One sentence per kind of flaw. It names the files where they are few, and never a value.
    """
    warnings = []
    for note in Note:
        flawed = [instance for instance in instances if note in instance.notes]
        if flawed:
            warnings.append(f"the header of {_named(flawed, len(instances))} was read although {note.value}")
    padded = [instance for instance in instances if _is_padded(instance)]
    if padded:
        warnings.append(f"padding after the pixels of {_named(padded, len(instances))} was ignored (PS3.5 8.1.1)")
    return tuple(warnings)


def _named(flawed: Sequence[Instance], count: int) -> str:
    if len(flawed) > _MOST_NAMED:
        return "every slice" if len(flawed) == count else f"{len(flawed)} slices"
    return ", ".join(instance.name for instance in flawed)


def _is_padded(instance: Instance) -> bool:
    """Whether native pixel data go on after the pixels, apart from the byte that makes their length even."""
    if instance.pixel_offset is None or (integer(instance.header, "NumberOfFrames") or 1) > 1:
        return False
    rows, columns, bits = (integer(instance.header, each) for each in ("Rows", "Columns", "BitsAllocated"))
    wanted = (rows or 0) * (columns or 0) * (bits or 16) // 8
    return instance.pixel_length > wanted + wanted % 2
