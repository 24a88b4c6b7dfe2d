"""Paths to headers, in one pass."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.dicom.header import header_of_layout
from ctflow.dicom.structure import layout_of_header
from ctflow.door import unexpected
from ctflow.errors import NoUsableSeries
from ctflow.progress import Progress, silent
from ctflow.volume import digest_of_uid

NATIVE = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian})
_UNDEFINED_LENGTH = 0xFFFFFFFF
_SUFFIXES = frozenset({".dcm", ".dicom"})
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"


@dataclass(frozen=True, eq=False)
class Instance:
    """One DICOM file's header.

    Attributes:
        path: Absolute path.
        name: What messages call the file (`name_without_patient`).
        header: Everything before the pixel data, with file_meta.
        transfer_syntax: UID.
        has_pixels: Whether pixel data follows.
        pixel_offset: Byte offset of native pixel values; None if they must be decoded.
        pixel_length: Bytes of native pixel values, as the file says.
    """

    path: Path
    name: str
    header: Dataset
    transfer_syntax: str
    has_pixels: bool
    pixel_offset: int | None = None
    pixel_length: int = 0


@dataclass(frozen=True)
class Unreadable:
    """A file that is DICOM, or says so by its name, and cannot be parsed."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Scan:
    """Everything that a folder holds.

    Attributes:
        folder: What was scanned.
        instances: All readable DICOM files, by name.
        unreadable: Those that are damaged.
        ignored: How many files are not DICOM (a DICOMDIR counts here: its files are found anyway).
    """

    folder: Path
    instances: tuple[Instance, ...]
    unreadable: tuple[Unreadable, ...]
    ignored: int


# Nothing but a short number: what scanners and archives give. Six digits may be a date of birth, more a patient's ID.
_HARMLESS = re.compile(r"(?:CT|IM|IMG|I|IMAGE|SLICE)?[-_.]?\d{1,5}(?:\.(?:dcm|dicom|ima))?", re.IGNORECASE)


def name_without_patient(path: Path) -> str:
    """What messages call a file, whose path may hold a patient's name, ID or date of birth.

    Args:
        path: Below the scanned folder.

    Returns:
        Its parts with slashes between; in place of each that is more than a short number a digest, with the ending kept
        where that is DICOM's. `ctflow inspect --names` shows paths as they are.
    """

    def shown(part: str) -> str:
        ending = part[-4:].lower() if part.lower().endswith(".dcm") else ""
        return part if _HARMLESS.fullmatch(part) else digest_of_uid(part) + ending

    return "/".join(shown(part) for part in path.parts)


def scan_folder(
    folder: Path, progress: Progress = silent, *, name_of: Callable[[Path], str] = name_without_patient
) -> Scan:
    """Read the header of every DICOM file below a folder.

    Args:
        folder: Searched with all its subfolders; symbolic links are followed once.
        progress: Told of every file, as stage "scan".
        name_of: Path below the folder to what messages call the file.

    Returns:
        What was found.

    Raises:
        NoUsableSeries: The folder does not exist or cannot be listed.
    """
    if not folder.is_dir():
        raise NoUsableSeries("the input is not a folder: give the folder that holds the DICOM files")
    instances: list[Instance] = []
    unreadable: list[Unreadable] = []
    ignored = 0
    paths = sorted(_files_below(folder))
    progress("scan", 0, len(paths))
    for done, path in enumerate(paths, start=1):
        found = _read_file(path, name_of(path.relative_to(folder)))
        if isinstance(found, Instance):
            instances.append(found)
        elif isinstance(found, Unreadable):
            unreadable.append(found)
        else:
            ignored += 1
        progress("scan", done, len(paths))
    return Scan(folder, tuple(instances), tuple(unreadable), ignored)


def _files_below(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise NoUsableSeries(f"the input folder cannot be listed: {error.strerror}") from error

    for top, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        try:
            status = Path(top).stat()
        except OSError:  # it vanished meanwhile
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:  # a symbolic link that leads back
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        yield from (Path(top, name) for name in files)


def _read_file(path: Path, name: str) -> Instance | Unreadable | None:
    """The header; or why it cannot be read; or None for what is not DICOM."""
    says_dicom = path.suffix.lower() in _SUFFIXES
    try:
        if not path.is_file():  # a pipe or device would block, a broken link has nothing
            return Unreadable(name, "not a regular file") if says_dicom else None
        with path.open("rb") as stream:
            start = stream.read(132)
            stream.seek(0)
            if start[128:] == b"DICM":
                return _read_header(stream, path, name, force=False)
            # Old files have no preamble; group 0002 or 0008 in little endian then comes first.
            if start[:2] in (b"\x02\x00", b"\x08\x00") and len(start) == 132:
                return _read_header(stream, path, name, force=True)
    except Exception as error:  # noqa: BLE001  # beside PARSE_ERRORS, whatever parsers raise: the other files go on
        if not isinstance(error, PARSE_ERRORS):
            unexpected(error, f"file {name}")
        return Unreadable(name, _reason(error))
    return Unreadable(name, "empty or without a DICOM header") if says_dicom else None


def _reason(error: BaseException) -> str:
    """What kind of damage; never the error's text, which may quote values of the file."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "cut short"
    return f"damaged header ({type(error).__name__})"


def _read_header(stream: BinaryIO, path: Path, name: str, *, force: bool) -> Instance | Unreadable | None:
    layout = layout_of_header(stream, preamble=not force)
    if isinstance(layout, str):  # without a preamble it may be anything else
        return Unreadable(name, layout) if not force or path.suffix.lower() in _SUFFIXES else None
    header, position = None if force else header_of_layout(stream, layout), layout.end
    if header is None:
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns of damage and quotes paths; what matters is checked below
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=force)
        position = stream.tell()
    meta_syntax = text(header.file_meta, "TransferSyntaxUID")
    if text(header, "SOPClassUID") == _DIRECTORY_CLASS or "DirectoryRecordSequence" in header:
        return None
    if not meta_syntax and not force:
        return Unreadable(name, "no TransferSyntaxUID in its file meta information")
    syntax = meta_syntax or str(ImplicitVRLittleEndian if header.original_encoding[0] else ExplicitVRLittleEndian)
    if force and not text(header, "SOPClassUID"):
        return None  # began like DICOM and is something else
    return _with_pixels(stream, position, Instance(path.absolute(), name, header, syntax, has_pixels=False))


def _with_pixels(stream: BinaryIO, position: int, instance: Instance) -> Instance | Unreadable:
    """The instance with the place of its pixel data, which begins at `position` if there is any."""
    syntax = instance.transfer_syntax
    if syntax == DeflatedExplicitVRLittleEndian:
        # The rest of the file was inflated in memory, so no offset says where pixels lie.
        return replace(instance, has_pixels="Rows" in instance.header)
    tag, offset, length = _element_at(stream, position, syntax)
    if tag is None and stream.seek(0, os.SEEK_END) > position:
        return Unreadable(instance.name, "cut short in its header")
    if tag is None and "SeriesInstanceUID" not in instance.header:
        return Unreadable(instance.name, "cut short, or not an object of a series")
    if tag == _PIXEL_DATA and syntax in NATIVE and length != _UNDEFINED_LENGTH:
        return replace(instance, has_pixels=True, pixel_offset=offset, pixel_length=length)
    return replace(instance, has_pixels=tag in (_PIXEL_DATA, *_FLOAT_PIXEL_DATA))


_PIXEL_DATA = (0x7FE0, 0x0010)
_FLOAT_PIXEL_DATA = ((0x7FE0, 0x0008), (0x7FE0, 0x0009))


def _element_at(stream: BinaryIO, position: int, syntax: str) -> tuple[tuple[int, int] | None, int, int]:
    """Tag, offset of the value, and length of the element at a position (DICOM PS3.5 section 7.1)."""
    order = "big" if syntax == ExplicitVRBigEndian else "little"
    stream.seek(position)
    head = stream.read(12)
    if len(head) < 12:
        return None, position, 0

    def unsigned(start: int, stop: int) -> int:
        return int.from_bytes(head[start:stop], order)  # type: ignore[arg-type]  # a str, known to be one of two

    tag = (unsigned(0, 2), unsigned(2, 4))
    if syntax == ImplicitVRLittleEndian:
        return tag, position + 8, unsigned(4, 8)
    return tag, position + 12, unsigned(8, 12)
