"""A label map as NIfTI, for research tools that read no DICOM."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np

from ctflow.core.atomic import write_atomically
from ctflow.core.volume import Geometry, LabelArray

_HEADER_BYTES = 352  # 348 of header, 4 that say that no extension follows
_TYPES = {np.dtype(np.uint8): (2, 8), np.dtype(np.uint16): (512, 16)}  # code and bits
_LABEL = 1002  # intent: values are labels
_SCANNER = 1  # sform: millimetres in the scanner's coordinates
_MM = 2


def write_nifti(labels: LabelArray, geometry: Geometry, path: Path) -> None:
    """Write labels as .nii.gz; the same labels give the same bytes, and the file holds no patient data.

    Args:
        labels: (D, H, W) uint8 or uint16.
        geometry: Their position, in LPS mm; NIfTI stores it in RAS mm.
        path: Replaced if it exists.

    Raises:
        ValueError: Labels and geometry differ in shape, or an axis is longer than NIfTI-1 can say (32767).
        OutputError: It cannot be written.

    Source: NIfTI-1.1, nifti1.h.
    """
    if labels.shape != geometry.shape or max(labels.shape) > np.iinfo(np.int16).max:
        raise ValueError(f"labels {labels.shape} do not lie on a grid of {geometry.shape} that NIfTI-1 can hold")
    content = io.BytesIO()
    # Without the file's name and the time. Masks are mostly empty: level 1 is as small, and quick.
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, compresslevel=1, mtime=0) as stream:
        stream.write(_header(labels, geometry))
        stream.write(np.ascontiguousarray(labels, labels.dtype.newbyteorder("<")).data)
    write_atomically(path, lambda stream: stream.write(content.getvalue()))


def _header(labels: LabelArray, geometry: Geometry) -> bytes:
    depth, height, width = labels.shape
    code, bits = _TYPES[labels.dtype]
    between_slices, between_rows, between_columns = geometry.spacing_mm
    # The first index runs fastest in NIfTI: (w, h, d), which is the same bytes.
    affine = geometry.affine_mm[:3, [2, 1, 0, 3]] * np.array([[-1.0], [-1.0], [1.0]])
    header = bytearray(_HEADER_BYTES)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, width, height, depth, 1, 1, 1, 1)
    struct.pack_into("<3h", header, 68, _LABEL, code, bits)
    struct.pack_into("<8f", header, 76, 1, between_columns, between_rows, between_slices, 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, _HEADER_BYTES, 1, 0)  # offset of the values; slope, intercept
    struct.pack_into("<B", header, 123, _MM)
    # Only the sform: a sheared grid has no qform, and two statements may differ.
    struct.pack_into("<2h", header, 252, 0, _SCANNER)
    struct.pack_into("<12f", header, 280, *affine.reshape(-1))
    struct.pack_into("<4s", header, 344, b"n+1")
    return bytes(header)
