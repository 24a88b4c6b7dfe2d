"""Technical facts of a series, without patient data or free text from its headers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydicom.uid import UID

from ctflow.core.volume import FloatArray
from ctflow.dicom.attributes import integer, numbers, text
from ctflow.dicom.body_parts import known_value
from ctflow.dicom.read.scan import Instance

MODALITIES = "CT MR PT NM CR DX MG US XA RF OT SC SR SEG PR KO REG RTDOSE RTPLAN RTSTRUCT RTIMAGE DOC"
_SAME_PLACE_MM = 0.01  # of positions that are written with few digits
_POSITIONS = "HFS HFP HFDL HFDR FFS FFP FFDL FFDR"


def describe(instances: Sequence[Instance]) -> dict[str, object]:
    """The facts that `ctflow inspect` shows: numbers and known terms, as any other text may name a patient."""
    header = instances[0].header
    spacing = numbers(header, "PixelSpacing", 2)
    between = slice_spacing_mm(instances)
    return {
        "modality": known_term(MODALITIES, text(header, "Modality")),
        "slices": len(instances),
        "rows": integer(header, "Rows"),
        "columns": integer(header, "Columns"),
        "pixel_spacing_mm": list(spacing) if spacing else None,
        "slice_spacing_mm": round(between, 4) if between is not None else None,
        "body_part": known_value(text(header, "BodyPartExamined")),
        "patient_position": known_term(_POSITIONS, text(header, "PatientPosition")),
        "series_number": integer(header, "SeriesNumber"),
        "transfer_syntaxes": sorted({UID(i.transfer_syntax).name for i in instances}),
    }


def known_term(terms: str, value: str) -> str | None:
    """A known term, or None: anything else may be a name or an ID."""
    return value if value in terms.split() else None


def slice_spacing_mm(instances: Sequence[Instance]) -> float | None:
    """Median distance between neighbouring slices along their normal; None where positions are missing."""
    places = []
    normals: dict[tuple[float, ...], FloatArray] = {}  # nearly always one
    for instance in instances:
        position = numbers(instance.header, "ImagePositionPatient", 3)
        axes = numbers(instance.header, "ImageOrientationPatient", 6)
        if position is None or axes is None:
            return None
        if axes not in normals:
            normals[axes] = np.cross(axes[:3], axes[3:])
        places.append(float(np.dot(normals[axes], position)))
    gaps = np.diff(np.sort(places))
    apart = gaps[gaps > _SAME_PLACE_MM]
    return float(np.median(apart)) if len(apart) else None
