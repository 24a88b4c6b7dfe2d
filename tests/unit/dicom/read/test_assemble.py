from __future__ import annotations

import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.volume import Volume
from ctflow.dicom.read.pixels.stored import pixel_format_of, read_stored
from ctflow.dicom.read.scan import scan_folder
from dicom_support import COLUMNS, DEPTH, ROWS, assembled, small_volume
from reasons import raises_reason


def each(**attributes):
    def adjust(dataset, _index):
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)

    return adjust


def refuses(folder, reason, *named):
    with raises_reason(UnsupportedPixels, reason, names=("0000", *named)):  # the file is named
        assembled(folder)


@pytest.mark.parametrize(("signed", "intercept"), [(False, -1024), (True, 0), (True, -1024), (False, -2000)])
def test_hounsfield_units_are_exact(write, volume, signed, intercept):
    result = assembled(write(signed=signed, intercept=intercept))
    assert result.volume.array.dtype == np.int16
    assert np.array_equal(result.volume.array, volume.array)
    assert result.volume.padding is None
    assert result.warnings == ()


def test_progress_counts_slices(write):
    from ctflow.dicom.read.assemble import assemble_series  # noqa: PLC0415
    from ctflow.dicom.read.select.selection import select_series  # noqa: PLC0415

    steps = []
    (candidate,) = select_series(scan_folder(write())).selected
    assemble_series(candidate.series, lambda *step: steps.append(step))
    assert steps == [("read", n, DEPTH) for n in range(DEPTH + 1)]


def test_an_unsigned_first_slice_does_not_wrap_the_others(write, volume):
    """The first slice is all above 0 HU; the rest reaches -1000."""
    array = volume.array.copy()
    array[0] = 100
    result = assembled(write(Volume(array, volume.geometry)))
    assert result.volume.array.dtype == np.int16
    assert np.array_equal(result.volume.array, array)


def test_fractional_rescale_is_kept_as_float(write):
    def adjust(dataset, _index):
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-1000.25"

    folder = write(adjust=adjust)
    array = assembled(folder).volume.array
    stored = np.stack([pydicom.dcmread(path).pixel_array for path in sorted(folder.iterdir())])
    assert array.dtype == np.float32
    assert np.array_equal(array, (stored * 0.5 - 1000.25).astype(np.float32))


def test_rescale_may_differ_from_slice_to_slice(write, volume):
    def adjust(dataset, index):
        dataset.RescaleSlope, dataset.RescaleIntercept = str(1 + index % 2), str(-1024 - index)

    folder = write(adjust=adjust)
    array = assembled(folder).volume.array
    stored = volume.array.astype(int) + 1024
    expected = np.stack([stored[d] * (1 + d % 2) - 1024 - d for d in range(DEPTH)])
    assert array.dtype == np.int16
    assert np.array_equal(array, expected)


def test_values_beyond_int16_become_float_not_wrapped(write, volume):
    array = assembled(write(adjust=each(RescaleSlope="40", RescaleIntercept="-40960"))).volume.array
    assert array.dtype == np.float32
    assert np.array_equal(array, volume.array.astype(np.float32) * 40)


@pytest.mark.parametrize("vr", ["US", "SS"])
def test_padding_becomes_air_and_a_mask_whatever_its_vr(write, volume, vr):
    """Stored -32768 with intercept -1024 would be -33792 HU."""
    pixels = volume.array.copy()
    pixels[2, :3] = -32768 + 1024

    def adjust(dataset, index):
        stored = pixels[index].astype(int) - 1024 + 0
        stored = np.where(pixels[index] == -32768 + 1024, -32768, volume.array[index] + 1024)
        dataset.PixelData = stored.astype("<i2").tobytes()
        dataset.PixelRepresentation = 1
        dataset.add_new("PixelPaddingValue", vr, -32768 if vr == "SS" else 32768)

    result = assembled(write(adjust=adjust))
    assert result.volume.array.dtype == np.int16
    assert (result.volume.array[2, :3] == -1024).all()
    assert result.volume.padding[2, :3].all()
    assert int(result.volume.padding.sum()) == 3 * COLUMNS
    assert np.array_equal(result.volume.array[3:], volume.array[3:])


def test_a_padding_range_covers_both_ends(write, volume):
    def adjust(dataset, _index):
        dataset.add_new("PixelPaddingValue", "US", 10)
        dataset.add_new("PixelPaddingRangeLimit", "US", 0)

    result = assembled(write(adjust=adjust))
    expected = (volume.array + 1024 <= 10) & (volume.array + 1024 >= 0)
    assert expected.any()
    assert np.array_equal(result.volume.padding, expected)
    assert (result.volume.array[expected] == -1024).all()


def test_padding_that_nowhere_occurs_leaves_no_mask(write):
    assert assembled(write(adjust=lambda d, _: d.add_new("PixelPaddingValue", "US", 60000))).volume.padding is None


def test_bits_above_high_bit_are_masked(write, volume):
    def adjust(dataset, index):
        dataset.BitsStored, dataset.HighBit = 12, 11
        stored = (volume.array[index].astype(int) + 1024).astype(np.uint16) | 0xF000
        dataset.PixelData = stored.astype("<u2").tobytes()

    assert np.array_equal(assembled(write(adjust=adjust)).volume.array, volume.array)


def test_twelve_bit_signed_values_keep_their_sign(write):
    small = small_volume()
    values = np.clip(small.array, -1024, 1023)

    def adjust(dataset, index):
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 1
        dataset.RescaleIntercept = "0"
        dataset.PixelData = (values[index].astype("<i2").view("<u2") & 0x0FFF).tobytes()

    assert np.array_equal(assembled(write(adjust=adjust)).volume.array, values)


@pytest.mark.parametrize("signed", [False, True])
def test_eight_bit_images_are_read(write, signed):
    values = np.random.default_rng(1).integers(-100 if signed else 0, 100, (DEPTH, ROWS, COLUMNS))

    def adjust(dataset, index):
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation, dataset.RescaleIntercept = 7, int(signed), "-500"
        dataset.PixelData = values[index].astype(np.int8 if signed else np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"

    assert np.array_equal(assembled(write(adjust=adjust)).volume.array, values - 500)


@pytest.mark.parametrize("signed", [False, True])
def test_the_bit_above_seven_of_eight_is_masked(write, signed):
    values = np.random.default_rng(1).integers(-64 if signed else 0, 64 if signed else 128, (DEPTH, ROWS, COLUMNS))

    def adjust(dataset, index):
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 7, 6
        dataset.PixelRepresentation, dataset.RescaleIntercept = int(signed), "-500"
        dataset.PixelData = ((values[index] & 0x7F) | (0 if signed else 0x80)).astype(np.uint8).tobytes()
        dataset["PixelData"].VR = "OB"

    assert np.array_equal(assembled(write(adjust=adjust)).volume.array, values - 500)


@pytest.mark.parametrize(
    ("attributes", "named", "reason"),
    [
        ({"RescaleType": "US"}, "RescaleType", "not-hu"),
        ({"RescaleType": "MGML"}, "RescaleType", "not-hu"),
        ({"RescaleSlope": "0"}, "RescaleSlope", "no-rescale"),
        ({"RescaleSlope": None}, "RescaleSlope", "no-rescale"),
        ({"RescaleSlope": "-1"}, "RescaleSlope", "no-rescale"),
        ({"RescaleIntercept": ""}, "RescaleIntercept", "no-rescale"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "MONOCHROME2", "photometric"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "MONOCHROME2", "photometric"),
        ({"BitsAllocated": 32}, "BitsAllocated 32", "pixel-format"),
        ({"BitsStored": 17}, "BitsStored 17", "pixel-format"),
        ({"BitsStored": None}, "BitsStored", "no-pixel-format"),
        ({"HighBit": 14}, "HighBit 14", "pixel-format"),
        ({"PixelRepresentation": None}, "PixelRepresentation", "no-pixel-format"),
        ({"ModalityLUTSequence": []}, "Modality LUT", "modality-lut"),
    ],
)
def test_what_would_need_guessing_is_refused(write, attributes, named, reason):
    refuses(write(adjust=each(**attributes)), reason, named)


@pytest.mark.parametrize("kind", [None, "", "HU", "hu "])
def test_rescale_type_absent_or_hu_is_hounsfield(write, volume, kind):
    assert np.array_equal(assembled(write(adjust=each(RescaleType=kind))).volume.array, volume.array)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless, ExplicitVRBigEndian])
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_transfer_syntaxes_give_the_same_volume(write, syntax, signed):
    volume = small_volume(shape=(DEPTH, 32, 40))
    folder = write(volume, signed=signed, intercept=-1024 if not signed else 0)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        if syntax.is_compressed:
            dataset.compress(syntax, generate_instance_uid=False)
            dataset.save_as(path)
        else:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            dataset.file_meta.TransferSyntaxUID = syntax
            pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=False, force_encoding=True)
    result = assembled(folder)
    assert np.array_equal(result.volume.array, volume.array)
    assert result.warnings == ()


def test_pixels_cut_short_are_named(write):
    folder = write()
    path = folder / "00005.dcm"
    path.write_bytes(path.read_bytes()[:-20])
    with raises_reason(BrokenSeries, "unreadable", names="00005.dcm") as caught:
        assembled(folder)
    assert caught.value.reason == "unreadable"


def test_a_wrong_pixel_length_is_named(write):
    def adjust(dataset, index):
        if index == 2:
            dataset.PixelData = dataset.PixelData[:-4]

    with raises_reason(BrokenSeries, "unreadable", names=("00002.dcm", "236", "240")):
        assembled(write(adjust=adjust))


def test_a_file_that_vanished_is_named(write):
    from ctflow.dicom.read.assemble import assemble_series  # noqa: PLC0415
    from ctflow.dicom.read.select.selection import select_series  # noqa: PLC0415

    folder = write()
    (candidate,) = select_series(scan_folder(folder)).selected
    (folder / "00004.dcm").unlink()
    with raises_reason(BrokenSeries, "unreadable", names=("00004.dcm", "No such file")):
        assemble_series(candidate.series)


def compressed(write):
    folder = write(small_volume(shape=(DEPTH, 32, 40)))
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(JPEG2000Lossless, generate_instance_uid=False)
        dataset.save_as(path)
    return folder


def test_a_damaged_compressed_frame_is_refused(write):
    folder = compressed(write)
    path = folder / "00000.dcm"
    content = path.read_bytes()
    at = content.index(b"\xff\x4f\xff\x51")
    path.write_bytes(content[: at + 40] + bytes(60) + content[at + 100 :])
    refuses(folder, "damaged-frame", "JPEG 2000")


def test_a_frame_that_decodes_to_zeros_is_refused(write):
    empty = Volume(np.full((DEPTH, 32, 40), -1024, np.int16), small_volume(shape=(DEPTH, 32, 40)).geometry)
    folder = write(empty)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)
    refuses(folder, "decoded-zeros")


def test_a_frame_of_another_size_is_refused(write):
    folder = compressed(write)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.Columns = 41
        dataset.save_as(path)
    refuses(folder, "damaged-frame", "JPEG 2000")


@pytest.mark.parametrize("syntax", ["50", "51", "53", "55"])
def test_lossy_jpeg_is_refused_by_name(data, syntax):
    (instance,) = (
        i for i in scan_folder(data / "transfer-syntaxes").instances if i.path.name.endswith(f".4.{syntax}.dcm")
    )
    with raises_reason(UnsupportedPixels, "transfer-syntax", names=f"1.2.840.10008.1.2.4.{syntax}"):
        read_stored(instance, pixel_format_of(instance), 512, 512)


LOSSLESS = ["1.2", "1.2.1", "1.2.1.99", "1.2.2", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90", "1.2.5"]


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_real_lossless_files_hold_the_same_values(data, syntax):
    instances = {
        i.transfer_syntax: i for i in scan_folder(data / "transfer-syntaxes").instances if i.path.name.startswith("CT")
    }
    reference = pydicom.dcmread(data / "transfer-syntaxes" / "CTImage.dcm").pixel_array
    instance = instances[f"1.2.840.10008.{syntax}"]
    values = read_stored(instance, pixel_format_of(instance), 512, 512)
    assert np.array_equal(values.view(np.int16), reference)


@pytest.mark.parametrize(("syntax", "most"), [("1.2.4.91", 6), ("1.2.4.81", 2)])
def test_real_lossy_files_are_close(data, syntax, most):
    instances = {
        i.transfer_syntax: i for i in scan_folder(data / "transfer-syntaxes").instances if i.path.name.startswith("CT")
    }
    reference = pydicom.dcmread(data / "transfer-syntaxes" / "CTImage.dcm").pixel_array
    instance = instances[f"1.2.840.10008.{syntax}"]
    values = read_stored(instance, pixel_format_of(instance), 512, 512).view(np.int16)
    assert 0 < np.abs(values.astype(int) - reference).max() <= most


def test_loss_is_warned_about(write):
    assert "LossyImageCompression" in assembled(write(adjust=each(LossyImageCompression="01"))).warnings[0]
    folder = write(small_volume(shape=(DEPTH, 32, 40)))
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.compress("1.2.840.10008.1.2.4.81", jls_error=1, generate_instance_uid=False)
        dataset.save_as(path)
    (warning,) = assembled(folder).warnings
    assert "JPEG-LS Lossy" in warning
