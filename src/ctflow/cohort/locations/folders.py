"""A folder of many series is read once for all of its rows, not once for each."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ctflow.dicom.attributes import header_with, text
from ctflow.dicom.read.scan import files_below, scan_folder

# 0.3 s of headers: below that, a folder is read for each row, and a row's result.json tells of all that is in it.
_FEW_FILES = 1000
_MOST_FILES = 1_000_000  # in all indexes; 150 bytes each
_KEPT = ("StudyInstanceUID", "SeriesInstanceUID")


@dataclass
class _FilesBySeries:
    """The files of a folder by study, and those of no study: damaged ones, and ones that are not DICOM."""

    studies_of_series: dict[str, set[str]]
    files_of_study: dict[str, list[str]]
    others: list[str]

    @property
    def size(self) -> int:
        return len(self.others) + sum(map(len, self.files_of_study.values()))


class FolderIndexes:
    """Which files of large folders belong to which study; of the folders that were used last. Safe in threads."""

    def __init__(self) -> None:
        self._indexes: OrderedDict[Path, _FilesBySeries] = OrderedDict()
        self._locks: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def files(self, folder: Path, series: str, *, is_fresh: bool) -> Sequence[Path] | None:
        """The files to read for a series: of its studies, as slices may continue a series under another UID.

        Args:
            folder: The row's.
            series: SeriesInstanceUID.
            is_fresh: Whether to look anew: an earlier attempt failed.

        Returns:
            None for all files of the folder.

        Raises:
            NoUsableSeries: The folder cannot be listed.
        """
        with self._lock:
            lock = self._locks[folder]
        with lock:
            index = None if is_fresh else self._indexes.get(folder)
            if index is None:
                paths = files_below(folder)
                if len(paths) <= _FEW_FILES:
                    return paths
                index = self._keep(folder, _index_of(folder, paths))
        studies = index.studies_of_series.get(series)
        if studies is None:
            return None
        own = [path for study in studies for path in index.files_of_study[study]]
        return sorted(Path(path) for path in (*own, *index.others))

    def _keep(self, folder: Path, index: _FilesBySeries) -> _FilesBySeries:
        with self._lock:
            self._indexes[folder] = index
            self._indexes.move_to_end(folder)
            while len(self._indexes) > 1 and sum(each.size for each in self._indexes.values()) > _MOST_FILES:
                self._locks.pop(self._indexes.popitem(last=False)[0], None)
        return index


def _index_of(folder: Path, paths: Sequence[Path]) -> _FilesBySeries:
    scan = scan_folder(folder, paths=paths, keep_of=partial(header_with, _KEPT))
    index = _FilesBySeries({}, {}, [])
    known = set()
    for instance in scan.instances:
        study, series = (text(instance.header, name) for name in _KEPT)
        index.studies_of_series.setdefault(series, set()).add(study)
        index.files_of_study.setdefault(study, []).append(str(instance.path))
        known.add(str(instance.path))
    index.others = [str(path) for path in paths if str(path.absolute()) not in known]
    return index


INDEXES = FolderIndexes()
