"""A series from an object store or a DICOMweb server comes to this machine's disk, and goes once it is read."""

from __future__ import annotations

import atexit
import errno
import itertools
import re
import shutil
import threading
from functools import cache
from pathlib import Path

from ctflow.cohort.destinations.work import WorkFolder, folder_of_machine
from ctflow.cohort.stores.dicomweb import SERIES_URL, DicomWeb
from ctflow.cohort.stores.objects import ObjectStore
from ctflow.cohort.stores.patience import Patience, StoreFault, TooMuchFault
from ctflow.core.errors import NotFetched, SettingsInvalid, TemporaryFolderFailed

PATIENCE_S = 120.0  # an attempt's; the next one comes after all other rows
_MOST_BYTES, _MOST_FILES = 16 << 30, 20_000
_FREE = 1 << 30
_MOST_PROCESSES = 1000
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")
_numbers = itertools.count()


def fetch_series(location: str, what: str) -> Path:
    """Fetch the files of a location.

    Args:
        location: A prefix of an object store, or a series of a DICOMweb server.
        what: Names the series in messages, as the location may hold a name.

    Returns:
        A folder of this machine, to be removed with `discard_fetched`.

    Raises:
        NotFetched: It cannot be fetched.
        TemporaryFolderFailed: This machine's disk has no room for it, or cannot be written.
        OutputError: There is no folder for temporary files.
    """
    folder = _scratch().workspace(str(next(_numbers)))
    try:
        match = SERIES_URL.fullmatch(location)
        if match is None:
            _fetch_objects(location.removesuffix("*"), folder, what)
        else:
            with DicomWeb(match["server"], Patience(PATIENCE_S)) as server:
                server.retrieve(match["study"], match["series"], folder, _MOST_BYTES)
    except (ValueError, TooMuchFault) as error:
        discard_fetched(folder)
        raise _too_large(what) from error
    except StoreFault as fault:
        discard_fetched(folder)
        raise not_fetched_from_fault(fault, what) from fault
    except OSError as error:
        discard_fetched(folder)
        raise _not_kept_from_oserror(error, folder.parent, what) from error
    except BaseException:
        discard_fetched(folder)
        raise
    return folder


def discard_fetched(folder: Path) -> None:
    """Remove a folder of `fetch_series`."""
    shutil.rmtree(folder, ignore_errors=True)


def _fetch_objects(url: str, folder: Path, what: str) -> None:
    store = ObjectStore(url, PATIENCE_S)
    sizes = store.sizes(most=_MOST_FILES)
    if not sizes:
        raise StoreFault("absent", "no object has this prefix")
    if sum(sizes.values()) > _MOST_BYTES:
        raise _too_large(what)
    if shutil.disk_usage(folder).free < sum(sizes.values()) + _FREE:
        raise _no_room(folder, what)
    # Numbers make names safe and different, whatever the objects' are; what is left of those helps a reader.
    names = {name: f"{number:06d}-{_UNSAFE.sub('_', name)[-80:]}" for number, name in enumerate(sorted(sizes))}
    store.download({name: (folder / names[name], size) for name, size in sizes.items()})


def _not_kept_from_oserror(error: OSError, parent: Path, what: str) -> TemporaryFolderFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(parent, what)
    return TemporaryFolderFailed(
        f"a file of {what} cannot be written ({error.strerror or type(error).__name__}): check TMPDIR",
        reason="temporary-unwritable",
    )


def _no_room(folder: Path, what: str) -> TemporaryFolderFailed:
    """Whether the disk is full, for any row, or too small for this one."""
    if shutil.disk_usage(folder).free < _FREE:
        return TemporaryFolderFailed(
            f"no space left for the files of {what}: free some, or set TMPDIR to another disk", reason="temporary-full"
        )
    return TemporaryFolderFailed(
        f"{what}: its files do not fit into the folder for temporary files: set TMPDIR to a larger disk",
        reason="temporary-too-small",
    )


def _too_large(what: str) -> NotFetched:
    return NotFetched(
        f"{what}: its location holds more than {_MOST_BYTES >> 30} GiB or {_MOST_FILES} objects: give the prefix of one"
        " series",
        reason="location-too-large",
    )


def not_fetched_from_fault(fault: StoreFault, what: str) -> NotFetched:
    """The named error for what a store did not give.

    Args:
        fault: What failed.
        what: What was to be fetched, without an address.
    """
    if fault.kind == "absent":
        return NotFetched(f"{what}: nothing is at its location: correct the manifest", reason="location-absent")
    if fault.kind in ("denied", "no-credentials"):
        return NotFetched(f"{what}: its store denies access: check the credentials", reason="location-denied")
    if fault.kind == "refused":
        return NotFetched(f"{what}: its store refuses the request ({fault})", reason="location-refused")
    return NotFetched(f"{what}: its store does not answer ({fault}): retry it later", reason="location-down")


_lock = threading.Lock()


def _scratch() -> WorkFolder:
    with _lock:
        return _opened_scratch()


@cache
def _opened_scratch() -> WorkFolder:
    """This process's folder for what is fetched; what killed processes have left beside it goes."""
    parent = folder_of_machine("fetched")
    for number in range(_MOST_PROCESSES):
        try:
            work = WorkFolder(parent, f"process-{number}").__enter__()
        except SettingsInvalid:
            continue
        atexit.register(work.__exit__)
        return work
    raise NotFetched("no folder for what is fetched is free: end other processes", reason="location-down")
