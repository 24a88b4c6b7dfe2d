"""Headers that the standard does not allow are read as SimpleITK and pydicom read them, within the same limits."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from ctflow.core.errors import BrokenSeries
from ctflow.core.volume import Volume
from ctflow.dicom.read.structure import (
    DEEPEST,
    MOST_ELEMENTS,
    Layout,
    Note,
    layout_of_header,
)
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import assembled, small_volume
from fuzz_series import slice_by_pydicom
from odd_headers import FORMS, Form, before_pixels, element, implicit, padded, sequence_items
from reasons import raises_reason

NAMES = [form.name for form in FORMS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Volume, list[bytes]]:
    """A volume and its files, plain ones."""
    folder = tmp_path_factory.mktemp("plain")
    volume = small_volume()
    write_ct_series(volume, folder)
    return volume, [path.read_bytes() for path in sorted(folder.iterdir())]


def written_in(form: Form, contents: list[bytes], folder: Path) -> list[Path]:
    """Files whose names are in no order."""
    paths = [folder / f"{number * 7 % len(contents):02d}.dcm" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(form.write(content))
    return paths


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_values_and_order_are_those_that_simpleitk_and_pydicom_read(form, plain, tmp_path):
    volume, contents = plain
    paths = written_in(form, contents, tmp_path)
    found = assembled(tmp_path)
    assert np.array_equal(found.volume.array, volume.array)
    assert np.allclose(found.volume.geometry.affine_mm, volume.geometry.affine_mm)
    assert [instance.path for instance in found.instances] == paths
    assert all(instance.notes == form.notes for instance in found.instances)
    assert np.array_equal([slice_by_pydicom(path) for path in paths], volume.array)
    if form.itk:
        names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
        image = sitk.ReadImage(names)
        assert [Path(name) for name in names] == paths
        assert np.array_equal(sitk.GetArrayFromImage(image), volume.array)
        assert np.allclose(image.GetOrigin(), volume.geometry.affine_mm[:3, 3], atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_a_warning_says_what_is_wrong(form, plain, tmp_path):
    _, contents = plain
    paths = written_in(form, contents, tmp_path)
    warnings = assembled(tmp_path).warnings
    padding = "padding" in form.name
    assert len(warnings) == len(form.notes) + padding
    assert all(any(note.value in warning for warning in warnings) for note in form.notes)
    assert all("every slice" in warning for warning in warnings)
    if form.notes:
        for path, content in zip(paths[1:], contents[1:], strict=True):
            path.write_bytes(content)
        (warning,) = assembled(tmp_path).warnings
        assert paths[0].name in warning


def heads(layout: Layout, vr: bytes, length: int) -> bytes:
    """The head of element (0029,1006) in a data set's encoding."""
    order = ">" if layout.big_endian else "<"
    if layout.implicit:
        return struct.pack(order + "HHL", 0x0029, 0x1006, length)
    return struct.pack(order + "HH2sHL", 0x0029, 0x1006, vr, 0, length)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_the_limits_are_the_same(form, plain):
    content = form.write(plain[1][0])
    layout = layout_of_header(BytesIO(content), preamble=True)
    assert isinstance(layout, Layout)
    item = struct.pack((">" if layout.big_endian else "<") + "HHL", 0xFFFE, 0xE000, 0xFFFFFFFF)
    limits = [
        ("nested more than", (heads(layout, b"SQ", 0xFFFFFFFF) + item) * (DEEPEST + 1)),
        ("cut short in its header, or a damaged length", heads(layout, b"OB", 0xFFFFFFF0)),
    ]
    if form in FORMS[::6]:  # these take a second each
        limits.append(("more than 65536 elements", heads(layout, b"OB", 0) * (MOST_ELEMENTS + 1)))
        limits.append(("larger than 32 MB", heads(layout, b"OB", 2**25) + bytes(2**25)))
    for flaw, extra in limits:
        hostile = content[: layout.end] + extra + content[layout.end :]
        found = layout_of_header(BytesIO(hostile), preamble=True)
        assert isinstance(found, str)
        assert flaw in found
    for length in range(132, layout.end, 7):
        cut = layout_of_header(BytesIO(content[:length]), preamble=True)
        assert isinstance(cut, str) or cut.pixels is None


@pytest.mark.parametrize(
    "extra",
    [
        element(0x0018, 0x0002, b"CS", b"AXIAL "),  # no attribute of the standard
        element(0x0028, 0x0010, b"US", b"\1\0"),  # Rows, another value
        element(0x0002, 0x0010, b"UI", b"1.2 "),
        implicit(0xFFFE, 0xE0DD, b""),
        struct.pack("<HH2sH", 0x0029, 0x1005, b"--", 0),
        struct.pack("<HH2sH", 0x0029, 0x1005, b"D\1", 4) + b"ABCD",
        element(0x0029, 0x1002, b"SQ", sequence_items(element(0x0008, 0x0100, b"ZZ", b"")), 0xFFFFFFFF),
    ],
)
def test_what_may_be_damage_is_refused(extra, plain):
    assert isinstance(layout_of_header(BytesIO(before_pixels(extra)(plain[1][0])), preamble=True), str)


def test_both_order_and_repetition_are_noted(plain):
    extra = element(0x0019, 0x0010, b"LO", b"VENDOR") * 2
    layout = layout_of_header(BytesIO(before_pixels(extra)(plain[1][0])), preamble=True)
    assert isinstance(layout, Layout)
    assert layout.notes == {Note.DISORDER, Note.TWICE}


@pytest.mark.parametrize(
    ("excess", "read"), [(b"\1" * 18, True), (bytes(20), True), (b"\1" * 20, False), (b"\1", True)]
)
def test_padding_is_less_than_a_row_and_a_column_or_zeros(excess, read, plain, tmp_path):
    """Of 12 rows and 10 columns a column has 24 bytes and a row 20."""
    volume, contents = plain
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.dcm").write_bytes(padded(excess)(content))
    if read:
        found = assembled(tmp_path)
        assert np.array_equal(found.volume.array, volume.array)
        assert any("padding after the pixels of every slice" in warning for warning in found.warnings)
    else:
        with raises_reason(BrokenSeries, "unreadable", names=("0.dcm", "20 more bytes")):
            assembled(tmp_path)
