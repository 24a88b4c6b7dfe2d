from __future__ import annotations

import pytest
from pydicom.config import IGNORE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from ctflow.dicom.uids import REFERRED_TO, malformed_uids

SENSELESS = ["1.2.x", "1.2 3", "1." + "2" * 63, ["1.2", "1.3"], "1.2\x7f", "-1.2"]
UNTIDY = ["1.02", "1..2", ".", "1.2.", "00"]


def header_with(keyword: str, value: object) -> Dataset:
    header = Dataset()
    header.add(DataElement(keyword, "UI", value, validation_mode=IGNORE))
    return header


@pytest.mark.parametrize("value", SENSELESS)
def test_what_is_no_uid_is_told_from_an_untidy_one(value):
    for keyword in REFERRED_TO:
        assert malformed_uids([Dataset(), header_with(keyword, value)]) == ((keyword,), ())


@pytest.mark.parametrize("value", UNTIDY)
def test_an_untidy_uid_is_found(value):
    assert malformed_uids([header_with("SOPInstanceUID", value)]) == ((), ("SOPInstanceUID",))


@pytest.mark.parametrize("value", ["1.2.840.0", "0.1", "1." + "2" * 62, "999.999.2", ""])
def test_a_uid_and_an_empty_one_are_not_malformed(value):
    assert malformed_uids([header_with("SOPInstanceUID", value)]) == ((), ())
