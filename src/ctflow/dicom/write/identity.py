"""Object identity: UIDs derive from content, so the same result is the same object."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping

import numpy as np
from pydicom.uid import UID

from ctflow.core.volume import LabelArray, box_of_marked, marked_lines

_NAMESPACE = uuid.UUID("6f0c7a52-8f0f-5d0e-9c34-5b1f6f8f1c11")


def uid_from_parts(*parts: str) -> UID:
    """A UID derived from its parts.

    Args:
        parts: Any texts; their order and boundaries matter.

    Returns:
        "2.25." and a name-based UUID as a decimal number (DICOM PS3.5 B.2, RFC 9562 version 5).
    """
    return UID(f"2.25.{uuid.uuid5(_NAMESPACE, json.dumps(parts)).int}")


def series_uid(source_series_uid: str, model_name: str, model_version: str, kind: str, instance: str) -> UID:
    """SeriesInstanceUID of a result: a series for each source series, model, kind of object and instance.

    Viewers show one object of a series (OHIF 3.13): in a series with others, a revision would hide them, or be hidden.

    Args:
        source_series_uid: Of the slices.
        model_name: The model's.
        model_version: The model's.
        kind: Of the object: "SEG", "SR", ...
        instance: The object's SOPInstanceUID, which follows from slices, settings and content.
    """
    return uid_from_parts("series", source_series_uid, model_name, model_version, kind, instance)


def instance_uid(
    source_instance_uids: Iterable[str],
    weights_digest: str,
    ctflow_version: str,
    settings: Mapping[str, str | int | float | bool | None],
    mask_digest: str,
) -> UID:
    """SOPInstanceUID of a result.

    Args:
        source_instance_uids: Of the slices, in any order.
        weights_digest: SHA-256 of the model's weights.
        ctflow_version: The version that wrote it.
        settings: Every setting that changes the result.
        mask_digest: See `digest_of_mask`.
    """
    sources = json.dumps(sorted(source_instance_uids))
    return uid_from_parts(
        "instance", sources, weights_digest, ctflow_version, json.dumps(dict(settings), sort_keys=True), mask_digest
    )


def digest_of_mask(labels: LabelArray) -> str:
    """SHA-256 of a label map's shape, and of position and values of the lines that mark anything, in hexadecimal."""
    lines = marked_lines(labels)
    box = box_of_marked(labels, lines)
    place = None if box is None else [(axis.start, axis.stop) for axis in box]
    digest = hashlib.sha256(repr((labels.shape, place)).encode())
    if box is not None:  # most of a volume is background, which needs no digest
        own = lines[box[:-1]]
        digest.update(np.packbits(own).data)
        for part, marked in zip(labels[box], own, strict=True):  # a copy of the whole takes as long as its digest
            digest.update(part[marked].data)
    return digest.hexdigest()
