"""A model: its network, its preprocessing, and the meaning of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ctflow.core.volume import Size3

if TYPE_CHECKING:
    from torch import Tensor

RESEARCH_ONLY = "RESEARCH ONLY - NOT FOR CLINICAL USE"  # on every output of a demonstration model
NOTHING_MARKED = "The algorithm marked nothing, which does not exclude disease."

Blend = Literal["constant", "gaussian", "nnunet"]
Placement = Literal["dense", "even"]
Activation = Literal["softmax", "sigmoid", "none"]
HuRange = tuple[float, float]
Overlap = float | tuple[float, float, float]


@dataclass(frozen=True)
class Code:
    """A coded concept (DICOM PS3.3 section 8.8)."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Segment:
    """The structure that one output channel (or label value) marks.

    Attributes:
        number: Value in the label map, and the SEG's segment number before renumbering; starts at 1.
        label: Name of the structure.
        category: Segmented property category (CID 7150).
        type: Segmented property type (CID 7151 and others).
        anatomy: Anatomic regions; may be empty.
        coded: False if the bundle gave no codes and general ones are used.
        colour: Recommended display colour, red, green and blue from 0 to 255; None leaves it to the viewer.
        hu_range: Lowest and highest plausible mean HU of a finding of this segment; None if unknown.
        part_of: Number of the class whose finding this segment marks; None if it marks the whole class.
        rank: Which finding, the largest being 1; None with `part_of`: all findings without their own segment.
        side: Left or right (CID 244), where `type` does not say it.
    """

    number: int
    label: str
    category: Code
    type: Code
    anatomy: tuple[Code, ...] = ()
    coded: bool = True
    colour: tuple[int, int, int] | None = None
    hu_range: HuRange | None = None
    part_of: int | None = None
    rank: int | None = None
    side: Code | None = None


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
    """Clip to percentiles of the volume (MONAI `ClipIntensityPercentilesd`); None leaves a side."""

    lower: float | None
    upper: float | None


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
    """

    least: int
    connectivity: int
    independent: bool


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


@dataclass(frozen=True)
class WindowPadding:
    """What surrounds a volume that is smaller than a window (MONAI `SlidingWindowInferer`)."""

    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    value: float = 0.0


@dataclass(frozen=True)
class NetworkSpec:
    """A network and the arguments that make it.

    Attributes:
        name: A class of `monai.networks.nets`, or the dotted name of one of `dynamic_network_architectures`.
        arguments: What its constructor takes; a class among them is given by its dotted name.
        members: How many networks with weights of their own are averaged; the names of weights begin with `0.`, `1.`
            and so on where there are several.
        slice_axis: The axis along which a network for slices moves through a window; None for one for volumes.
    """

    name: str
    arguments: Mapping[str, Any]
    members: int = 1
    slice_axis: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its weights.

    Attributes:
        name: The bundle's name.
        version: The bundle's version.
        network: The network and its arguments.
        in_channels: Input channels; ctflow feeds 1.
        out_channels: Channels of the network's logits.
        preprocessing: Steps from the source volume to the network's input, in order.
        roi: Window size in voxels along the network's axes.
            Along an axis with 0, a window is as long as the volume.
        overlap: Overlap of neighbouring windows, as a fraction of the window; one for all axes or one for each.
        blend: How overlapping windows are weighted.
        batch_size: Windows per forward pass, from the bundle.
        activation: Function from blended logits to probabilities.
        threshold: Probability from which on a channel is marked; None takes the argmax over channels, channel 0 being
            background.
        segments: The marked structures, by label value.
        intended_use: The bundle's own words.
        demonstration: Whether outputs must say RESEARCH ONLY - NOT FOR CLINICAL USE.
        body_parts: BodyPartExamined values that suit the model, upper case; empty accepts all.
        notes: Settings that the reader dropped or assumed, for the log and result.json.
        placement: Windows at fixed steps, the last one at the volume's end ("dense", MONAI), or at even ones ("even",
            nnU-Net).
        mirror_axes: Axes of the network's grid along which every window is also mirrored, in all combinations, and the
            logits averaged.
        painted: With sigmoid and several channels, the label that each channel writes over those before it; empty
            where each channel is a class of its own.
        restored: What is brought back to the source grid: probabilities or logits, linearly, or labels, of the nearest
            voxel.
        network_label_steps: What is done with the labels on the network's grid, and
        label_steps: on the source's.
        sigma_scale: Width of the gaussian blend, as a fraction of the window along each axis.
        window_padding: What surrounds a volume that is smaller than a window.
    """

    name: str
    version: str
    network: NetworkSpec
    in_channels: int
    out_channels: int
    preprocessing: tuple[Step, ...]
    roi: Size3
    overlap: Overlap
    blend: Blend
    batch_size: int
    activation: Activation
    threshold: float | None
    segments: tuple[Segment, ...]
    intended_use: str
    demonstration: bool
    body_parts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    placement: Placement = "dense"
    mirror_axes: tuple[int, ...] = ()
    painted: tuple[int, ...] = ()
    restored: Restored = "probabilities"
    network_label_steps: tuple[LabelStep, ...] = ()
    label_steps: tuple[LabelStep, ...] = ()
    sigma_scale: tuple[float, float, float] = (0.125, 0.125, 0.125)
    window_padding: WindowPadding = WindowPadding()  # frozen


@dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights.

    Attributes:
        spec: The model's specification.
        weights: The network's state dict, on the CPU.
        weights_digest: SHA-256 of the weights' names, dtypes, shapes and bytes, as hexadecimal digits.
    """

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    weights_digest: str
