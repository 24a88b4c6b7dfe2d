"""The row of a series that is known by its UIDs."""

from __future__ import annotations

from ctflow.cohort.manifest.rows import CohortRow, is_plain_uid, is_safe_id
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.read.select.series import Series
from ctflow.pipeline.case import key_of_series


def row_of_series(study: str, uid: str, location: str, digest: str = "") -> CohortRow:
    """The row of a series; its id follows from the UIDs alone, wherever the series lies.

    Args:
        study: StudyInstanceUID.
        uid: SeriesInstanceUID.
        location: Where its files are.
        digest: Expected digest of its files.
    """
    short = digest_of_uid(uid)
    key = key_of_series(Series(uid, short, study, ()))
    row_id = key if is_safe_id(key) else f"{short}-{digest_of_uid(study)}"
    return CohortRow(row_id, location, series=uid if is_plain_uid(uid) else "", digest=digest)
