"""One slice's stored values, whatever the transfer syntax."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom import uid
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.utils import pixel_array

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.dicom.attributes import PARSE_ERRORS, integer_of_texts, texts
from ctflow.dicom.read.pixels.frames import encoded_frame, family_of_frame, flaw_of_rle, flaw_of_size
from ctflow.dicom.read.scan import NATIVE, Instance

Stored = npt.NDArray[np.uint16] | npt.NDArray[np.int16]

# The decoders, by pydicom's plugin names: always the same one, whatever else is installed. For OpenJPEG the one
# without threads, as slices are decoded in processes: GDCM starts a thread per core and slice, and costs more in all.
_DECODERS = {
    uid.HTJ2K: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.RLELossless: "pylibjpeg",
}
_ENCAPSULATED_UNCOMPRESSED = "1.2.840.10008.1.2.1.98"
# With the method that LossyImageCompressionMethod names (DICOM PS3.3 C.7.6.1.1.5.1).
LOSSY = {uid.HTJ2K: "ISO_15444_15", uid.JPEG2000: "ISO_15444_1", uid.JPEGLSNearLossless: "ISO_14495_1"}
_DECODED = _DECODERS.keys() | {uid.DeflatedExplicitVRLittleEndian}
# Every transfer syntax that gives correct HU.
READABLE = tuple(sorted(NATIVE | _DECODED))
_DESCRIBING = ("PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
# The family that a frame of each must have (`family_of_frame`).
_FAMILIES = {
    **dict.fromkeys(
        (uid.HTJ2K, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.JPEG2000, uid.JPEG2000Lossless), "JPEG 2000"
    ),
    **dict.fromkeys((uid.JPEGLossless, uid.JPEGLosslessSV1), "JPEG Lossless"),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), "JPEG-LS"),
    uid.RLELossless: "RLE",
}
# Decoder errors that become UnsupportedPixels; decoder plugins raise RuntimeError.
_DECODE_ERRORS = (*PARSE_ERRORS, RuntimeError)


@dataclass(frozen=True)
class PixelFormat:
    """How one slice's values are stored (DICOM PS3.3 C.7.6.3).

    Attributes:
        bits_allocated: 8 or 16.
        bits_stored: 1 to `bits_allocated`.
        signed: Two's complement.
    """

    bits_allocated: int
    bits_stored: int
    signed: bool


@dataclass(frozen=True)
class _UnknownFormat:
    """Why values have no `PixelFormat`."""

    reason: str
    what: str


def pixel_format_of(instance: Instance) -> PixelFormat:
    """The format of a slice's values; raises `UnsupportedPixels` where ctflow would have to guess."""
    found = _format_of(*(texts(instance.header, keyword) for keyword in _DESCRIBING))
    if isinstance(found, PixelFormat):
        return found
    raise unsupported(instance, found.what, reason=found.reason)


@lru_cache(2**8)
def _format_of(*values: tuple[str, ...]) -> PixelFormat | _UnknownFormat:
    """From the values of `_DESCRIBING` to the format, or to the reason and what is wrong; once for equal slices."""
    lacking = [keyword for keyword, value in zip(_DESCRIBING, values, strict=True) if not (value and value[0])]
    if lacking:
        return _UnknownFormat(
            "no-pixel-format", f"its {', '.join(lacking)} is empty or absent: have the sender repair it"
        )
    photometric, *numbers = values
    allocated, stored, high, representation = map(integer_of_texts, numbers)
    if photometric[0] != "MONOCHROME2":
        return _UnknownFormat("photometric", "its PhotometricInterpretation is not MONOCHROME2, as CT in HU is")
    if allocated not in (8, 16) or stored is None or not 1 <= stored <= allocated:
        return _UnknownFormat("pixel-format", f"BitsAllocated {allocated} with BitsStored {stored} is not supported")
    if high != stored - 1 or representation not in (0, 1):
        what = f"HighBit {high} or PixelRepresentation {representation} is not supported"
        return _UnknownFormat("pixel-format", what)
    return PixelFormat(allocated, stored, representation == 1)


def unsupported(instance: Instance, what: str, *, reason: str) -> UnsupportedPixels:
    """An `UnsupportedPixels` that names the file."""
    return UnsupportedPixels(f"{instance.name}: {what}", reason=reason)


def read_stored(instance: Instance, form: PixelFormat, rows: int, columns: int) -> npt.NDArray[np.uint16]:
    """The stored values of a slice as 16 bit patterns, neither masked nor rescaled.

    Args:
        instance: The slice.
        form: Its format.
        rows: Height.
        columns: Width.

    Returns:
        (rows, columns) uint16; signed values as their two's complement.

    Raises:
        BrokenSeries: The pixel data is shorter than the image.
        UnsupportedPixels: The transfer syntax does not give correct HU, or the slice does not decode.
    """
    if instance.pixel_offset is not None:
        values = _read_native(instance, form, rows, columns)
    else:
        values = _decode(instance, form, rows, columns)
    if form.bits_allocated == 8:
        # Widened with their sign, so that later code handles 16 bits only.
        values = (values.view(np.int8).astype(np.int16) if form.signed else values.astype(np.int16)).view(np.uint16)
    return values.view(np.uint16).reshape(rows, columns)


def read_stored_into(instance: Instance, form: PixelFormat, out: npt.NDArray[np.uint16]) -> None:
    """Like `read_stored`, but into a (rows, columns) slice of a volume: native 16 bit values without a copy."""
    if instance.pixel_offset is None or form.bits_allocated == 8:
        out[:] = read_stored(instance, form, *out.shape)
        return
    _fill(instance, out, *out.shape)
    if instance.transfer_syntax == uid.ExplicitVRBigEndian:
        out.byteswap(inplace=True)


def _read_native(instance: Instance, form: PixelFormat, rows: int, columns: int) -> npt.NDArray[np.generic]:
    values = np.empty(rows * columns, np.uint8 if form.bits_allocated == 8 else np.uint16)
    _fill(instance, values, rows, columns)
    if instance.transfer_syntax != uid.ExplicitVRBigEndian:
        return values
    if form.bits_allocated == 16:
        return values.byteswap()
    return values.reshape(-1, 2)[:, ::-1].reshape(-1) if values.size % 2 == 0 and _is_word(instance) else values


def _fill(instance: Instance, values: npt.NDArray[np.generic], rows: int, columns: int) -> None:
    """Read native values, unchanged, into an array of their number and width."""
    wanted, excess = values.nbytes, instance.pixel_length - values.nbytes
    if not 0 <= excess < wanted:
        raise _broken(instance, f"has {instance.pixel_length} bytes of pixels, but its size needs {wanted}")
    try:
        with instance.path.open("rb") as stream:
            stream.seek(instance.pixel_offset or 0)
            found = stream.readinto(values.data)
            behind = stream.read(excess) if excess > wanted % 2 else b""
    except OSError as error:
        raise BrokenSeries(f"{instance.name}: {error.strerror}", reason="unreadable") from error
    if found != wanted or (excess > wanted % 2 and len(behind) != excess):
        raise _broken(instance, "is cut short")
    # Wrong Rows or Columns leave at least a row or column of pixels after the image, hardly ever all zeros.
    if len(behind) >= min(rows, columns) * values.itemsize and any(behind):
        what = f"has {excess} more bytes of pixels than its size needs, and they are not padding"
        raise _broken(instance, what)


def _broken(instance: Instance, what: str) -> BrokenSeries:
    return BrokenSeries(f"{instance.name} {what}: send the series again", reason="unreadable")


def _check_frame(instance: Instance, dataset: pydicom.Dataset, form: PixelFormat, rows: int, columns: int) -> None:
    """Reject what decoders miss or crash on: a frame of another kind or size, an RLE frame of another length."""
    syntax = uid.UID(instance.transfer_syntax)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        wanted = rows * columns * form.bits_allocated // 8
        if len(dataset.PixelData) not in (wanted, wanted + wanted % 2):
            raise unsupported(instance, f"its {syntax.name} pixels decode to another size", reason="decoded-size")
        return
    if not dataset["PixelData"].is_undefined_length:
        raise unsupported(
            instance,
            f"its transfer syntax is {syntax.name}, but its pixel data is not encapsulated",
            reason="not-encapsulated",
        )
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    family = family_of_frame(frame)
    if family not in (None, _FAMILIES[syntax]):
        raise unsupported(
            instance, f"its transfer syntax is {syntax.name}, but its frame is {family}", reason="other-codec"
        )
    if syntax == uid.RLELossless:
        flaw = flaw_of_rle(frame, rows * columns, form.bits_allocated // 8)
    else:
        flaw = flaw_of_size(frame, rows, columns)
    if flaw:
        raise unsupported(instance, f"its {syntax.name} frame {flaw}: have it sent again", reason="damaged-frame")


def _flaw_of_syntax(syntax: uid.UID) -> str:
    """Why no decoder reads a transfer syntax here."""
    named = f"{syntax.name} ({syntax})"
    if not syntax.is_valid:
        flaw = "its TransferSyntaxUID is not a UID"  # not quoted: it may be anything
    elif syntax in NATIVE:
        flaw = f"its transfer syntax is {syntax.name}, but its pixel data is encapsulated"
    elif syntax.is_private:
        flaw = f"its transfer syntax {syntax} is private: have it sent in a standard transfer syntax"
    elif syntax.type != "Transfer Syntax":
        flaw = f"its TransferSyntaxUID {syntax} is not a transfer syntax of the standard"
    elif syntax.is_retired:
        flaw = f"its transfer syntax {named} is retired: have it sent in another"
    elif syntax.is_compressed and syntax != _ENCAPSULATED_UNCOMPRESSED:
        flaw = f"transfer syntax {named} does not give exact Hounsfield units"
    else:
        flaw = f"transfer syntax {named} is not supported: have it sent in another"
    return flaw


def _is_word(instance: Instance) -> bool:
    """Whether 8 bit values are packed in big-endian words (VR OW), where each pair is swapped."""
    with instance.path.open("rb") as stream:
        stream.seek((instance.pixel_offset or 0) - 8)
        return stream.read(2) == b"OW"


def _as_dataset(instance: Instance, form: PixelFormat, rows: int, columns: int) -> pydicom.Dataset:
    """A frame as the pixel data of a single-frame image."""
    if instance.encoded_offset is None:
        what = (
            f"its transfer syntax is {uid.UID(instance.transfer_syntax).name}, but its pixel data is not encapsulated"
        )
        raise unsupported(instance, what, reason="not-encapsulated")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = uid.UID(instance.transfer_syntax)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = rows, columns, 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", int(form.signed)
    dataset.BitsAllocated, dataset.BitsStored = form.bits_allocated, form.bits_stored
    dataset.HighBit = form.bits_stored - 1
    dataset.PixelData = encapsulate([encoded_frame(instance)])
    dataset["PixelData"].is_undefined_length = True
    return dataset


def _decode(instance: Instance, form: PixelFormat, rows: int, columns: int) -> npt.NDArray[np.generic]:
    syntax = uid.UID(instance.transfer_syntax)
    if syntax not in _DECODED:
        raise unsupported(instance, _flaw_of_syntax(syntax), reason="transfer-syntax")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn about padding; the length is checked below
            dataset = (
                pydicom.dcmread(instance.path) if instance.frame is None else _as_dataset(instance, form, rows, columns)
            )
            _check_frame(instance, dataset, form, rows, columns)
            decoded = pixel_array(dataset, raw=True, decoding_plugin=_DECODERS.get(syntax, ""))
    except _DECODE_ERRORS as error:
        raise unsupported(
            instance, f"its {syntax.name} pixels do not decode ({type(error).__name__})", reason="not-decodable"
        ) from error
    if decoded.size != rows * columns or decoded.dtype.itemsize * 8 != form.bits_allocated:
        raise unsupported(instance, f"its {syntax.name} pixels decode to another size", reason="decoded-size")
    if syntax.is_compressed and syntax != uid.DeflatedExplicitVRLittleEndian and not decoded.any():
        raise unsupported(
            instance, f"its {syntax.name} pixels decode to zeros only: the frame is damaged", reason="decoded-zeros"
        )
    return np.ascontiguousarray(decoded).reshape(-1)
