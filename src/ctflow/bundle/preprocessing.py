"""The bundle's transforms before the network -> ctflow's steps."""

from __future__ import annotations

from typing import Any

from ctflow.bundle.config import Config, short
from ctflow.bundle.config.ensemble import RUN_BY_MONAI
from ctflow.bundle.config.signatures import HELD, STEPS
from ctflow.bundle.steps.image_steps import MAKERS
from ctflow.bundle.transforms import IMAGE, Transform, check_held, transforms_from_config
from ctflow.core.steps import (
    ClipPercentiles,
    CropCenter,
    CropForeground,
    Normalize,
    Orient,
    Pad,
    Resample,
    Resize,
    ScalePercentiles,
    ScaleRange,
    Step,
    Threshold,
    Turn,
)

_SPATIAL = (Orient, Resample, CropForeground, Pad, CropCenter, Resize, Turn)
# MONAI cannot invert them back to the source grid.
_NEVER = frozenset({"FromMetaTensord", "ToMetaTensord", "SaveImaged"})


def steps_from_config(config: Config) -> tuple[Step, ...]:
    """The steps of `preprocessing` on the image, in order.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: ctflow does not support a transform, or an argument that changes its result.
    """
    return _PreReader().steps(config)


class _PreReader:
    """Walks through the list and tracks the data present at each transform."""

    def __init__(self) -> None:
        self._present = {IMAGE}
        self._is_loaded = self._is_channel_first = self._is_begun = False
        self._is_flat = self._is_near = False  # see `_check_zeros`
        self._steps: list[Step] = []

    def steps(self, config: Config) -> tuple[Step, ...]:
        transforms = list(transforms_from_config(config, "preprocessing"))
        _demand_one_image(transforms)
        for transform in transforms:
            if transform.target in HELD and transform.target not in _NEVER:
                self._hold(transform)
            elif transform.target in STEPS:
                self._do(transform)
            else:
                known = ", ".join(STEPS)
                raise transform.refused("_target_", f"is {transform.target}; ctflow implements {known}", "target")
            self._is_begun = True
        if self._is_loaded and not self._is_channel_first:
            raise config.invalid("preprocessing", "loads the image without EnsureChannelFirstd", "order")
        return tuple(self._steps)

    def _hold(self, transform: Transform) -> None:
        check_held(transform, self._present)
        if IMAGE not in self._present:
            raise transform.refused("keys", f"removes {IMAGE!r}", "keys")
        if transform.target == "LoadImaged":
            self._load(transform)
        elif transform.target == "EnsureChannelFirstd" and transform.acts_on:
            if self._is_channel_first:
                raise transform.refused("_target_", "adds a second channel axis", "order")
            if self._steps:
                raise transform.refused("_target_", f"comes after {type(self._steps[-1]).__name__}", "order")
            self._is_channel_first = True
        elif (
            transform.target == "ToTensord" and transform.acts_on and any(isinstance(s, _SPATIAL) for s in self._steps)
        ):
            raise transform.refused(
                "_target_", "comes after a spatial transform, which MONAI then cannot invert: use EnsureTyped", "order"
            )

    def _load(self, transform: Transform) -> None:
        if not transform.acts_on:
            return
        if self._is_begun:
            raise transform.refused("_target_", "comes after another transform", "order")
        self._is_loaded = True
        self._is_channel_first = transform.flag("ensure_channel_first", False)
        meta_key = transform.get("meta_keys", None) or f"{IMAGE}_{transform.get('meta_key_postfix', 'meta_dict')}"
        if not transform.flag("image_only", True):
            self._add(transform, "meta_keys", meta_key)

    def _do(self, transform: Transform) -> None:
        present = set(self._present)
        transform.read_keys(STEPS[transform.target], present)
        if transform.target == "CropForegroundd":
            self._check_crop(transform)
        others = [key for key in transform.acts_on if key != IMAGE]
        if others:
            raise transform.refused("keys", f"names {short(others[0])}, which is not an image", "keys")
        if transform.acts_on and self._is_loaded and not self._is_channel_first:
            raise transform.refused("_target_", f"is {transform.target}, but comes before EnsureChannelFirstd", "order")
        if transform.acts_on:
            step = MAKERS[transform.target](transform)
            self._check_zeros(transform, step)
            self._steps.append(step)

    def _check_zeros(self, transform: Transform, step: Step) -> None:
        """Reject steps that depend on voxels being exactly 0, if that depends on the last bit of MONAI's resampling.

        Clipping and padding set many voxels to one value; MONAI's resampling leaves some of them off by 1e-16.
        """
        if isinstance(step, Resample | Resize):
            self._is_near = self._is_near or (self._is_flat and not _is_nearest(step))
        elif (isinstance(step, CropForeground) or (isinstance(step, Normalize) and step.nonzero)) and self._is_near:
            problem = f"is {transform.target}, which depends on rounding where Spacingd comes after clipping"
            raise transform.refused("_target_", f"{problem}: put Spacingd before the scaling", "order")
        self._is_flat = self._is_flat or _sets_many_voxels(step)

    def _check_crop(self, transform: Transform) -> None:
        source = transform.get("source_key")
        if source != IMAGE:
            raise transform.refused("source_key", f"is {short(source)}; ctflow has only {IMAGE!r}", "keys")
        for name in ("start_coord_key", "end_coord_key"):
            key = transform.get(name, STEPS["CropForegroundd"].read[name])
            if key is not None:
                self._add(transform, name, key)

    def _add(self, transform: Transform, name: str, key: Any) -> None:
        """Record an item that a transform adds to the image."""
        if not isinstance(key, str) or key == IMAGE:
            raise transform.refused(name, f"is {short(key)}; it must be a key other than {IMAGE!r}", "keys")
        self._present.add(key)


def _demand_one_image(transforms: list[Transform]) -> None:
    """Reject a list that joins several images, before it is said of each of their keys that there is no such image."""
    for transform in transforms:
        if transform.target == "ConcatItemsd" and len(transform.key_list("keys")) > 1:
            joined = short(transform.key_list("keys"))
            problem = f"is ConcatItemsd of {joined}, several images of a patient (phases or sequences)"
            raise transform.refused("_target_", f"{problem}; ctflow reads one CT series. {RUN_BY_MONAI}", "inputs")


def _is_nearest(step: Resample | Resize) -> bool:
    return step.nearest if isinstance(step, Resample) else step.mode in ("nearest", "nearest-exact")


def _sets_many_voxels(step: Step) -> bool:
    """Whether a step may give many voxels one value."""
    if isinstance(step, ScaleRange | ScalePercentiles):
        return step.clip
    if isinstance(step, CropForeground):
        return step.margin > 0 or max(step.divisible) > 1
    return isinstance(step, ClipPercentiles | Threshold | Pad)
