"""The demonstration bundle's body parts are terms that a series may have."""

from __future__ import annotations

from ctflow.bundle import demonstration_bundle, read_spec
from ctflow.dicom.body_parts import parts_of_value


def test_every_term_of_the_demonstration_bundle_is_known():
    assert all(parts_of_value(part) for part in read_spec(demonstration_bundle()).body_parts)
