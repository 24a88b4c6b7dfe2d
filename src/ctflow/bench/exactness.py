"""Agreement of a mask with the truth: as a whole, lesion by lesion, and over many cases. Arrays in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import KDTree

from ctflow.core.volume import FloatArray
from ctflow.measurements.lengths import longest_distance_mm

SIZE_CLASSES_MM = ((6.0, 10.0), (10.0, 20.0), (20.0, 60.0))  # equivalent diameter: from, and below
TUMOUR_FREE_ML = 0.2  # a 7 mm sphere: marks up to this volume do not count against a tumour-free case

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
SpacingMm = tuple[float, float, float]
_Numbers = npt.NDArray[np.int32]
_TOUCHING = ndimage.generate_binary_structure(3, 3)  # 26 neighbours, as `ctflow.measurements` counts components


@dataclass(frozen=True)
class MaskComparison:
    """A found mask against the true one.

    Attributes:
        dice: 2 |A and B| / (|A| + |B|); 1 if both are empty.
        hausdorff95_mm: The larger of the two directed 95th percentiles of surface distances; None if one is empty. A
            false finding or a missed lesion counts with its distance to the other mask, which may be half a chest.
        volume_found_ml: Volume of the found mask.
        volume_truth_ml: Volume of the true mask.
        volume_error_ml: Found minus true.
    """

    dice: float
    hausdorff95_mm: float | None
    volume_found_ml: float
    volume_truth_ml: float
    volume_error_ml: float


@dataclass(frozen=True)
class Lesion:
    """One true lesion and its match.

    Attributes:
        equivalent_diameter_mm: Diameter of the sphere of its volume.
        longest_diameter_mm: Largest distance between two of its voxel centres.
        volume_ml: Its volume.
        dice: Against the found components that touch it, without their voxels in other lesions; 0 if missed.
        hit: Whether any found component touches it.
        hausdorff95_mm: As in `MaskComparison`, between the lesion and the mask that `dice` uses; None if missed.
    """

    equivalent_diameter_mm: float
    longest_diameter_mm: float
    volume_ml: float
    dice: float
    hit: bool
    hausdorff95_mm: float | None


@dataclass(frozen=True)
class FalsePositive:
    """A found component that touches no true lesion.

    Attributes:
        equivalent_diameter_mm: Diameter of the sphere of its volume.
        volume_ml: Its volume.
        centroid: Mean index (d, h, w) of its voxels.
    """

    equivalent_diameter_mm: float
    volume_ml: float
    centroid: tuple[float, float, float]


@dataclass(frozen=True)
class LesionComparison:
    """True lesions in the order of their numbers; false positives, the largest first."""

    lesions: tuple[Lesion, ...]
    false_positives: tuple[FalsePositive, ...]


@dataclass(frozen=True)
class CaseComparison:
    """Both views of one case."""

    masks: MaskComparison
    lesions: LesionComparison


def dice_of(found: Array, truth: Array) -> float:
    """Dice of two masks, any nonzero value being marked.

    Args:
        found: (D, H, W).
        truth: (D, H, W).

    Returns:
        0 to 1; 1 if both are empty.
    """
    total = _voxels(found) + _voxels(truth)
    both = _voxels((found != 0) & (truth != 0))
    return 2.0 * both / total if total else 1.0


def compare_masks(found: Array, truth: Array, spacing_mm: SpacingMm) -> MaskComparison:
    """Compare two masks as a whole.

    Args:
        found: (D, H, W); any nonzero value is marked.
        truth: (D, H, W), likewise.
        spacing_mm: Distance of voxel centres along (D, H, W), on an orthogonal grid.

    Returns:
        The comparison.

    Raises:
        ValueError: The shapes differ.
    """
    box = _common_box(found, truth)
    if box is None:
        return MaskComparison(1.0, None, 0.0, 0.0, 0.0)
    found, truth = found[box] != 0, truth[box] != 0
    found_ml, truth_ml = (_voxels(mask) * _voxel_ml(spacing_mm) for mask in (found, truth))
    distance = _hausdorff95_mm(found, truth, spacing_mm) if found_ml and truth_ml else None
    return MaskComparison(dice_of(found, truth), distance, found_ml, truth_ml, found_ml - truth_ml)


def compare_lesions(found: Array, truth: Array, spacing_mm: SpacingMm) -> LesionComparison:
    """Compare lesion by lesion.

    Args:
        found: (D, H, W); any nonzero value is marked. Its components (26 neighbours) are the findings.
        truth: (D, H, W). Of bool, each component is a lesion; of integers, each nonzero value is one, so that lesions
            that touch stay apart.
        spacing_mm: Distance of voxel centres along (D, H, W), on an orthogonal grid.

    Returns:
        Every true lesion, and every found component that touches none.

    Raises:
        ValueError: The shapes differ.
    """
    box = _common_box(found, truth)
    if box is None:
        return LesionComparison((), ())
    numbers = _numbered_lesions(truth[box])
    components, count = ndimage.label(found[box] != 0, structure=_TOUCHING)
    voxels = np.bincount(components[components > 0], minlength=count + 1)
    inside = numbers > 0
    lesion_of, component_of = numbers[inside], components[inside]
    claimed = np.bincount(component_of, minlength=len(voxels))  # voxels of each component in any lesion
    dice = _dice_of_lesions(lesion_of, component_of, voxels - claimed)
    distances = _hausdorff95_of_lesions(numbers, components, spacing_mm)
    lesions = tuple(
        _lesion(numbers[place] == number, float(dice[number]), distances.get(number), spacing_mm)
        for number, place in enumerate(ndimage.find_objects(numbers), start=1)
    )
    unclaimed = (voxels > 0) & (claimed == 0)
    false = [number for number in np.argsort(-voxels, kind="stable") if number and unclaimed[number]]
    corner = np.array([axis.start for axis in box])
    return LesionComparison(lesions, tuple(_false_positives(components, false, corner, _voxel_ml(spacing_mm))))


def _voxels(mask: Array) -> int:
    return int(np.count_nonzero(mask))  # JSON does not accept numpy's integers


def _voxel_ml(spacing_mm: SpacingMm) -> float:
    return math.prod(spacing_mm) / 1000.0


def _equivalent_diameter_mm(volume_ml: float) -> float:
    return float((6.0 * volume_ml * 1000.0 / math.pi) ** (1.0 / 3.0))


def _common_box(found: Array, truth: Array) -> tuple[slice, slice, slice] | None:
    """Bounding box of all marks of either; None if there are none. All further work is a fraction of the volume."""
    if found.shape != truth.shape or found.ndim != 3:
        raise ValueError(f"found {found.shape} and truth {truth.shape} do not lie on one grid")
    marked = (found != 0) | (truth != 0)
    return next(iter(ndimage.find_objects(marked.view(np.uint8))), None)


def _hausdorff95_mm(found: Mask, truth: Mask, spacing_mm: SpacingMm) -> float:
    """As MONAI's `compute_hausdorff_distance(percentile=95)`: surfaces are the voxels that erosion removes."""
    a, b = _surface_mm(found, spacing_mm), _surface_mm(truth, spacing_mm)
    there, back = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _surface_mm(mask: Mask, spacing_mm: SpacingMm) -> FloatArray:
    """(n, 3) mm: the marked voxels with an unmarked one, or the array's border, at one of their six faces."""
    points: FloatArray = np.argwhere(mask & ~ndimage.binary_erosion(mask)) * np.asarray(spacing_mm)
    return points


def _numbered_lesions(truth: Array) -> _Numbers:
    """Lesions as 1, 2, ...; the background is 0."""
    if truth.dtype == np.bool_:
        labelled: _Numbers = ndimage.label(truth, structure=_TOUCHING)[0]
        return labelled
    numbers = np.zeros(truth.shape, np.int32)
    marked = truth != 0
    numbers[marked] = np.unique(truth[marked], return_inverse=True)[1] + 1
    return numbers


def _dice_of_lesions(lesion_of: _Numbers, component_of: _Numbers, outside: npt.NDArray[np.int64]) -> FloatArray:
    """Dice of each lesion by its number.

    Args:
        lesion_of: (n,) lesion of each voxel in one.
        component_of: (n,) found component there, 0 for none.
        outside: Voxels of each component outside all lesions.

    Returns:
        (lesions + 1,); 0 for a lesion that nothing touches.
    """
    size = np.bincount(lesion_of)
    touched = component_of > 0
    both = np.bincount(lesion_of[touched], minlength=len(size))
    pairs = np.unique(np.stack([lesion_of[touched], component_of[touched]]), axis=1)
    beyond = np.bincount(pairs[0], weights=outside[pairs[1]], minlength=len(size))
    dice: FloatArray = 2.0 * both / np.maximum(size + both + beyond, 1)
    return dice


def _hausdorff95_of_lesions(numbers: _Numbers, components: _Numbers, spacing_mm: SpacingMm) -> dict[int, float]:
    """From each touched lesion to the components that touch it, without their voxels in other lesions."""
    both = (numbers > 0) & (components > 0)
    pairs = np.unique(np.stack([numbers[both], components[both]]), axis=1)
    lesion_boxes, component_boxes = ndimage.find_objects(numbers), ndimage.find_objects(components)
    distances = {}
    for number in np.unique(pairs[0]):
        touching = pairs[1][pairs[0] == number]
        boxes = [lesion_boxes[number - 1], *(component_boxes[index - 1] for index in touching)]
        axes = zip(*boxes, strict=True)
        box = tuple(slice(min(one.start for one in axis), max(one.stop for one in axis)) for axis in axes)
        lesion = numbers[box] == number
        found = np.isin(components[box], touching) & (lesion | (numbers[box] == 0))
        distances[int(number)] = _hausdorff95_mm(found, lesion, spacing_mm)
    return distances


def _false_positives(
    components: _Numbers, false: Sequence[int], corner: npt.NDArray[np.int64], voxel_ml: float
) -> Iterator[FalsePositive]:
    """The components of these numbers; `corner` is the index of the array's first voxel in the volume."""
    boxes = ndimage.find_objects(components)
    for number in false:
        box = boxes[number - 1]
        inside = np.argwhere(components[box] == number)
        d, h, w = (float(mean) for mean in inside.mean(axis=0) + [axis.start for axis in box] + corner)
        volume_ml = len(inside) * voxel_ml
        yield FalsePositive(_equivalent_diameter_mm(volume_ml), volume_ml, (d, h, w))


def _lesion(mask: Mask, dice: float, hausdorff95_mm: float | None, spacing_mm: SpacingMm) -> Lesion:
    volume_ml = _voxels(mask) * _voxel_ml(spacing_mm)
    longest_mm = longest_distance_mm(_surface_mm(mask, spacing_mm))
    return Lesion(_equivalent_diameter_mm(volume_ml), longest_mm, volume_ml, dice, dice > 0, hausdorff95_mm)


@dataclass(frozen=True)
class Tally:
    """Lesions of one size class, or all.

    Attributes:
        lesions: True lesions.
        hits: Found ones of these.
        sensitivity: hits / lesions; None without lesions.
        mean_dice: Over the true lesions, a missed one counting as 0; None without lesions.
        mean_hausdorff95_mm: Over the found ones; None without one.
        false_positives: Found components that touch no lesion; their own size decides their class.
        false_positives_a_case: Over all cases; None without cases.
    """

    lesions: int
    hits: int
    sensitivity: float | None
    mean_dice: float | None
    mean_hausdorff95_mm: float | None
    false_positives: int
    false_positives_a_case: float | None


def summarise(cases: Sequence[CaseComparison]) -> dict[str, Any]:
    """Figures over many cases, as JSON values.

    Args:
        cases: One entry per case, with or without true lesions.

    Returns:
        cases, cases_with_truth, mean_dice (over those), tumour_free {cases, clean, limit_ml}, overall (`Tally`) and
        by_size (a `Tally` with from_mm and to_mm for each of `SIZE_CLASSES_MM`; smaller and larger lesions count only
        in overall). None replaces a division by zero.
    """
    with_truth = [case for case in cases if case.lesions.lesions]
    tumour_free = [case for case in cases if not case.lesions.lesions]
    clean = [all(found.volume_ml <= TUMOUR_FREE_ML for found in case.lesions.false_positives) for case in tumour_free]
    return {
        "cases": len(cases),
        "cases_with_truth": len(with_truth),
        "mean_dice": _mean([case.masks.dice for case in with_truth]),
        "tumour_free": {"cases": len(tumour_free), "clean": sum(clean), "limit_ml": TUMOUR_FREE_ML},
        "overall": asdict(_tally(cases, 0.0, math.inf)),
        "by_size": [
            {"from_mm": low, "to_mm": high, **asdict(_tally(cases, low, high))} for low, high in SIZE_CLASSES_MM
        ],
    }


def _tally(cases: Sequence[CaseComparison], low_mm: float, high_mm: float) -> Tally:
    def fits(item: Lesion | FalsePositive) -> bool:
        return low_mm <= item.equivalent_diameter_mm < high_mm

    lesions = [lesion for case in cases for lesion in case.lesions.lesions if fits(lesion)]
    false = sum(fits(found) for case in cases for found in case.lesions.false_positives)
    return Tally(
        lesions=len(lesions),
        hits=sum(lesion.hit for lesion in lesions),
        sensitivity=_mean([float(lesion.hit) for lesion in lesions]),
        mean_dice=_mean([lesion.dice for lesion in lesions]),
        mean_hausdorff95_mm=mean_hausdorff95_mm(lesions),
        false_positives=false,
        false_positives_a_case=false / len(cases) if cases else None,
    )


def mean_hausdorff95_mm(lesions: Sequence[Lesion]) -> float | None:
    """Over the lesions that were found; None if none was."""
    return _mean([lesion.hausdorff95_mm for lesion in lesions if lesion.hausdorff95_mm is not None])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
