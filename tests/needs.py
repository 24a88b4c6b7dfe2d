"""What some tests need beside the packages of `dev`, how to get it, and the line that says so at the end of a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NoReturn

import pytest

HOW = {
    "Chromium": "apt-get install chromium",
    "DCMTK": "apt-get install dcmtk",
    "Orthanc": "apt-get install orthanc orthanc-python dcmtk iproute2 util-linux",
    "namespaces of its own": "run the tests as root",
    "adapters of OHIF": "apt-get install npm, then make viewers",
    "axe-core": "apt-get install npm, then make viewers",
    "OHIF": "make viewers, or make test-viewers for older versions",
    "itkwasm-dicom": "make test-viewers",
    "Orthanc's DICOMweb": "apt-get install orthanc-dicomweb",
    "strace": "apt-get install strace",
    "real CT": "docs/testing.md says where it comes from; then set CTFLOW_DATA",
}
_REASON = re.compile(r"no (?P<what>[^()]+?) \((?P<how>[^()]+)\)$")


def skip_without(what: str) -> NoReturn:
    """Skip the test: `what`, one of `HOW`, is not here."""
    pytest.skip(f"no {what} ({HOW[what]})")


def summary_of_skips(reasons: Iterable[str]) -> str | None:
    """One line for all skipped tests, the commonest lack first; None if none was skipped.

    Args:
        reasons: Why each test was skipped; of the form "no WHAT (HOW TO GET IT)" where something can be got.
    """
    found = [_REASON.search(reason) for reason in reasons]
    if not found:
        return None
    lacks = Counter((match["what"], match["how"]) for match in found if match)
    parts = [f"{count} without {what} ({how})" for (what, how), count in lacks.most_common()]
    if others := sum(match is None for match in found):
        parts.append(f"{others} for other reasons (listed above)")
    return f"{len(found)} skipped: {'; '.join(parts)}"
