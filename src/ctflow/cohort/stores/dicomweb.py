"""A DICOMweb server, through dicomweb-client: series are searched for, retrieved byte for byte, and stored."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from pydicom import dcmread

from ctflow.cohort.stores.patience import Patience, StoreFault, TooMuchFault
from ctflow.core.errors import counted
from ctflow.core.requirements import check_requirements
from ctflow.dicomweb.stored import word_of_answer

SERIES_URL = re.compile(
    r"(?P<server>dicomweb\+https?://[^?#@]+)/studies/(?P<study>[0-9.]+)/series/(?P<series>[0-9.]+)/?"
)
SERVER_URL = re.compile(r"dicomweb\+https?://[A-Za-z0-9\[][^?#@\s]*")
_CONNECT_S, _READ_S = 10, 60
_SMALL_S, _SLOWEST = 120.0, 200_000  # an answer may take two minutes, and what its bytes take at this rate a second
_PAGE = 1000  # a server may give less at a time, and tells by giving more for the next page
_MOST_RESULTS = 5_000_000
_MOST_ANSWER_BYTES = 64 << 20  # of what is not streamed: 1000 results are 1 or 2 MB
_MEDIA = 'multipart/related; type="application/dicom"; transfer-syntax=*'  # as it is stored, in whatever syntax
_LONGEST_END = 256
_NO_JSON = "an answer that is not DICOM's JSON"
_MOST_INSTANCES, _MOST_INSTANCE_BYTES = 20_000, 2 << 30  # one instance is in memory

log = logging.getLogger(__name__)


class DicomWeb:
    """A DICOMweb server; a context manager that ends its connections. Each thread has its own.

    Credentials come from `.netrc`, as requests reads it.

    Args:
        url: `dicomweb+https://HOST/PATH`, or `dicomweb+http://`.
        patience: How long a request is repeated while the server fails.

    Raises:
        RequirementUnmet: dicomweb-client is not installed.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        check_requirements("cohort")
        from dicomweb_client.session_utils import create_session  # noqa: PLC0415  # of the extra `cohort`
        from dicomweb_client.web import DICOMwebClient  # noqa: PLC0415

        logging.getLogger("dicomweb_client").setLevel(logging.ERROR)  # it logs UIDs
        self._session = create_session()
        self._session.hooks["response"].append(_read_bounded)
        address, timeout = url.removeprefix("dicomweb+").rstrip("/"), (_CONNECT_S, _READ_S)
        self._client: Any = DICOMwebClient(address, session=self._session, timeout=timeout)
        self._client.set_http_retry_params(retry=False)  # a repeated POST of it sends nothing: its body is used up
        self._patience = patience

    def __enter__(self) -> DicomWeb:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._session.close()

    def ct_series(self) -> Iterator[tuple[str, str]]:
        """StudyInstanceUID and SeriesInstanceUID of each CT series, a page in memory at a time.

        Raises:
            StoreFault: The server does not answer, or not so, or with more than 5,000,000 results.
        """
        fields = ["StudyInstanceUID", "SeriesInstanceUID"]
        search = self._client.search_for_series
        for found in self._pages(search, _MOST_RESULTS, search_filters={"Modality": "CT"}, fields=fields):
            if _value(found, "00080060") in ("", "CT"):
                yield _value(found, "0020000D"), _value(found, "0020000E")

    def retrieve(self, study: str, series: str, folder: Path, most_bytes: int) -> None:
        """Write a series' instances to files as the server has them; one instance is in memory at a time.

        Args:
            study: StudyInstanceUID.
            series: SeriesInstanceUID.
            folder: Empty; gets numbered files.
            most_bytes: Of all of them.

        Raises:
            StoreFault: The server does not give them, or fewer than it lists.
            ValueError: They are more than `most_bytes`, or one is larger than 2 GiB.
            OSError: A file cannot be written.
        """
        search = self._client.search_for_instances
        query = {"study_instance_uid": study, "series_instance_uid": series, "fields": ["SOPInstanceUID"]}
        listed = {_value(found, "00080018") for found in self._pages(search, _MOST_INSTANCES, **query)}
        if not listed:
            raise StoreFault("absent", "the series has no instances")
        self._patience.repeat_call(lambda: self._retrieve(study, series, folder, most_bytes, len(listed)))

    def _retrieve(self, study: str, series: str, folder: Path, most_bytes: int, expected: int) -> None:
        for path in folder.iterdir():
            path.unlink()
        client = self._client
        url = f"{client.base_url}/studies/{study}/series/{series}"
        try:
            answer = client._http_get(url, headers={"Accept": _MEDIA}, stream=True)  # files, not datasets
        except OSError as error:
            if (refusal := getattr(error, "response", None)) is not None:
                refusal.close()
            raise
        count = 0
        try:
            with _Bounded(answer, most_bytes) as bounded:
                for part in client._decode_multipart_message(bounded, stream=True):
                    (folder / f"{count:06d}.dcm").write_bytes(part)
                    count, bounded.since_part = count + 1, 0
                    if count > _MOST_INSTANCES:
                        raise _TooLargeError("too many")
        except (KeyError, ValueError) as error:
            if isinstance(error, _TooLargeError):
                raise
            raise StoreFault("no-answer", "an answer that is not multipart") from error
        if count < expected:
            raise StoreFault("no-answer", f"{counted(count, 'instance')} of {expected}")

    def store(self, files: Sequence[Path]) -> None:
        """Store DICOM files, one a request; whether one with the same UID is replaced is the server's choice.

        Raises:
            StoreFault: The server neither confirmed each of them, nor has it.
        """
        for path in files:
            dataset = dcmread(path)
            try:
                self._patience.repeat_call(partial(self._store, dataset))
            except StoreFault as fault:  # as some servers answer for what they have, such as of a run that was killed
                if fault.kind != "refused" or not self._has(dataset):
                    raise

    def _store(self, dataset: Any) -> None:
        answer = self._client.store_instances([dataset])
        word = word_of_answer(answer.to_json_dict(), str(dataset.SOPInstanceUID))
        if word is None or not word.is_stored:
            reason = word.reason if word else None
            raise StoreFault("refused", "not confirmed" if reason is None else f"failure reason {reason}")

    def _has(self, dataset: Any) -> bool:
        uid = str(dataset.SOPInstanceUID)
        found = self._pages(
            self._client.search_for_instances,
            _MOST_INSTANCES,
            study_instance_uid=str(dataset.StudyInstanceUID),
            series_instance_uid=str(dataset.SeriesInstanceUID),
            search_filters={"SOPInstanceUID": uid},
            fields=["SOPInstanceUID"],
        )
        try:
            return any(_value(each, "00080018") == uid for each in found)
        except StoreFault as fault:
            if fault.kind in ("absent", "refused"):  # of the study; or such a search
                return False
            raise

    def _pages(self, search: Any, most: int, **query: Any) -> Iterator[dict[str, Any]]:
        """All results: until a page brings nothing new. Some servers give fewer than asked for, some know no offset."""
        seen: set[str] = set()
        offset = 0
        while True:
            page = self._patience.repeat_call(partial(search, **query, limit=_PAGE, offset=offset))
            if not isinstance(page, list):
                raise StoreFault("no-answer", _NO_JSON)
            new = {key: each for each in page if (key := _key(each)) not in seen}
            seen |= new.keys()
            if len(seen) > most:
                raise TooMuchFault(f"more than {most} results")
            yield from new.values()
            if not new:
                return
            offset += len(page)


def _read_bounded(answer: Any, **options: Any) -> None:
    """Read an answer for a client that would read it whole, however large it is."""
    if options.get("stream"):
        return
    started, received = time.monotonic(), bytearray()
    for chunk in answer.iter_content(1 << 16):
        received += chunk
        if len(received) > _MOST_ANSWER_BYTES:
            answer.close()
            raise TooMuchFault("an answer that is too large")
        if time.monotonic() - started > _SMALL_S + len(received) / _SLOWEST:
            answer.close()
            raise StoreFault("no-answer", "a slow answer")
    answer._content = bytes(received)  # as requests itself keeps it


class _TooLargeError(ValueError):
    """More bytes than are allowed."""


class _Bounded:
    """A streamed answer that ends in an error if it is too large, too slow, or cut short.

    The client takes what is left at the end of a connection for the last instance, whole or not.
    """

    def __init__(self, answer: Any, most_bytes: int) -> None:
        self._answer, self._most = answer, most_bytes
        self.headers, self.since_part = answer.headers, 0

    @property
    def content(self) -> bytes:
        raise StoreFault("no-answer", "an answer that is not multipart")

    def iter_content(self, chunk_size: int) -> Iterator[bytes]:
        started, received, end = time.monotonic(), 0, b""
        for chunk in self._answer.iter_content(chunk_size):
            received, self.since_part = received + len(chunk), self.since_part + len(chunk)
            if received > self._most or self.since_part > _MOST_INSTANCE_BYTES:
                raise _TooLargeError("too large")
            if time.monotonic() - started > _SMALL_S + received / _SLOWEST:
                raise StoreFault("no-answer", "a slow answer")
            end = (end + chunk)[-_LONGEST_END:]
            yield chunk
        if not end.rstrip().endswith(b"--"):
            raise StoreFault("no-answer", "an answer that was cut short")

    def __enter__(self) -> _Bounded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._answer.close()


def _key(found: dict[str, Any]) -> str:
    return _value(found, "00080018") or f"{_value(found, '0020000D')} {_value(found, '0020000E')}"


def _value(found: Any, tag: str) -> str:
    element = (found.get(tag) or {}) if isinstance(found, dict) else None
    values = (element.get("Value") or [""]) if isinstance(element, dict) else None
    value = (values[0] or "") if isinstance(values, list) else None
    if not isinstance(value, str):
        raise StoreFault("no-answer", _NO_JSON)
    return value
