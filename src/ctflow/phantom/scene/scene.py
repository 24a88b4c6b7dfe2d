"""A varied scan: additions to a plain chest before, during and after drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import PADDING_HU, Box
from ctflow.phantom.body.abdomen import Organ, Space, abdominal_wall, gas_in_stomach, liver_edge, organs_from_rng
from ctflow.phantom.body.anatomy import Anatomy, joined
from ctflow.phantom.body.limbs import Limbs, arms_from_rng, with_limbs
from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.body.skeleton import Skeleton
from ctflow.phantom.grid import Field, FloatVolume, Grid
from ctflow.phantom.paint import Tubes, paint_tubes, smooth_max, smooth_min, tubes_along
from ctflow.phantom.scanner import Scanner
from ctflow.phantom.scene.clothes import Layer, draw_fasteners, fasteners_from_rng, layers_from_rng
from ctflow.phantom.scene.implants import Implants, draw_implants, implants_from_rng
from ctflow.phantom.scene.streaks import add_starvation, add_streaks, dense_in
from ctflow.phantom.scene.tables import Beneath, table_from_rng
from ctflow.phantom.scene.variety import Padding, Variety

_LUNGS_ML = 2600.0  # both lungs of a whole chest; a part of them has its share of vessels
_BEYOND_MM = 2.0  # no tumour is drawn closer to the circle


@dataclass(frozen=True, eq=False)
class Scene:
    """Content of a varied scan besides the chest.

    Attributes:
        variety: The drawn variety.
        anatomy: The chest's, with neck, arms and a bounded abdomen.
        beneath: The table.
        back_mm: Position of the patient's back on it (y).
        layers: Clothes and blanket.
        fasteners: Objects on them and on the skin, with HU.
        organs: Abdominal organs.
        bones: Bones of the arms.
        implants: Metal.
        inflow: Veins with undiluted contrast medium, and its HU.
        seen_lung: The lungs inside the scan circle.
        share: Share of the lungs in view.
        width_mm: (D,) patient width in each slice.
    """

    variety: Variety
    anatomy: Anatomy
    beneath: Beneath
    back_mm: float
    layers: tuple[Layer, ...]
    fasteners: list[tuple[Tubes, float]]
    organs: tuple[Organ, ...]
    bones: Tubes | None
    implants: Implants
    inflow: tuple[Tubes, float] | None
    seen_lung: Field
    share: float
    width_mm: FloatVolume

    def surroundings(self, box: Box) -> FloatVolume:
        """HU of the patient's surroundings, in a box of whole slices."""
        hu = self.beneath.in_box(box)
        for layer in self.layers:
            layer.draw(hu, box)
        return hu

    def with_bones(self, skeleton: Skeleton) -> Skeleton:
        """The skeleton and the arms' bones."""
        return skeleton if self.bones is None else replace(skeleton, bones=joined([skeleton.bones, self.bones]))

    def draw_dense(self, hu: FloatVolume, grid: Grid, edge_mm: float) -> list[tuple[int, FloatVolume]]:
        """Draw contrast medium, metal and fasteners, in place; return the parts that cause streaks, by slice."""
        if self.inflow is not None:
            paint_tubes(hu, grid, *self.inflow, edge_mm)
        draw_implants(hu, grid, self.implants, edge_mm)
        above = 2500.0 if self.inflow is None else 850.0  # all but metal; all but metal and this contrast medium
        has_streaks = self.implants.tubes or self.implants.cans or self.inflow
        dense = dense_in(hu, grid, above, self.back_mm) if has_streaks else []
        draw_fasteners(hu, grid, self.fasteners, edge_mm)
        return dense

    def disturb(
        self, rng: np.random.Generator, hu: FloatVolume, grid: Grid, dense: list[tuple[int, FloatVolume]]
    ) -> None:
        """Add streaks to the scanned slices, in place."""
        add_streaks(rng, hu, grid, dense, float(rng.uniform(0.35, 1.1)))
        add_starvation(rng, hu, grid, self.width_mm)

    def pad(
        self, array: npt.NDArray[np.int16], numbers: npt.NDArray[np.uint8], grid: Grid
    ) -> npt.NDArray[np.bool_] | None:
        """Write padding into slices and truth, in place; return its mask if the scanner declares it."""
        padding = self.variety.padding
        if padding is None:
            return None
        outside = outside_circle(grid, padding)
        array[:, outside] = PADDING_HU if padding.declared else padding.hu
        numbers[:, outside] = 0
        return np.broadcast_to(outside, array.shape).copy() if padding.declared and outside.any() else None


def patient_in(patient: PhantomPatient, variety: Variety) -> PhantomPatient:
    """The patient with this scan's contrast medium."""
    return patient if variety.blood is None else replace(patient, blood=variety.blood, uptake=variety.uptake)


def scanner_in(rng: np.random.Generator, scanner: Scanner) -> Scanner:
    """Softer and sharper kernels, lower and higher doses than a plain phantom's."""
    blur = scanner.blur_mm * float(rng.uniform(0.8, 1.5))
    noise = scanner.noise_hu * float(rng.uniform(0.4, 1.3))
    return Scanner(blur, noise, scanner.grain_mm * blur / scanner.blur_mm)


def scene_from_rng(
    streams: Sequence[np.random.Generator], variety: Variety, patient: PhantomPatient, plain: Anatomy, grid: Grid
) -> Scene:
    """Add the scan's variety to a plain chest.

    Args:
        streams: Draw body, surroundings and metal separately: other metal does not change the rest.
        variety: The scan's variety.
        patient: The patient.
        plain: The chest's fields.
        grid: The grid to draw on.
    """
    coarse = plain.skin.coarse_grid
    axes = patient.bend(*coarse.axes)
    body, around, metal = streams
    limbs = arms_from_rng(body, patient, variety.arms)
    trunk = plain.skin.coarse_values
    wall = smooth_max(plain.muscle.coarse_values, abdominal_wall(axes, plain.cavity.coarse_values), 6.0)
    skin, muscle = with_limbs(limbs, coarse, axes, trunk, wall)
    implants = implants_from_rng(metal, patient, variety.metal, muscle, coarse, limbs.shoulders if limbs else ())
    for can in implants.cans:  # the skin bulges over a can
        box, away = can.distance(coarse, 4.0)
        if box is not None:
            skin[box] = smooth_min(skin[box], away, 6.0)
    inside = np.flatnonzero((trunk < 0).any(axis=(0, 2)))
    back = float(coarse.lines_mm[1][inside[-1]]) if len(inside) else 120.0
    space = Space(coarse, grid, axes, plain.cavity.coarse_values, plain.lung.coarse_values)
    lung = plain.lung.coarse_values
    seen = lung if variety.padding is None else in_circle(lung, coarse, variety.padding)
    litres = float((lung < 0).sum()) * float(np.prod(coarse.spacing_mm)) / 1000
    return Scene(
        variety=variety,
        anatomy=_with_abdomen(body, plain, space, skin, muscle),
        beneath=table_from_rng(around, grid, variety.table, back),
        back_mm=back,
        layers=tuple(layers_from_rng(around, variety, skin, coarse, grid)),
        fasteners=fasteners_from_rng(around, variety, skin, coarse),
        organs=organs_from_rng(body, patient, space),
        bones=None if limbs is None else limbs.bones,
        implants=implants,
        inflow=_inflow(metal, patient, variety.inflow),
        seen_lung=Field(seen, coarse, grid),
        share=min(1.0, litres / _LUNGS_ML),
        width_mm=_widths(skin, coarse, grid, limbs),
    )


def _with_abdomen(
    rng: np.random.Generator, plain: Anatomy, space: Space, skin: FloatVolume, muscle: FloatVolume
) -> Anatomy:
    """The chest with another outline, a liver with a lower end, and another fluid level in the stomach."""

    def field(values: FloatVolume) -> Field:
        return Field(values, space.coarse, space.fine)

    liver = smooth_max(plain.liver.coarse_values, liver_edge(space.axes, rng.uniform(-225, -185)), 12.0)
    gas = gas_in_stomach(plain.stomach.coarse_values, space.axes, float(rng.uniform(-58, 20)))
    return replace(plain, skin=field(skin), muscle=field(muscle), liver=field(liver), gas=field(gas))


def _inflow(rng: np.random.Generator, patient: PhantomPatient, side: int) -> tuple[Tubes, float] | None:
    """Contrast medium on its way from the arm to the right atrium."""
    if not side:
        return None
    line = [(96, 4, side * 165), (112, -14, side * 110), (114, -24, side * 62), (108, -18, side * 36)]
    line += [(86, -24, 8), (74, -16, -20)] if side > 0 else [(92, -14, -24)]
    line += [(60, -13, -24), (20, -14, -28), (-14, -12, -26)]
    radii = [3.5, 4, 5, 6, *([6, 7] if side > 0 else [7]), 8, 8.5, 8]
    return tubes_along(patient.unbend(line), radii), float(rng.uniform(900, 2200))


def _widths(skin: FloatVolume, coarse: Grid, grid: Grid, limbs: Limbs | None) -> FloatVolume:
    """Width that lateral rays cross, in each slice."""
    inside = (skin < 0).any(axis=1).sum(axis=1) * coarse.spacing_mm[2]
    heights = coarse.lines_mm[0]
    if limbs is not None:  # rays also cross parts outside the field of view
        arms = np.concatenate([limbs.outline.starts_mm, limbs.outline.ends_mm])
        inside = np.where((heights > arms[:, 0].min()) & (heights < arms[:, 0].max()), inside + 50, inside)
    widths: FloatVolume = np.interp(grid.lines_mm[0], heights, inside)
    return widths


def distance_to_circle(grid: Grid, padding: Padding) -> FloatVolume:
    """(1, H, W) signed distance to the scan circle in mm, negative inside."""
    _, y, x = grid.axes
    middle_y, middle_x = (
        np.float32(middle + away) for middle, away in zip(grid.centre_mm[1:], padding.centre_mm, strict=True)
    )
    distance: FloatVolume = np.sqrt((y - middle_y) ** 2 + (x - middle_x) ** 2) - np.float32(padding.radius_mm)
    return distance


def in_circle(lung: FloatVolume, coarse: Grid, padding: Padding) -> FloatVolume:
    """Distance to the visible part of the lungs, on the coarse grid."""
    seen: FloatVolume = np.maximum(lung, distance_to_circle(coarse, padding) + np.float32(_BEYOND_MM))
    return seen


def outside_circle(grid: Grid, padding: Padding) -> npt.NDArray[np.bool_]:
    """(H, W), true outside the scan circle."""
    outside: npt.NDArray[np.bool_] = distance_to_circle(grid, padding)[0] > 0
    return outside
