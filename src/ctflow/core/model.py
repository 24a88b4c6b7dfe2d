"""A model: its network, its preprocessing, and the meaning of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ctflow.core.steps import LabelStep, Restored, Step
from ctflow.core.volume import Size3

if TYPE_CHECKING:
    from torch import Tensor

RESEARCH_ONLY = "RESEARCH ONLY - NOT FOR CLINICAL USE"  # on every output of a demonstration model
NOTHING_MARKED = "The algorithm marked nothing, which does not exclude disease."

Blend = Literal["constant", "gaussian", "nnunet"]
Placement = Literal["dense", "even"]
Activation = Literal["softmax", "sigmoid", "none"]
Combined = Literal["logits", "probabilities", "votes"]
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
class WindowPadding:
    """What surrounds a volume that is smaller than a window (MONAI `SlidingWindowInferer`)."""

    mode: Literal["constant", "reflect", "replicate", "circular"] = "constant"
    value: float = 0.0


@dataclass(frozen=True)
class OwnCode:
    """Code of a bundle that may be executed.

    Attributes:
        folder: The bundle, from which alone it is imported.
        digest: SHA-256 of its files, as hexadecimal digits.
    """

    folder: str
    digest: str


@dataclass(frozen=True)
class NetworkSpec:
    """A network and the arguments that make it.

    Attributes:
        name: A class of `monai.networks.nets`, its function `vista3d132`, or the dotted name of a class of
            `dynamic_network_architectures`.
        arguments: What its constructor takes; a class among them is given by its dotted name.
        members: How many networks with weights of their own are combined; the names of weights begin with `0.`, `1.`
            and so on where there are several.
        combined: What of several members is combined: their logits or probabilities, by the mean, or the labels that
            each of them gives, by vote. All but logits need each member's own blended prediction: the network's output
            then is the channels of one member after those of another.
        shares: Each member's share of the mean; they sum to 1. Empty where all have the same.
        slice_axis: The axis along which a network for slices moves through a window; None for one for volumes.
        code: The bundle's own code if the class is of it; None for one of a library.
    """

    name: str
    arguments: Mapping[str, Any]
    members: int = 1
    slice_axis: int | None = None
    code: OwnCode | None = None
    combined: Combined = "logits"
    shares: tuple[float, ...] = ()

    @property
    def is_stacked(self) -> bool:
        """Whether the network's output is the channels of its members one after another."""
        return self.members > 1 and self.combined != "logits"


@dataclass(frozen=True)
class OwnWorkflow:
    """A bundle whose transforms MONAI runs, because some are its own code or ctflow does not implement them.

    Attributes:
        document: Its configuration, as MONAI's parser takes it.
        files: Those that it comes from, as paths inside the bundle.
        code: What is executed: the bundle's code and its configuration.
        infers: Whether MONAI also runs its inferer; else ctflow moves the windows.
        evaluates: Whether MONAI runs its evaluator, with everything in it.
        has_background: Whether the first of several channels of a result is the background.
    """

    document: Mapping[str, Any]
    files: tuple[str, ...]
    code: OwnCode
    infers: bool
    evaluates: bool
    has_background: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """Everything about a model except its weights.

    Attributes:
        name: The bundle's name.
        version: The bundle's version.
        network: The network and its arguments.
        in_channels: Input channels; ctflow feeds 1.
        out_channels: Channels of the network's logits; those of all members where these are stacked.
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
        workflow: What MONAI runs instead of the steps above; None for nearly all models.
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
    workflow: OwnWorkflow | None = None

    @property
    def own_code(self) -> OwnCode | None:
        """The bundle's code that is executed, if any is."""
        return self.network.code if self.workflow is None else self.workflow.code


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
