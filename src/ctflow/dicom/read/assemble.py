"""Slices to a Volume in Hounsfield units: exact, or rejected."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from pydicom.uid import UID

from ctflow.compat.pydicom import lenient
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import LEAST_SHARE, PADDING_HU, FloatArray, Volume
from ctflow.dicom.attributes import integer, number, text
from ctflow.dicom.read.geometry.stack import Stack, stack_of_series
from ctflow.dicom.read.pixels.decode import Slice, SliceReader, in_threads
from ctflow.dicom.read.pixels.encoding import encoding_warnings
from ctflow.dicom.read.pixels.frames import slices_unlike_both_neighbours
from ctflow.dicom.read.pixels.stored import LOSSY, PixelFormat, pixel_format_of, read_stored_into, unsupported
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.series import Series

Empty = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]
_Array = TypeVar("_Array", bound=npt.NDArray[Any])


@dataclass(frozen=True, eq=False)
class Assembled:
    """A series as a volume.

    Attributes:
        volume: HU and geometry.
        instances: The slices, in array order.
        slices: Index d of each slice in the volume, or the nearest index if the volume was resampled.
        warnings: For the user.
        outside: (D, H, W) bool, voxels of the untilted grid that no tilted slice reaches; None for other volumes.
    """

    volume: Volume
    instances: tuple[Instance, ...]
    slices: tuple[int, ...]
    warnings: tuple[str, ...]
    outside: npt.NDArray[np.bool_] | None = None

    @property
    def is_resampled(self) -> bool:
        """Whether the volume's grid differs from the slices' own."""
        return self.outside is not None or self.slices != tuple(range(self.volume.geometry.shape[0]))

    def on_instances(self, values: _Array) -> _Array:
        """(..., D, H, W) values of the volume as (..., instances, H, W) values of the slices."""
        return cast(_Array, values[..., list(self.slices), :, :]) if self.is_resampled else values


@dataclass(frozen=True)
class _Rescale:
    """How one slice's stored values become HU, and its padding range (stored values, both ends included)."""

    form: PixelFormat
    slope: float
    intercept: float
    padding: tuple[int, int] | None

    @property
    def integral(self) -> bool:
        return self.slope == int(self.slope) and self.intercept == int(self.intercept)


@lenient()
def assemble_series(
    series: Series,
    progress: Progress = silent,
    *,
    allow_gaps: bool = False,
    empty: Empty = np.empty,
) -> Assembled:
    """Read a series into a volume.

    Args:
        series: The slices in any order.
        progress: Called for every slice, as stage "read".
        allow_gaps: Interpolate a single missing slice.
        empty: Makes the array of stored values, which are converted in place where HU fit int16.

    Returns:
        The volume: int16 where every slope and intercept is integral, all values fit and no slice is interpolated, else
        float32.

    Raises:
        BrokenSeries: The slices do not form one regular grid, or pixels are missing.
        UnsupportedPixels: The values cannot be turned into HU without guessing.

    Source: DICOM PS3.3 C.7.5.1.1.2 (padding), C.11.1 (modality LUT), C.8.2.1 (CT image).
    """
    with closing(SliceReader(series.instances)) as reader:
        stack = stack_of_series(series, allow_gaps=allow_gaps)
        rescales = [_rescale_of(instance) for instance in stack.instances]
        raw, padding, fits = _stacked(reader, stack, rescales, empty, progress)
    array = _hounsfield(raw, rescales, padding, small=fits)
    doubtful = _doubtful_frames(array, stack.instances)
    weights = stack.spacing.weights
    if weights is not None:
        array, padding = _resampled(array, padding, weights)
    volume = Volume(array, stack.geometry, padding)
    warnings = (*encoding_warnings(stack.instances), *stack.warnings, *_lossy_warnings(stack.instances), *doubtful)
    return Assembled(volume, stack.instances, stack.spacing.nearest, warnings)


def _stacked(
    reader: SliceReader, stack: Stack, rescales: list[_Rescale], empty: Empty, progress: Progress
) -> tuple[Slice, npt.NDArray[np.bool_] | None, bool]:
    """Stored values of all slices, the padding mask (None: no padding), and whether all HU fit int16."""
    depth, (_, *size) = len(rescales), stack.geometry.shape
    raw: Slice = empty((depth, *size), np.uint16)
    # Memory is taken only when a slice with padding is written.
    padding = np.zeros(raw.shape, bool) if any(rescale.padding for rescale in rescales) else None

    def read(d: int) -> tuple[bool, bool]:
        read_stored_into(stack.instances[d], rescales[d].form, raw[d])
        return _taken(raw[d], rescales[d], None if padding is None else padding[d])

    def decoded() -> Generator[tuple[bool, bool], None, None]:
        forms = [rescale.form for rescale in rescales]
        for d, values in enumerate(reader.read(stack.instances, forms, *size)):
            raw[d] = values
            yield _taken(raw[d], rescales[d], None if padding is None else padding[d])

    native = all(instance.pixel_offset is not None for instance in stack.instances)
    padded, fits = False, True
    progress("read", 0, depth)
    with closing(in_threads(read, depth) if native else decoded()) as slices:
        for d, (has_padding, has_fit) in enumerate(slices):
            padded, fits = padded or has_padding, fits and has_fit
            progress("read", d + 1, depth)
    return raw, padding if padded else None, fits


def _taken(pattern: Slice, rescale: _Rescale, padding: npt.NDArray[np.bool_] | None) -> tuple[bool, bool]:
    """Mark padding and clear bits above HighBit; return whether there is padding and whether the HU fit int16."""
    mask = _padding_mask(pattern, rescale)
    if mask is not None and padding is not None:
        padding[:] = mask
    _clear_spare_bits(pattern, rescale.form)
    return mask is not None, _fits_int16(pattern, rescale, mask)


def _resampled(
    array: npt.NDArray[Any], padding: npt.NDArray[np.bool_] | None, weights: FloatArray
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]:
    """Interpolate slices linearly between their two neighbours; a voxel that padding contributed to is padding."""
    result = np.empty((len(weights), *array.shape[1:]), np.float32)
    marks = np.zeros(result.shape, bool) if padding is not None else None
    for k, row in enumerate(weights):
        used = np.flatnonzero(row > LEAST_SHARE)
        result[k] = sum(row[d] * array[d].astype(np.float32) for d in used)
        if marks is not None and padding is not None:
            marks[k] = padding[used].any(axis=0)
            result[k][marks[k]] = PADDING_HU
    return result, marks


def _rescale_of(instance: Instance) -> _Rescale:
    header = instance.header
    kind = text(header, "RescaleType").upper()
    if kind not in ("", "HU"):
        raise unsupported(
            instance, "its RescaleType is not HU (iodine or effective-Z maps are not CT numbers)", reason="not-hu"
        )
    if "ModalityLUTSequence" in header:
        raise unsupported(instance, "a Modality LUT instead of a rescale slope is not supported", reason="modality-lut")
    slope, intercept = number(header, "RescaleSlope"), number(header, "RescaleIntercept")
    if slope is None or intercept is None or slope <= 0:
        raise unsupported(
            instance, "RescaleSlope or RescaleIntercept is absent or not a usable number", reason="no-rescale"
        )
    form = pixel_format_of(instance)
    return _Rescale(form, slope, intercept, _padding_of(instance, form))


def _padding_of(instance: Instance, form: PixelFormat) -> tuple[int, int] | None:
    first = integer(instance.header, "PixelPaddingValue")
    if first is None:
        return None
    limit = integer(instance.header, "PixelPaddingRangeLimit")
    ends = [_as_stored(value, form) for value in (first, first if limit is None else limit)]
    return min(ends), max(ends)


def _as_stored(value: int, form: PixelFormat) -> int:
    """A padding value as the pixels hold it: its VR may be US although the pixels are signed, and vice versa."""
    pattern = value & 0xFFFF
    return pattern - 0x10000 if form.signed and pattern >= 0x8000 else pattern


def _unmasked(pattern: npt.NDArray[np.uint16], form: PixelFormat) -> npt.NDArray[Any]:
    return pattern.view(np.int16) if form.signed else pattern


def _padding_mask(pattern: npt.NDArray[np.uint16], rescale: _Rescale) -> npt.NDArray[np.bool_] | None:
    """The slice's padding mask, compared on stored values; None without padding."""
    if rescale.padding is None:
        return None
    stored = _unmasked(pattern, rescale.form)
    low, high = rescale.padding
    mask: npt.NDArray[np.bool_] = (stored == low) if low == high else (stored >= low) & (stored <= high)
    return mask if mask.any() else None


def _clear_spare_bits(pattern: Slice, form: PixelFormat) -> None:
    """Sign-extend into the bits above HighBit, in place: they may hold old overlays."""
    spare = 16 - form.bits_stored  # 8 bit values were widened
    if spare:
        np.left_shift(pattern, spare, out=pattern)
        values = _unmasked(pattern, form)
        np.right_shift(values, spare, out=values)


def _fits_int16(pattern: Slice, rescale: _Rescale, mask: npt.NDArray[np.bool_] | None) -> bool:
    if not rescale.integral:
        return False
    stored = _unmasked(pattern, rescale.form)
    if _are_int16(stored, rescale):
        return True
    # Padding is often far below all HU, and is ignored.
    return mask is not None and _are_int16(stored[~mask], rescale)


def _are_int16(stored: npt.NDArray[Any], rescale: _Rescale) -> bool:
    if not stored.size:
        return True
    low, high = (int(value) * rescale.slope + rescale.intercept for value in (stored.min(), stored.max()))
    return low >= -32768 and high <= 32767


def _hounsfield(
    raw: npt.NDArray[np.uint16],
    rescales: list[_Rescale],
    padding: npt.NDArray[np.bool_] | None,
    *,
    small: bool,
) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """HU of every slice: in place where they fit int16, so that a large series is held once."""
    result = raw.view(np.int16) if small else np.empty(raw.shape, np.float32)

    def rescale(d: int) -> None:
        slope, intercept = rescales[d].slope, rescales[d].intercept
        if small:
            # int16 arithmetic may wrap around in between; the result is right because it fits.
            if slope != 1:
                result[d] *= np.int16(_wrapped(slope))
            result[d] += np.int16(_wrapped(intercept))
        else:
            result[d] = _unmasked(raw[d], rescales[d].form).astype(np.float64) * slope + intercept
        if padding is not None:
            result[d][padding[d]] = PADDING_HU

    for _ in in_threads(rescale, len(rescales)):
        pass
    return result


def _wrapped(value: float) -> int:
    """An integral number modulo 2**16, as int16 holds it."""
    return (int(value) + 0x8000) % 0x10000 - 0x8000


def _doubtful_frames(array: npt.NDArray[Any], instances: tuple[Instance, ...]) -> tuple[str, ...]:
    """Compressed frames have no checksum: most damage still decodes, but to a different image."""
    if all(instance.pixel_offset is not None for instance in instances):
        return ()
    names = [instances[d].name for d in slices_unlike_both_neighbours(array) if instances[d].pixel_offset is None]
    if not names:
        return ()
    return (f"pixels of {', '.join(names)} differ strongly from both neighbours': its compressed frame may be damaged",)


def _lossy_warnings(instances: tuple[Instance, ...]) -> tuple[str, ...]:
    names = sorted({UID(i.transfer_syntax).name for i in instances if i.transfer_syntax in LOSSY})
    if names:
        return (f"pixels were compressed with loss ({', '.join(names)}): HU are not exact",)
    if any(text(i.header, "LossyImageCompression") == "01" for i in instances):
        return ("pixels were once compressed with loss (LossyImageCompression 01): HU are not exact",)
    return ()
