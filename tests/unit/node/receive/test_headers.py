"""A received object's header is read as a file's in a folder."""

from __future__ import annotations

from io import BytesIO

import pytest
from pydicom.uid import ExplicitVRLittleEndian

from ctflow.dicom.attributes import text
from ctflow.dicom.read.structure import LARGEST_HEADER, Layout, Note, layout_of_header
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.node.receive.headers import file_meta, header_of_object, is_usable
from dicom_support import small_volume
from odd_headers import FORMS, element, parts
from service_support import encoded, instance

WITHOUT_META = {Note.IMPLICIT_META, Note.NO_META}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    """A CT image."""
    return write_ct_series(small_volume(), tmp_path_factory.mktemp("plain") / "ct")[0].read_bytes()


@pytest.mark.parametrize("form", [form for form in FORMS if not form.notes & WITHOUT_META], ids=lambda form: form.name)
def test_the_node_takes_what_the_reader_takes(form, plain):
    """A node is given data sets alone, and the transfer syntax of their presentation context."""
    content = form.write(plain)
    layout = layout_of_header(BytesIO(content), preamble=True)
    assert isinstance(layout, Layout)
    found = header_of_object(file_meta(CT_IMAGE_STORAGE, "1.2", layout.syntax), parts(content)[2], layout.syntax)
    assert (text(found, "Modality"), found.Rows) == ("CT", 12)


@pytest.mark.parametrize("uid", ["1.2.3", "1..2", "01.002", "a b", "1" * 64, "1.2\\3"])
def test_file_meta_information_takes_every_usable_uid(uid):
    assert is_usable(uid)
    meta = file_meta(CT_IMAGE_STORAGE, uid, ExplicitVRLittleEndian)
    found = header_of_object(meta, encoded(instance(1)), ExplicitVRLittleEndian)
    assert found.file_meta.get_item("MediaStorageSOPInstanceUID").value.rstrip(b"\0") == uid.encode()


def test_pixels_are_not_needed_and_a_header_may_be_only_so_large():
    meta, data = file_meta(CT_IMAGE_STORAGE, "1.2", ExplicitVRLittleEndian), encoded(instance(1))
    large = data + bytes(2 * LARGEST_HEADER)
    assert text(header_of_object(meta, large, ExplicitVRLittleEndian), "SOPInstanceUID") == "1.2.826.0.1.1"
    private = element(0x0009, 0x0010, b"LO", b"VENDOR") + element(0x0009, 0x1000, b"OB", bytes(2 * LARGEST_HEADER))
    assert isinstance(header_of_object(meta, private + data, ExplicitVRLittleEndian), str)
