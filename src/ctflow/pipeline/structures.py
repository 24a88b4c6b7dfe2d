"""A case's RT Structure Set: what the SEG marks, without specks, as contours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydicom.dataset import Dataset
from scipy import ndimage

from ctflow.core.errors import counted
from ctflow.core.model import ModelSpec, Segment
from ctflow.core.volume import LabelArray
from ctflow.dicom.write.derived import Provenance
from ctflow.dicom.write.structure_set import structure_set_from_labels
from ctflow.measurements.components import marked_part, without_small
from ctflow.pipeline.case import Case
from ctflow.settings.run import Settings

LEAST_ML = 0.05  # of a component: a planning system takes long to list hundreds of specks


def structure_set_of_case(
    case: Case,
    marked: LabelArray,
    segments: Sequence[Segment],
    spec: ModelSpec,
    provenance: Provenance,
    settings: Settings,
) -> tuple[Dataset, str]:
    """Make the structure set of a segmented case, on the SEG's grid, and say what it leaves out ("" if nothing).

    Args:
        case: The case.
        marked: (D, H, W) the SEG's labels on the volume's grid.
        segments: The labels' meaning.
        spec: The model's, with a segment for each class.
        provenance: The labels' origin.
        settings: How holes are written.
    """
    loaded = case.loaded
    own_grid = loaded.is_resampled and case.seg_grid == "resampled"
    large, gone = without_small(marked, LEAST_ML / loaded.volume.geometry.voxel_ml)
    fractions = case.segmented.fractions
    labels = large if own_grid else loaded.on_instances(large)
    remark = (
        f"{counted(gone, f'finding below {LEAST_ML} ml has', f'findings below {LEAST_ML} ml have')} no contours."
        if gone
        else ""
    )
    structures = structure_set_from_labels(
        labels,
        case.prepared,
        replace(spec, segments=_with_contours(labels, segments, spec.segments)),
        provenance,
        holes=settings.rtstruct_holes,
        fractions=fractions if own_grid or fractions is None else loaded.on_instances(fractions),
        grid=loaded.volume.geometry if own_grid else None,
        remark=remark,
    )
    return structures, remark


def _with_contours(labels: LabelArray, segments: Sequence[Segment], classes: Sequence[Segment]) -> tuple[Segment, ...]:
    """Segments of findings that are left, and of every class; a class without such findings has one empty segment."""
    part = marked_part(labels)
    boxes = [] if part is None else ndimage.find_objects(part.labels)
    left = {number for number, box in enumerate(boxes, start=1) if box is not None}
    found = [segment for segment in segments if segment.part_of is None or segment.number in left]
    for of_class in classes:
        own = [segment for segment in segments if segment.part_of == of_class.number]
        if own and not left & {segment.number for segment in own}:
            found.append(replace(of_class, number=own[0].number))
    return tuple(sorted(found, key=lambda segment: segment.number))
