"""The rows of a DICOMweb server: one for each CT series that it lists."""

from __future__ import annotations

from collections.abc import Iterator

from ctflow.cohort.locations.fetch import PATIENCE_S, not_fetched_from_fault
from ctflow.cohort.manifest.rows import CohortRow, is_plain_uid
from ctflow.cohort.manifest.series import row_of_series
from ctflow.cohort.stores.dicomweb import DicomWeb
from ctflow.cohort.stores.patience import Patience, StoreFault
from ctflow.core.errors import ManifestInvalid
from ctflow.core.volume import digest_of_uid


def rows_from_server(url: str) -> Iterator[CohortRow]:
    """The rows, in the server's order; whether each can be segmented is decided when it is.

    Args:
        url: `dicomweb+https://SERVER`, or `dicomweb+http://`.

    Raises:
        NotFetched: The server does not answer.
        ManifestInvalid: A UID breaks DICOM's rules.
        RequirementUnmet: dicomweb-client is not installed.
    """
    try:
        with DicomWeb(url, Patience(PATIENCE_S)) as server:
            for study, uid in server.ct_series():
                if not (is_plain_uid(study) and is_plain_uid(uid)):
                    raise ManifestInvalid(f"series {digest_of_uid(uid)}: its UID is none", reason="wrong-value")
                yield row_of_series(study, uid, f"{url.rstrip('/')}/studies/{study}/series/{uid}")
    except StoreFault as fault:
        raise not_fetched_from_fault(fault, "the series of the server") from fault
