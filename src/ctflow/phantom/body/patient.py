"""Sizes, positions and densities of one synthetic patient."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctflow.phantom.grid import FloatVolume

# Mean attenuation at 120 kV, in HU (textbook ranges; checked against the histogram of LIDC-IDRI-0314).
AIR, FAT, SKIN, MUSCLE, LIVER, SPLEEN, CORTICAL, CARTILAGE = -1000.0, -105.0, -10.0, 52.0, 58.0, 50.0, 780.0, 90.0


@dataclass(frozen=True)
class PhantomPatient:
    """Lengths in mm, densities in HU; z to superior, y to posterior, x to the patient's left, 0 between the lungs.

    Attributes:
        half_width: Of the chest cavity where widest.
        half_depth: Of the chest cavity where deepest.
        apex: Height of the lungs' apices.
        dome: Height of the (right, left) dome of the diaphragm.
        fat: Thickness of the fat under the skin.
        wall: Thickness of muscle and ribs between cavity and fat, at the side.
        breasts: Size of the breasts' fat, 0 for none.
        heart: Scale of the heart.
        blood: Attenuation of blood, higher with contrast medium.
        lung: Attenuation of lung tissue at the middle height.
        gravity: Increase of the lung's density towards the back, HU per mm.
        pressed: Its extra density near the pleura at the back (dependent atelectasis), HU.
        spongy: Attenuation of spongy bone.
        uptake: Share of the blood's contrast medium that organs take up; less in early phases.
        warp_mm, warp_waves, warp_phases: (3, 6), (3, 6, 3), (3, 6): the bends that make every chest different.
    """

    half_width: float
    half_depth: float
    apex: float
    dome: tuple[float, float]
    fat: float
    wall: float
    breasts: float
    heart: float
    blood: float
    lung: float
    gravity: float
    pressed: float
    spongy: float
    warp_mm: npt.NDArray[np.float64]
    warp_waves: npt.NDArray[np.float64]
    warp_phases: npt.NDArray[np.float64]
    uptake: float = 1.0

    @property
    def enhancement(self) -> float:
        """Enhancement of organs that take up as much contrast medium as blood, in HU."""
        return (self.blood - 45) * self.uptake

    def bend(self, z: FloatVolume, y: FloatVolume, x: FloatVolume) -> tuple[FloatVolume, FloatVolume, FloatVolume]:
        """Map points of this patient to the unbent chest; arguments broadcast against each other."""
        bent = []
        for axis, line in enumerate((z, y, x)):
            shift: FloatVolume = np.zeros(1, np.float32)
            for size, wave, phase in zip(
                self.warp_mm[axis], self.warp_waves[axis], self.warp_phases[axis], strict=True
            ):
                a, b, c = (np.float32(k) for k in wave)
                shift = shift + np.float32(size) * np.sin(z * a + y * b + x * c + np.float32(phase))
            bent.append(line + shift)
        return bent[0], bent[1], bent[2]

    def unbend(self, points_mm: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Map (n, 3) points of the unbent chest to this patient (fixed point of `bend`)."""
        target = np.asarray(points_mm, dtype=np.float32)
        points = target
        for _ in range(3):
            bent = np.column_stack(self.bend(points[:, 0], points[:, 1], points[:, 2]))
            points = points - (bent - target)
        return points.astype(np.float64)

    def taper(self, z: FloatVolume) -> FloatVolume:
        """Width of the cavity at a height, as a share of its widest."""
        up = np.clip((z + 35) / (self.apex + 43), 0.0, 0.999)
        share: FloatVolume = np.sqrt(1 - up**2.3)
        return share

    def cavity_centre(self, z: FloatVolume) -> FloatVolume:
        """Middle of the cavity, front to back, at a height: the apices lie far back."""
        centre: FloatVolume = -8 + 22 * np.clip(z / self.apex, 0.0, 1.2) ** 1.5
        return centre

    def spine(self, z: FloatVolume) -> FloatVolume:
        """Middle of the vertebral bodies at a height."""
        # The lumbar spine does not continue to bend forwards as the thoracic spine does.
        z = np.where(z < -170, -170 - 20 * np.tanh((-170 - z) / 20), z)
        middle: FloatVolume = self.half_depth - 27 - 0.0010 * (z - 10) ** 2
        return middle


def patient_from_rng(rng: np.random.Generator) -> PhantomPatient:
    """Draw a patient."""
    contrast = rng.random() < 0.4
    fat = rng.uniform(7, 24)
    waves = 2 * np.pi / rng.uniform(110, 320, (3, 6, 1)) * directions_from_rng(rng, 18).reshape(3, 6, 3)
    return PhantomPatient(
        half_width=rng.uniform(112, 134),
        half_depth=rng.uniform(78, 96),
        apex=rng.uniform(112, 126),
        dome=(rng.uniform(-82, -58), rng.uniform(-92, -68)),
        fat=fat,
        wall=rng.uniform(20, 29),
        breasts=rng.uniform(25, 45) if rng.random() < 0.4 else 0.0,
        heart=rng.uniform(0.88, 1.12),
        blood=rng.uniform(130, 260) if contrast else rng.uniform(38, 52),
        lung=rng.uniform(-885, -825),
        gravity=rng.uniform(0.15, 0.55),
        pressed=rng.uniform(0, 260),
        spongy=rng.uniform(110, 230),
        warp_mm=rng.uniform(0.5, 2.2, (3, 6)),
        warp_waves=waves,
        warp_phases=rng.uniform(0, 2 * np.pi, (3, 6)),
    )


def directions_from_rng(rng: np.random.Generator, count: int) -> npt.NDArray[np.float64]:
    """(count, 3) unit vectors in all directions."""
    vectors = rng.standard_normal((count, 3))
    unit: npt.NDArray[np.float64] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
