"""Steps of a model: from a volume to the network's input, and on its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctflow.core.volume import Size3


@dataclass(frozen=True)
class Orient:
    """Orient the array's axes along `axcodes` (MONAI `Orientationd`), for example "RAS"."""

    axcodes: str


@dataclass(frozen=True)
class Resample:
    """Resample to `spacing_mm` along the current axes (MONAI `Spacingd`).

    An axis with spacing 0 or less keeps its own. `nearest` takes the nearest voxel instead of interpolating linearly.
    `diagonal` is for axes that are the patient's: on others MONAI's grid is not a resampling along the axes.
    """

    spacing_mm: tuple[float, float, float]
    nearest: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class ScaleRange:
    """Map [a_min, a_max] linearly to [b_min, b_max] (MONAI `ScaleIntensityRanged`)."""

    a_min: float
    a_max: float
    b_min: float | None
    b_max: float | None
    clip: bool


@dataclass(frozen=True)
class ScalePercentiles:
    """As `ScaleRange`, from percentiles of the volume (MONAI `ScaleIntensityRangePercentilesd`)."""

    lower: float
    upper: float
    b_min: float | None
    b_max: float | None
    clip: bool
    relative: bool


@dataclass(frozen=True)
class Normalize:
    """Subtract and divide (MONAI `NormalizeIntensityd`); None means the volume's own mean or deviation."""

    subtrahend: float | None
    divisor: float | None
    nonzero: bool


@dataclass(frozen=True)
class ScaleMinMax:
    """Map the volume's own range to [low, high] (MONAI `ScaleIntensityd`); or multiply by 1 + `factor`.

    Attributes:
        low: None, as `high`, maps to [0, 1].
        high: As `low`.
        factor: Used if both are None.
    """

    low: float | None
    high: float | None
    factor: float | None = None


@dataclass(frozen=True)
class ClipPercentiles:
    """Clip to percentiles of the volume (MONAI `ClipIntensityPercentilesd`); None leaves a side.

    With a `sharpness` values approach them softly (MONAI `soft_clip`).
    """

    lower: float | None
    upper: float | None
    sharpness: float | None = None


@dataclass(frozen=True)
class Threshold:
    """Replace what is not above (or below) a value (MONAI `ThresholdIntensityd`)."""

    threshold: float
    above: bool
    value: float


@dataclass(frozen=True)
class Linear:
    """Multiply and add (MONAI `Lambdad` of such an expression)."""

    factor: float
    offset: float


PadMode = Literal["constant", "edge", "reflect", "symmetric", "wrap", "minimum", "maximum", "mean", "median"]


@dataclass(frozen=True)
class CropForeground:
    """Keep the bounding box of the foreground, widened by `margin` voxels (MONAI `CropForegroundd`).

    Attributes:
        margin: Voxels on each side.
        within: Whether the box ends at the volume's border; else the volume is padded.
        above: The foreground is above this value.
        divisible: The box is widened to multiples of this, along each axis.
        mode: How the volume is padded, and
        value: with which value, if that is constant.
    """

    margin: int
    within: bool = False
    above: float = 0.0
    divisible: tuple[int, int, int] = (1, 1, 1)
    mode: PadMode = "constant"
    value: float = 0.0


@dataclass(frozen=True)
class CropNonzero:
    """Keep the bounding box of voxels that are not 0 (nnU-Net `crop_to_nonzero`)."""


@dataclass(frozen=True)
class ClipNormalize:
    """Clip to [lower, upper], subtract the mean, divide by the deviation (nnU-Net `CTNormalization`)."""

    lower: float
    upper: float
    mean: float
    deviation: float


@dataclass(frozen=True)
class ZScore:
    """Normalize by the volume's own mean and deviation (nnU-Net `ZScoreNormalization`).

    With `masked` only voxels that are not 0, and holes among them, count and change.
    """

    masked: bool


@dataclass(frozen=True)
class Spline:
    """How values are interpolated along axes (nnU-Net `resample_data_or_seg_to_shape`).

    Attributes:
        order: Order of the spline, 0 to 5.
        order_z: The same along an axis that is resampled apart from the others.
        apart: Whether the axis with the largest spacing is; None where one grid's voxels are anisotropic enough.
    """

    order: int
    order_z: int
    apart: bool | None


@dataclass(frozen=True)
class ResampleSpline:
    """Resample to `spacing_mm` along the current axes with splines, and the logits back with others (nnU-Net)."""

    spacing_mm: tuple[float, float, float]
    forward: Spline
    back: Spline


@dataclass(frozen=True)
class Pad:
    """Pad (MONAI `SpatialPadd`, `BorderPadd`, `DivisiblePadd`).

    Attributes:
        kind: Up to `sizes`, by `sizes` (before and after each axis), or to multiples of `sizes`.
        sizes: Voxels along each axis; six for a border.
        at_end: Whether all is added at the end, not on both sides.
        mode: What is added, and
        value: its value, if that is constant.
    """

    kind: Literal["size", "border", "divisible"]
    sizes: tuple[int, ...]
    at_end: bool = False
    mode: PadMode = "constant"
    value: float = 0.0


@dataclass(frozen=True)
class CropCenter:
    """Keep the middle (MONAI `CenterSpatialCropd`); 0 or less keeps an axis."""

    sizes: Size3


@dataclass(frozen=True)
class Resize:
    """Resize to a number of voxels (MONAI `Resized`).

    Attributes:
        sizes: Voxels along each axis, 0 or less keeps it; a single one is that of the longest axis.
        mode: "area" (averages), "linear", "nearest", "nearest-exact".
        align_corners: Whether the corners' centres stay where they are; only for "linear".
    """

    sizes: tuple[int, ...]
    mode: Literal["area", "linear", "nearest", "nearest-exact"]
    align_corners: bool = False


@dataclass(frozen=True)
class Turn:
    """Reorder and flip axes (MONAI `Flipd`, `Rotate90d`, `Transposed`).

    Attributes:
        axes: Which current axis becomes each new one.
        flipped: Whether each new axis is flipped.
        moves_affine: False for `Transposed`, after which MONAI takes each axis' geometry for that of the old one.
    """

    axes: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    moves_affine: bool = True


Step = (
    Orient
    | Resample
    | ScaleRange
    | ScalePercentiles
    | Normalize
    | ScaleMinMax
    | ClipPercentiles
    | Threshold
    | Linear
    | CropForeground
    | Pad
    | CropCenter
    | Resize
    | Turn
    | CropNonzero
    | ClipNormalize
    | ZScore
    | ResampleSpline
)


@dataclass(frozen=True)
class KeepLargest:
    """Keep the largest connected components (MONAI `KeepLargestConnectedComponentd`).

    Attributes:
        labels: Which labels; None for all.
        independent: Of each label, or of all together.
        connectivity: 1 to 3: neighbours over faces, edges, corners.
        count: Components to keep.
    """

    labels: tuple[int, ...] | None
    independent: bool
    connectivity: int
    count: int


@dataclass(frozen=True)
class RemoveSmall:
    """Remove components of fewer voxels (MONAI `RemoveSmallObjectsd`).

    Of a map of several labels MONAI counts each label's voxels if `independent`, and its components otherwise.

    Attributes:
        least: Voxels, or mm3 if
        in_mm3: says so.
        connectivity: As for `KeepLargest`.
        independent: See above.
    """

    least: float
    connectivity: int
    independent: bool
    in_mm3: bool = False


@dataclass(frozen=True)
class FillHoles:
    """Fill what a label encloses (MONAI `FillHolesd`); `labels` None for all."""

    labels: tuple[int, ...] | None
    connectivity: int


@dataclass(frozen=True)
class FilterLabels:
    """Keep only some labels (MONAI `LabelFilterd`)."""

    labels: tuple[int, ...]


@dataclass(frozen=True)
class MapLabels:
    """Replace label values (MONAI `MapLabelValued`); the pairs are (from, to)."""

    pairs: tuple[tuple[int, int], ...]


LabelStep = KeepLargest | RemoveSmall | FillHoles | FilterLabels | MapLabels
Restored = Literal["probabilities", "logits", "labels"]
