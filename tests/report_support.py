"""A small result, as the reports show it."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pypdfium2
from pydicom.dataset import Dataset

from ctflow.core.model import RESEARCH_ONLY, Code, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.measurements.measure import measure_segments
from ctflow.report.result import series_result

ANY = Code("1", "99", "any")
TUMOUR = Segment(1, "Lung tumour", ANY, ANY)
NODE = Segment(2, "Lymph node", ANY, ANY)
SHAPE = (24, 40, 48)  # slices of 5 mm, rows of 1 mm, columns of 2 mm


def affine_of(columns) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(columns)
    affine[:3, 3] = (-45.0, -20.0, 100.0)
    return affine


HEAD_FIRST = affine_of([(0, 0, 5), (0, 1, 0), (2, 0, 0)])


def some_volume(affine=HEAD_FIRST) -> Volume:
    """-800 HU; 40 HU in the patient's right half of the lower slices."""
    hu = np.full(SHAPE, -800, np.int16)
    hu[:12, :, :24] = 40
    return Volume(hu, Geometry(SHAPE, affine))


def some_labels() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[14:19, 8:18, 30:38] = 1
    labels[4:6, 28:32, 8:12] = 1
    labels[20, 30:33, 30:33] = 2
    return labels


def document_of(volume, labels, segments=(TUMOUR, NODE), **changed):
    measured = measure_segments(labels, volume, segments)
    facts = {
        "status": "done",
        "series": {
            "digest": "0123456789ab",
            "series_instance_uid": "1.2.3",
            "slices": len(labels),
            "shape": list(labels.shape),
            "spacing_mm": list(volume.geometry.spacing_mm),
        },
        "model": {"name": "model", "version": "1.0", "weights_digest": "ab" * 32},
        "engine": {"backend": "eager", "precision": "fp32", "device": "cpu"},
        "window": {"roi": [64, 64, 64], "overlap": 0.25, "blend": "gaussian", "batch_size": 1},
        "settings": {},
        "stage_seconds": {},
        "segments": [asdict(entry) for entry in measured],
        "warnings": [],
        "research_only": RESEARCH_ONLY,
        "intended_use": "Tests.",
        "folder": "1.2.3",
        "error": None,
    }
    return series_result(**{**facts, **changed})


def text_of_pdf(content: bytes | Dataset) -> list[str]:
    """The text of each page of a PDF or an Encapsulated PDF, with single blanks."""
    if isinstance(content, Dataset):
        content = content.EncapsulatedDocument[: content.EncapsulatedDocumentLength]
    return [" ".join(page.get_textpage().get_text_bounded().split()) for page in pypdfium2.PdfDocument(content)]
