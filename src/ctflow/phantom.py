"""A small synthetic chest CT with round tumours and its truth; the same seed draws the same phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.volume import Geometry, Size3, Volume

FloatVolume = npt.NDArray[np.float32]
Axes = tuple[FloatVolume, FloatVolume, FloatVolume]  # z, y, x in mm, shaped to broadcast over (D, H, W)

# Mean attenuation of tissues at 120 kV, in HU.
AIR, LUNG, FAT, MUSCLE, BLOOD, BONE, TUMOUR = -1000.0, -850.0, -100.0, 45.0, 55.0, 450.0, 40.0
SMALLEST: Size3 = (16, 32, 32)
LARGEST_VOXELS = 2**29  # 1 GB as int16


@dataclass(frozen=True)
class Tumour:
    """One tumour: centre in LPS mm and diameter in mm."""

    centre_mm: tuple[float, float, float]
    diameter_mm: float


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT, the label map (D,H,W) uint8 of its tumours (1 = tumour), and the list of them."""

    volume: Volume
    labels: npt.NDArray[np.uint8]
    tumours: tuple[Tumour, ...]


def phantom_from_seed(seed: int, shape: Size3 = (160, 256, 256)) -> Phantom:
    """Draw a chest of 340 x 260 mm, as long as the shape allows at cubic voxels.

    Args:
        seed: Any non-negative integer; draws the anatomy, the tumours and the noise.
        shape: Voxels along (D, H, W), each at least `SMALLEST`, at most `LARGEST_VOXELS` together.

    Returns:
        The phantom: int16 HU, head first, supine, axial slices.

    Raises:
        ValueError: The shape is too small or too large, or the seed negative.
    """
    if any(n < least for n, least in zip(shape, SMALLEST, strict=True)) or int(np.prod(shape)) > LARGEST_VOXELS:
        raise ValueError(f"a phantom's shape is at least {SMALLEST} and at most {LARGEST_VOXELS} voxels, not {shape}")
    rng = np.random.default_rng(seed)
    spacing_mm = 380.0 / min(shape[1:])
    geometry = _axial_geometry(shape, spacing_mm)
    axes = _coordinates_mm(shape, spacing_mm)
    hu, lungs = _draw_chest(rng, axes)
    tumours, labels = _draw_tumours(rng, hu, lungs, axes, geometry)
    array = np.clip(np.rint(_scan(rng, hu, spacing_mm)), -1024, 3071).astype(np.int16)
    return Phantom(Volume(array, geometry), labels, tumours)


def _axial_geometry(shape: Size3, spacing_mm: float) -> Geometry:
    affine = np.zeros((4, 4))
    affine[2, 0] = affine[1, 1] = affine[0, 2] = spacing_mm  # d -> superior, h -> posterior, w -> left
    affine[:3, 3] = [-(shape[2] - 1) / 2 * spacing_mm, -(shape[1] - 1) / 2 * spacing_mm, -shape[0] / 2 * spacing_mm]
    affine[3, 3] = 1.0
    return Geometry(shape, affine)


def _coordinates_mm(shape: Size3, spacing_mm: float) -> Axes:
    """Coordinates along each axis, centred."""
    d, h, w = ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * spacing_mm for n in shape)
    return d[:, None, None], h[None, :, None], w[None, None, :]


def _draw_chest(rng: np.random.Generator, axes: Axes) -> tuple[FloatVolume, npt.NDArray[np.bool_]]:
    """HU before noise, and where the lungs are."""
    z, y, x = axes
    half_x, half_y = 170 * rng.uniform(0.93, 1.02), 125 * rng.uniform(0.93, 1.02)
    skin = (x / half_x) ** 2 + (y / half_y) ** 2
    hu = np.full(np.broadcast_shapes(z.shape, y.shape, x.shape), AIR, np.float32)
    hu[np.broadcast_to(skin < 1, hu.shape)] = FAT
    hu[np.broadcast_to((x / (half_x - 14)) ** 2 + (y / (half_y - 14)) ** 2 < 1, hu.shape)] = MUSCLE
    length = float(np.ptp(z)) or 1.0
    taper = np.clip(1.1 - 0.35 * (z / length + 0.5), 0.6, 1.0)  # lungs narrow towards the apex
    lungs = np.zeros(hu.shape, bool)
    for side in (-1, 1):
        across = (x - side * 75) / (58 * taper)
        lungs |= across**2 + ((y + 2) / (88 * taper)) ** 2 < 1
    hu[lungs] = LUNG
    _draw_vessels(rng, hu, lungs, axes)
    heart = ((x - 18) / 52) ** 2 + ((y + 30) / 42) ** 2 + ((z + 0.15 * length) / 60) ** 2 < 1
    hu[heart] = BLOOD
    lungs &= ~heart
    hu[np.broadcast_to((x - 22) ** 2 + (y - 45) ** 2 < 12**2, hu.shape)] = BLOOD  # descending aorta
    hu[np.broadcast_to(x**2 + (y + 5) ** 2 < 8**2, hu.shape)] = AIR  # trachea
    _draw_bones(hu, half_x, half_y, axes)
    return hu, lungs & (hu < -500)


def _draw_vessels(rng: np.random.Generator, hu: FloatVolume, lungs: npt.NDArray[np.bool_], axes: Axes) -> None:
    """Straight tubes from the hila outwards, 1 to 4 mm in radius."""
    z, y, x = axes
    for side in (-1, 1):
        for _ in range(14):
            start = np.array([rng.uniform(-20, 20), rng.uniform(-10, 20), side * 32.0])
            way = np.array([rng.normal(0, 0.6), rng.normal(0, 0.8), side * rng.uniform(0.4, 1)])
            way /= np.linalg.norm(way)
            along = (z - start[0]) * way[0] + (y - start[1]) * way[1] + (x - start[2]) * way[2]
            away2 = (z - start[0]) ** 2 + (y - start[1]) ** 2 + (x - start[2]) ** 2 - along**2
            radius = np.clip(rng.uniform(2.5, 4.0) - 0.03 * along, 1.0, None)
            hu[lungs & (along > 0) & (away2 < radius**2)] = BLOOD


def _draw_bones(hu: FloatVolume, half_x: float, half_y: float, axes: Axes) -> None:
    """Vertebrae with discs, a sternum and oblique ribs."""
    z, y, x = axes
    spine = (x / 20) ** 2 + ((y - 72) / 18) ** 2 < 1
    hu[spine & (np.mod(z, 26) < 20)] = BONE
    hu[np.broadcast_to((x / 18) ** 2 + ((y + half_y - 22) / 7) ** 2 < 1, hu.shape)] = BONE
    cage = np.sqrt((x / (half_x - 26)) ** 2 + (y / (half_y - 26)) ** 2)
    hu[(np.abs(cage - 1) < 0.035) & (np.mod(z - 0.35 * y, 27) < 9)] = BONE


def _draw_tumours(
    rng: np.random.Generator,
    hu: FloatVolume,
    lungs: npt.NDArray[np.bool_],
    axes: Axes,
    geometry: Geometry,
) -> tuple[tuple[Tumour, ...], npt.NDArray[np.uint8]]:
    """Three round tumours in the lungs, drawn into `hu`."""
    labels = np.zeros(hu.shape, np.uint8)
    z, y, x = axes
    inside = np.argwhere(ndimage.binary_erosion(lungs, iterations=2))
    tumours: list[Tumour] = []
    for size in (10.0, 18.0, 30.0) if len(inside) else ():
        d, h, w = inside[rng.integers(len(inside))]
        diameter = size * rng.uniform(0.9, 1.2)
        ball = (z - z[d]) ** 2 + (y - y[0, h]) ** 2 + (x - x[0, 0, w]) ** 2 < (diameter / 2) ** 2
        hu[ball], labels[ball] = TUMOUR, 1
        cx, cy, cz = geometry.world_from_index([d, h, w])
        tumours.append(Tumour((float(cx), float(cy), float(cz)), float(diameter)))
    return tuple(tumours), labels


def _scan(rng: np.random.Generator, hu: FloatVolume, spacing_mm: float) -> FloatVolume:
    """Reconstruction blur of 0.6 mm and correlated noise of about 20 HU inside the body."""
    blurred = ndimage.gaussian_filter(hu, 0.6 / spacing_mm)
    noise = ndimage.gaussian_filter(rng.standard_normal(hu.shape, dtype=np.float32), (0.4, 0.8, 0.8))
    scanned: FloatVolume = blurred + noise * (20.0 / float(noise.std()))
    return scanned
