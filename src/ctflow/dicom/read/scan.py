"""File paths to headers, in one pass."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from ctflow.compat.pydicom import lenient
from ctflow.compat.python import uncollected
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import NoUsableSeries
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import PARSE_ERRORS, text
from ctflow.dicom.read.header import read_header
from ctflow.dicom.read.structure import Layout, Note, layout_of_header

NATIVE = frozenset({ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian})
_UNDEFINED_LENGTH = 0xFFFFFFFF
_PIXEL_DATA = 0x7FE00010
_SUFFIXES = frozenset({".dcm", ".dicom"})
_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"


@dataclass(frozen=True, eq=False)
class Instance:
    """One DICOM file's header, or that of one frame of an Enhanced CT.

    Attributes:
        path: Absolute path.
        name: The file's name in messages (`name_without_patient`).
        header: Everything before the pixel data, with file_meta.
        transfer_syntax: UID; if native, the actual encoding of the data set, whatever the file says.
        has_pixels: Whether pixel data follows.
        pixel_offset: Byte offset of native pixel values; None if they must be decoded.
        pixel_length: Bytes of native pixel values, as the file says.
        notes: Flaws of the encoding that were read nevertheless.
        encoded_offset: Byte offset of encapsulated pixel data; None if pixels are native.
        frame: Number of the frame, from 1; None if it is the whole file.
        frames: How many the file has.
    """

    path: Path
    name: str
    header: Dataset
    transfer_syntax: str
    has_pixels: bool
    pixel_offset: int | None = None
    pixel_length: int = 0
    notes: frozenset[Note] = frozenset()
    encoded_offset: int | None = None
    frame: int | None = None
    frames: int = 1

    @property
    def uid(self) -> str:
        """Its SOPInstanceUID, and the frame if it is one: no other slice has it."""
        uid = text(self.header, "SOPInstanceUID")
        return uid if self.frame is None else f"{uid} frame {self.frame}"


@dataclass(frozen=True)
class Unreadable:
    """A file that is DICOM, or has a DICOM name, and cannot be parsed.

    Attributes:
        name: The file's name in messages.
        reason: A stable name (docs/dicom.md).
        message: The kind of damage, without values of the file.
    """

    name: str
    reason: Literal["damaged", "no-header", "no-regular-file", "no-access", "unexpected"]
    message: str

    @property
    def facts(self) -> dict[str, str]:
        """As result.json and `ctflow inspect --json` show it."""
        return {"file": self.name, "reason": self.reason, "message": self.message}


@dataclass(frozen=True, eq=False)
class Scan:
    """The contents of a folder.

    Attributes:
        folder: The scanned folder.
        instances: All readable DICOM files, by name.
        unreadable: The damaged ones.
        ignored: How many files are not DICOM (a DICOMDIR counts here: its files are found anyway).
    """

    folder: Path
    instances: tuple[Instance, ...]
    unreadable: tuple[Unreadable, ...]
    ignored: int


# Just a short number, as scanners and archives write. Six digits may be a date of birth, more a patient's ID.
_HARMLESS = re.compile(r"(?:CT|IM|IMG|I|IMAGE|SLICE)?[-_.]?\d{1,5}(?:\.(?:dcm|dicom|ima))?", re.IGNORECASE)


def name_without_patient(path: Path) -> str:
    """The name of a file in messages, as its path may hold a patient's name, ID or date of birth.

    Args:
        path: Below the scanned folder.

    Returns:
        Its parts joined by slashes; a digest replaces each part that is more than a short number, but a DICOM extension
        is kept. `ctflow inspect --names` shows paths as they are.
    """

    def shown(part: str) -> str:
        ending = part[-4:].lower() if part.lower().endswith(".dcm") else ""
        return part if _HARMLESS.fullmatch(part) else digest_of_uid(part) + ending

    return "/".join(shown(part) for part in path.parts)


def scan_folder(
    folder: Path,
    progress: Progress = silent,
    *,
    name_of: Callable[[Path], str] = name_without_patient,
    keep_of: Callable[[Dataset], Dataset] | None = None,
    paths: Sequence[Path] | None = None,
) -> Scan:
    """Read the header of every DICOM file below a folder.

    Args:
        folder: Searched with all its subfolders; symbolic links are followed once.
        progress: Called for every file, as stage "scan".
        name_of: From the path below the folder to the file's name in messages.
        keep_of: From the header to the part to keep, if not all is needed.
        paths: The files to read, of those that `files_below` lists; None for all.

    Returns:
        The files found.

    Raises:
        NoUsableSeries: The folder does not exist or cannot be listed.
    """
    return _scanned(folder, files_below(folder) if paths is None else paths, progress, name_of, keep_of)


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and its subfolders, sorted.

    Raises:
        NoUsableSeries: As of `scan_folder`.
    """
    return sorted(path for files in _files_by_folder(folder) for path in files)


def scan_each_folder(folder: Path, *, keep_of: Callable[[Dataset], Dataset]) -> Iterator[Scan]:
    """As `scan_folder`, one folder after another, each without its subfolders: of a large tree, one is in memory.

    Args:
        folder: Searched with all its subfolders, in the order of their names.
        keep_of: As of `scan_folder`.

    Yields:
        The files of each folder that holds any; `Scan.folder` is that folder.

    Raises:
        NoUsableSeries: As of `scan_folder`.
    """
    for files in _files_by_folder(folder):
        if files:
            yield _scanned(files[0].parent, sorted(files), silent, name_without_patient, keep_of)


@lenient()
@uncollected()
def _scanned(
    folder: Path,
    paths: Sequence[Path],
    progress: Progress,
    name_of: Callable[[Path], str],
    keep_of: Callable[[Dataset], Dataset] | None,
) -> Scan:
    instances: list[Instance] = []
    unreadable: list[Unreadable] = []
    ignored = 0
    progress("scan", 0, len(paths))
    for done, path in enumerate(paths, start=1):
        found = _read_file(path, name_of(path.relative_to(folder)))
        if isinstance(found, Instance):
            instances.append(found if keep_of is None else replace(found, header=keep_of(found.header)))
        elif isinstance(found, Unreadable):
            unreadable.append(found)
        else:
            ignored += 1
        progress("scan", done, len(paths))
    return Scan(folder, tuple(instances), tuple(unreadable), ignored)


def _require_folder(folder: Path) -> None:
    what = "is not a folder"
    try:
        if stat.S_ISDIR(folder.stat().st_mode):
            return
    except (FileNotFoundError, NotADirectoryError):
        what = "does not exist"
    except OSError as error:  # a folder above it that may not be entered, a name that is too long
        raise _unlistable(error) from error
    raise NoUsableSeries(f"the input {what}: give the folder that contains the DICOM files", reason="not-a-folder")


def _unlistable(error: OSError) -> NoUsableSeries:
    return NoUsableSeries(f"the input folder cannot be listed: {error.strerror}", reason="folder-unreadable")


def _files_by_folder(folder: Path) -> Iterator[list[Path]]:
    _require_folder(folder)
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise _unlistable(error) from error

    for top, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        try:
            status = Path(top).stat()
        except OSError:  # it was removed meanwhile
            folders.clear()
            continue
        if (status.st_dev, status.st_ino) in seen:  # a symbolic link to an ancestor
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield [Path(top, name) for name in files]


def _read_file(path: Path, name: str) -> Instance | Unreadable | None:
    """The header, or why it cannot be read, or None if the file is not DICOM."""
    says_dicom = path.suffix.lower() in _SUFFIXES
    try:
        if not path.is_file():  # a pipe or device would block, a broken link has no target
            return Unreadable(name, "no-regular-file", "not a regular file") if says_dicom else None
        with path.open("rb") as stream:
            start = stream.read(132)
            stream.seek(0)
            if start[128:] == b"DICM":
                return _instance_of_file(stream, path, name, force=False)
            # Old files have no preamble; group 0002 or 0008 in little endian then comes first.
            if start[:2] in (b"\x02\x00", b"\x08\x00") and len(start) == 132:
                return _instance_of_file(stream, path, name, force=True)
    except Exception as error:  # noqa: BLE001  # any parser error, not only PARSE_ERRORS: the other files go on
        return _unreadable(name, error)
    return Unreadable(name, "no-header", "empty or without a DICOM header") if says_dicom else None


def _unreadable(name: str, error: Exception) -> Unreadable:
    """The kind of damage; never the error's text, which may quote values of the file."""
    if isinstance(error, OSError) and error.strerror:
        return Unreadable(name, "no-access", error.strerror)
    if isinstance(error, EOFError):
        return Unreadable(name, "damaged", "cut short")
    is_known = isinstance(error, PARSE_ERRORS)
    if not is_known:
        unexpected(error, f"file {name}")
    return Unreadable(name, "damaged" if is_known else "unexpected", f"damaged header ({type(error).__name__})")


def _instance_of_file(stream: BinaryIO, path: Path, name: str, *, force: bool) -> Instance | Unreadable | None:
    layout = layout_of_header(stream, preamble=not force)
    if isinstance(layout, str):  # without a preamble it may be anything else
        return Unreadable(name, "damaged", layout) if not force or path.suffix.lower() in _SUFFIXES else None
    header = read_header(stream, layout, force=force)
    if header is None:
        return Unreadable(name, "damaged", "damaged header (it can be read in more than one way)")
    if text(header, "SOPClassUID") == _DIRECTORY_CLASS or "DirectoryRecordSequence" in header:
        return None
    if force and not text(header, "SOPClassUID"):
        return None  # began like DICOM but is something else
    flaw = _flaw_of_object(header, layout, force=force)
    if flaw:
        return Unreadable(name, "damaged", flaw)
    syntax, notes = _syntax_of(layout), frozenset(layout.notes)
    return _with_pixels(Instance(path.absolute(), name, header, syntax, has_pixels=False, notes=notes), layout)


def _flaw_of_object(header: Dataset, layout: Layout, *, force: bool) -> str | None:
    if layout.meta and not layout.syntax and not force:
        return "no TransferSyntaxUID in its file meta information"
    if layout.syntax != DeflatedExplicitVRLittleEndian and layout.pixels is None and "SeriesInstanceUID" not in header:
        return "cut short, or not an object of a series"
    return None


def _syntax_of(layout: Layout) -> str:
    """The transfer syntax of the data set: its actual encoding if native, otherwise as the file says."""
    if layout.syntax and layout.syntax not in NATIVE:
        return layout.syntax
    if layout.big_endian:
        return str(ExplicitVRBigEndian)
    return str(ImplicitVRLittleEndian if layout.implicit else ExplicitVRLittleEndian)


def _with_pixels(instance: Instance, layout: Layout) -> Instance:
    """The instance with the location of its pixel data."""
    if layout.syntax == DeflatedExplicitVRLittleEndian:
        # The rest of the file was inflated in memory, so pixels have no offset.
        return replace(instance, has_pixels="Rows" in instance.header)
    if layout.pixels is None or not layout.pixels[2]:  # zero length: the element is there but empty
        return instance
    tag, _, length, offset, _ = layout.pixels
    if tag == _PIXEL_DATA and instance.transfer_syntax in NATIVE and length != _UNDEFINED_LENGTH:
        return replace(instance, has_pixels=True, pixel_offset=offset, pixel_length=length)
    return replace(instance, has_pixels=True, encoded_offset=offset if length == _UNDEFINED_LENGTH else None)
