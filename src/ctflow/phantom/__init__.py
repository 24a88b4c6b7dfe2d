"""A synthetic chest CT with tumours, and its truth; the same seed draws the same phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.core.volume import Labels, Size3, Volume
from ctflow.phantom.body.anatomy import anatomy_from_patient, great_vessels
from ctflow.phantom.body.patient import patient_from_rng
from ctflow.phantom.body.skeleton import skeleton_from_patient
from ctflow.phantom.body.tissues import Parts, draw_tissues, draw_tubes
from ctflow.phantom.body.trees import trees_from_lungs
from ctflow.phantom.body.tumours import MOST, Tumour, draw_mimics, draw_tumours, plans_from_rng
from ctflow.phantom.scanner import scan, scanner_from_rng
from ctflow.phantom.scene.scene import patient_in, scanner_in, scene_from_rng
from ctflow.phantom.scene.variety import Variety, variety_from_rng

SMALLEST: Size3 = (16, 32, 32)
LARGEST_VOXELS = 2**29  # 1 GB as int16
_VARIETY = 20  # the random streams of a varied scan; a plain phantom draws from none of them


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT and its truth.

    Attributes:
        volume: int16 HU.
        labels: (D, H, W) uint8: 1 is tumour.
        tumours: One entry each.
        numbers: (D, H, W) uint8: which tumour, counted from 1 as in `tumours`.
        variety: Additional content of a varied scan; None for a plain one.
    """

    volume: Volume
    labels: Labels
    tumours: tuple[Tumour, ...]
    numbers: Labels
    variety: Variety | None = None


def phantom_from_seed(
    seed: int, shape: Size3 = (160, 256, 256), *, tumours: int | None = None, varied: bool = False
) -> Phantom:
    """Draw a chest of about 340 x 240 x 300 mm.

    Args:
        seed: Any non-negative integer; draws the anatomy, the tumours, the scanner and the noise.
        shape: Voxels along (D, H, W), each at least `SMALLEST`, at most `LARGEST_VOXELS` together. Slices are at most
            2.5 mm apart, so fewer than 120 show a part of the chest.
        tumours: How many, 0 to 5; None draws it. With three or more, one is 6 to 10 mm, and at least one sits on
            the pleura and one on a vessel; a varied scan may show too little lung for all of them.
        varied: Whether to vary it as real scans vary: parts of the chest or the abdomen, tight and wide fields of
            view, padding, tables, clothes, arms, metal with streaks, phases of contrast medium, bowel gas.

    Returns:
        The phantom: int16 HU, head first, supine, axial slices.

    Raises:
        ValueError: The shape is too small or too large, the seed negative, or the number of tumours out of range.
    """
    check_phantom_shape(shape)
    if tumours is not None and not 0 <= tumours <= MOST:
        raise ValueError(f"a phantom has 0 to {MOST} tumours, not {tumours}")
    variety = variety_from_rng(np.random.default_rng([seed, _VARIETY])) if varied else None
    return draw_phantom(seed, shape, tumours, variety)


def check_phantom_shape(shape: Size3) -> None:
    """Raise ValueError unless a phantom can have this shape: voxels along (D, H, W)."""
    if any(n < least for n, least in zip(shape, SMALLEST, strict=True)) or int(np.prod(shape)) > LARGEST_VOXELS:
        raise ValueError(f"a phantom's shape is at least {SMALLEST} and at most {LARGEST_VOXELS} voxels, not {shape}")


def draw_phantom(seed: int, shape: Size3, tumours: int | None, variety: Variety | None) -> Phantom:
    """Like `phantom_from_seed`, with the given variety; None draws a plain phantom."""
    # One random stream per part: the number of tumours does not change anatomy and noise.
    streams = [np.random.default_rng([seed, part]) for part in range(5)]
    grid = (variety or Variety()).grid(shape)
    edge_mm = max(1.0, 0.75 * grid.spacing_mm[1])
    patient, scanner = patient_from_rng(streams[0]), scanner_from_rng(streams[1])
    added = [np.random.default_rng([seed, _VARIETY + 1 + part]) for part in range(4)]
    if variety is not None:
        patient, scanner = patient_in(patient, variety), scanner_in(added[0], scanner)
    vessels = great_vessels(patient)
    anatomy = anatomy_from_patient(streams[0], patient, grid, vessels)
    scene = None if variety is None else scene_from_rng(added[:3], variety, patient, anatomy, grid)
    anatomy, lung, share = (
        (anatomy, anatomy.lung, 1.0) if scene is None else (scene.anatomy, scene.seen_lung, scene.share)
    )
    trees, skeleton = trees_from_lungs(streams[2], patient, anatomy.lung, share), skeleton_from_patient(patient)
    hu, skin = draw_tissues(streams[0], grid, patient, anatomy, edge_mm, scene)
    draw_tubes(
        hu, grid, patient, anatomy, Parts(vessels, trees, scene.with_bones(skeleton) if scene else skeleton), edge_mm
    )
    count = int(streams[3].integers(0, MOST + 1)) if tumours is None else tumours
    plans = plans_from_rng(streams[3], count)
    value = 34.0 + 0.25 * max(0.0, patient.enhancement)  # tumours take up some contrast medium
    found, numbers = draw_tumours(streams[3], hu, grid, lung, trees.arteries, plans, value=value, edge_mm=edge_mm)
    draw_mimics(streams[2], hu, grid, anatomy.lung, edge_mm, numbers)
    dense = [] if scene is None else scene.draw_dense(hu, grid, edge_mm)
    scan(streams[4], hu, grid, scanner, skin)
    if scene is not None:
        scene.disturb(added[3], hu, grid, dense)
    np.rint(hu, out=hu)
    array = np.clip(hu, -1024, 3071, out=hu).astype(np.int16)
    padding = None if scene is None else scene.pad(array, numbers, grid)
    volume = Volume(array, grid.geometry, padding)
    return Phantom(volume, (numbers > 0).astype(np.uint8), found, numbers, variety)
