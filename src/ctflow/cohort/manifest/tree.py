"""The rows of a folder tree: one for each CT series in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ctflow.cohort.manifest.digest import digest_of_series, is_ct_image
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.manifest.series import row_of_series
from ctflow.core.errors import BrokenSeries, ManifestInvalid
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import header_with, text
from ctflow.dicom.read.scan import Instance, Scan, scan_each_folder, scan_folder

_KEPT = ("StudyInstanceUID", "SeriesInstanceUID", "Modality")
SeriesKey = tuple[str, str]  # StudyInstanceUID, SeriesInstanceUID


@dataclass
class _Located:
    """A series so far: the folder that contains all of its files, their number, and their digest."""

    folder: Path
    folders: int
    files: int
    digest: str = ""


@dataclass
class Survey:
    """What a folder tree holds; of each series a few words are kept, and headers of one folder at a time.

    Attributes:
        series: The CT series found.
        others: Files of other objects.
        unreadable: Damaged files.
        ignored: Files that are not DICOM.
    """

    series: dict[SeriesKey, _Located] = field(default_factory=dict)
    others: int = 0
    unreadable: int = 0
    ignored: int = 0

    @property
    def spread(self) -> int:
        """How many series lie in several folders: their rows name the folder above, which is read whole."""
        return sum(found.folders > 1 for found in self.series.values())


def survey_tree(folder: Path, *, digests: bool = False, tell: Callable[[Survey], None] = lambda _: None) -> Survey:
    """Find the CT series of a folder tree; whether each can be segmented is decided when it is.

    Args:
        folder: Searched with all its subfolders.
        digests: Whether to read every file whole for its series' digest.
        tell: Told after each folder.

    Returns:
        What was found.

    Raises:
        NoUsableSeries: The folder cannot be listed.
        BrokenSeries: A file cannot be read for its digest.
    """
    found = Survey()
    for scan in scan_each_folder(folder.absolute(), keep_of=partial(header_with, _KEPT)):
        for key, instances in _by_series(scan).items():
            _add(found, key, scan.folder, instances, digests=digests)
        found.others += sum(not is_ct_image(each) for each in scan.instances)
        found.unreadable += len(scan.unreadable)
        found.ignored += scan.ignored
        tell(found)
    if digests:
        _digest_spread(found)
    return found


def rows_from_survey(found: Survey, relative_to: Path | None = None) -> Iterator[CohortRow]:
    """The rows, in the order of the folders.

    Args:
        found: The series.
        relative_to: The manifest's folder, for locations relative to it; None for absolute ones.

    Raises:
        ManifestInvalid: A folder's name is not UTF-8.
    """
    for (study, uid), series in found.series.items():
        location = str(series.folder) if relative_to is None else os.path.relpath(series.folder, relative_to)
        if not _is_text(location):
            raise ManifestInvalid(
                f"series {digest_of_uid(uid)}: the name of its folder has a line break or is not UTF-8: rename it",
                reason="wrong-location",
            )
        yield row_of_series(study, uid, location, series.digest)


def _is_text(location: str) -> bool:
    try:
        location.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return all(ord(letter) >= 32 for letter in location)


def _by_series(scan: Scan) -> dict[SeriesKey, list[Instance]]:
    groups: dict[SeriesKey, list[Instance]] = {}
    for instance in scan.instances:
        if is_ct_image(instance):
            key = (text(instance.header, "StudyInstanceUID"), text(instance.header, "SeriesInstanceUID"))
            groups.setdefault(key, []).append(instance)
    return groups


def _add(found: Survey, key: SeriesKey, folder: Path, instances: list[Instance], *, digests: bool) -> None:
    known = found.series.get(key)
    if known is None:
        found.series[key] = _Located(folder, 1, len(instances), _digest(key, instances) if digests else "")
        return
    known.folder = Path(os.path.commonpath([known.folder, folder]))
    known.folders += 1
    known.files += len(instances)


def _digest_spread(found: Survey) -> None:
    """A series in several folders is read once more: the digests of its files were not kept."""
    for key, series in found.series.items():
        if series.folders > 1:
            instances = _by_series(scan_folder(series.folder, keep_of=partial(header_with, _KEPT))).get(key, [])
            series.digest = _digest(key, instances)


def _digest(key: SeriesKey, instances: list[Instance]) -> str:
    try:
        return digest_of_series(instances)
    except OSError as error:
        what = f"series {digest_of_uid(key[1])}: a file cannot be read for its digest"
        raise BrokenSeries(f"{what} ({error.strerror})", reason="unreadable") from error
