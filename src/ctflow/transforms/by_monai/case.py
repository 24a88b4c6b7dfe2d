"""A volume through a bundle's own transforms, inferer or evaluator, as MONAI runs them, if its code may be executed."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctflow.compat.monai import import_monai
from ctflow.core.errors import BundleInvalid, CtflowError, first_line
from ctflow.core.model import ModelSpec, OwnWorkflow
from ctflow.core.volume import Volume
from ctflow.networks.own_code import only_from, packages_of
from ctflow.transforms.orient import orientation_from_affine
from ctflow.transforms.prepare import prepare_volume, unseen
from ctflow.transforms.state import Prepared
from ctflow.transforms.upload import uploaded

_IMAGE, _PREDICTION = "image", "pred"  # as MONAI's evaluator calls them
_NAME = "series"  # in place of a file's name
_SAVERS = frozenset({"SaveImage", "SaveImaged", "SaveImageD", "SaveImageDict"})
_LOADERS = frozenset({"LoadImage", "LoadImaged", "LoadImageD", "LoadImageDict"})


@dataclass(frozen=True, eq=False)
class PreparedByMonai(Prepared):
    """The network's input as the bundle's own transforms made it.

    Which source voxels a window contributes to is unknown, so `back` says: to all.

    Attributes:
        case: What makes labels on the source grid of the network's answer.
    """

    case: MonaiCase | None = None


def prepared_for(
    spec: ModelSpec, volume: Volume, device: str, on_uploaded: Callable[[Tensor], None] = unseen
) -> Prepared:
    """The network's input: see `prepare_volume`, or by MONAI where the model says so.

    Raises:
        UnsupportedPixels: A step leaves nothing of the volume, or values that are not finite.
        BundleInvalid: The bundle's own code failed.
    """
    if spec.workflow is None:
        return prepare_volume(volume, spec.preprocessing, device, on_uploaded)
    on_uploaded(uploaded(volume.array, torch.device(device)))
    return MonaiCase(spec, spec.workflow, volume, device).prepared


class MonaiCase:
    """One volume in MONAI's workflow.

    Args:
        spec: The model.
        workflow: Its own workflow.
        volume: CT in HU.
        device: torch device.

    Raises:
        BundleInvalid: The bundle's own code failed, or gave no image.
    """

    def __init__(self, spec: ModelSpec, workflow: OwnWorkflow, volume: Volume, device: str) -> None:
        self._spec, self._workflow, self._volume, self._device = spec, workflow, volume, device
        self._folder = Path(workflow.code.folder)
        with self._running("preprocessing"):
            self._parser = self._parsed()
            transforms = self._parser.get_parsed_content("preprocessing")
            self._read_volume(transforms)
            self._data: dict[str, Any] = dict(transforms({_IMAGE: _NAME}))
            self._image = importlib.import_module("monai.transforms").reset_ops_id(self._data.get(_IMAGE))
        self.prepared = self._prepared()

    @contextmanager
    def _running(self, part: str) -> Iterator[None]:
        """The bundle's code can be imported meanwhile, and its failure is named."""
        try:
            with only_from(self._folder, packages_of(self._folder)), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of MONAI and the bundle: its user can change neither
                import_monai()
                yield
        except (CtflowError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # MONAI wraps it once for each list of transforms
                cause = cause.__cause__
            if "allocate memory" in str(cause):
                raise
            raise BundleInvalid(
                f"the bundle's {part} failed in MONAI: {type(cause).__name__}: {first_line(cause)}", reason="own-code"
            ) from error

    def _parsed(self, network: nn.Module | None = None) -> Any:
        """MONAI's parser of the configuration, which reads this volume and saves nothing."""
        document = copy.deepcopy(dict(self._workflow.document))
        _adapt(document)
        document["bundle_root"] = str(self._folder)
        document["network_def"] = "$ctflow_network"
        if "device" in document:
            document["device"] = f"$torch.device({self._device!r})"
        if self._workflow.evaluates:
            _one_case(document)
        return importlib.import_module("monai.bundle").ConfigParser(document, globals={"ctflow_network": network})

    def _read_volume(self, transforms: Any) -> None:
        """Give every loader among the transforms a reader that returns the volume, whatever the file's name."""
        loaders = importlib.import_module("monai.transforms")
        inner = transforms.flatten().transforms if hasattr(transforms, "flatten") else [transforms]
        found = [each for each in inner if isinstance(each, loaders.LoadImaged | loaders.LoadImage)]
        if not found:
            raise BundleInvalid("the bundle's preprocessing has no LoadImaged", reason="own-code")
        for each in found:
            each.register(_reader_of(self._volume))

    def _prepared(self) -> PreparedByMonai:
        image = self._image
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[0] != self._spec.in_channels:
            shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
            raise BundleInvalid(
                f"the bundle's preprocessing gave {shape}, not an image of {self._spec.in_channels} channel",
                reason="own-code",
            )
        tensor = torch.as_tensor(image).as_subclass(Tensor).to(self._device, torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            raise BundleInvalid("the bundle's preprocessing gave values that are not finite", reason="own-code")
        affine = np.asarray(getattr(image, "affine", _ras_affine(self._volume)), dtype=float)
        axes = _source_axes(affine, self._volume)
        back = [
            np.ones((self._volume.array.shape[axis], count)) for axis, count in zip(axes, tensor.shape[1:], strict=True)
        ]
        x_mm, y_mm, z_mm = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        return PreparedByMonai(
            tensor.contiguous()[None], axes, (back[0], back[1], back[2]), (x_mm, y_mm, z_mm), case=self
        )

    def inferred(self, network: nn.Module) -> Tensor:
        """(1, C, X, Y, Z) float32: the network's answer by the bundle's own inferer, or what its evaluator made of it.

        Args:
            network: On the device, in evaluation mode.

        Raises:
            BundleInvalid: The bundle's own code failed, or gave something else.
        """
        with self._running("evaluator" if self._workflow.evaluates else "inferer"):
            if self._workflow.evaluates:
                found = self._evaluated(network)
            else:
                found = self._parser.get_parsed_content("inferer")(self._image[None].to(self._device), network)
        if not isinstance(found, Tensor) or found.ndim != 5 or len(found) != 1:
            raise BundleInvalid("the bundle's inferer gave no answer of one volume", reason="own-code")
        return found.as_subclass(Tensor).float()

    def _evaluated(self, network: nn.Module) -> Tensor:
        parser = self._parsed(network)
        self._read_volume(parser.get_parsed_content("preprocessing"))
        evaluator = parser.get_parsed_content("evaluator")
        evaluator.run()
        output = evaluator.state.output
        output = output[0] if isinstance(output, list) else {_PREDICTION: output[_PREDICTION][0]}
        self._data[_PREDICTION] = output[_PREDICTION]
        result: Tensor = output[_PREDICTION][None]
        return result

    def labels(self, logits: Tensor) -> Tensor:
        """(D, H, W) uint8 on the source grid, of the network's answer.

        Args:
            logits: (1, C, X, Y, Z) float32 on the network's grid.

        Raises:
            BundleInvalid: The bundle's own code failed, or gave something else than labels on the CT's grid.
        """
        if not self._workflow.evaluates:
            with self._running("postprocessing"):
                meta = importlib.import_module("monai.data").MetaTensor
                prediction = logits[0]
                if isinstance(self._image, meta):
                    operations = self._image.applied_operations
                    prediction = meta(prediction, meta=self._image.meta, applied_operations=operations)
                data = {**self._data, _PREDICTION: prediction, "label": None}
                self._data = dict(self._parser.get_parsed_content("postprocessing")(data))
        return _labels_of(self._data.get(_PREDICTION), self._spec, self._volume, self._workflow).permute(2, 1, 0)


def _adapt(value: Any) -> None:
    """Switch off what saves images, and let loaders find their reader themselves; changes the document."""
    left = [value]
    while left:
        each = left.pop()
        target = each.get("_target_") if isinstance(each, dict) else None
        name = target.rpartition(".")[2] if isinstance(target, str) else ""
        if name in _SAVERS:
            each["_disabled_"] = True
        elif name in _LOADERS:
            each.pop("reader", None)
        if isinstance(each, dict | list):
            left += each.values() if isinstance(each, dict) else each


def _one_case(document: dict[str, Any]) -> None:
    """Give the evaluator this volume only, without its handlers; changes the document."""
    for key in ("dataset", "evaluator"):
        if not isinstance(document.get(key), dict):
            raise BundleInvalid(f"{key} must be an object, so that ctflow can give it a CT", reason="own-code")
    document["dataset"]["data"] = [{_IMAGE: _NAME}]
    document["evaluator"] |= {"val_handlers": [], "amp": False}  # the weights are loaded; the engine sets the precision
    if isinstance(document.get("dataloader"), dict):
        document["dataloader"]["num_workers"] = 0


def _ras_affine(volume: Volume) -> Any:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]


def _reader_of(volume: Volume) -> Any:
    """A reader of MONAI that returns the volume as its readers of files do: axes (W, H, D), RAS affine."""
    data = importlib.import_module("monai.data")
    affine = _ras_affine(volume)
    array = volume.array.transpose(2, 1, 0)
    meta = {"original_channel_dim": float("nan"), "spatial_shape": np.array(array.shape), "space": "RAS"}

    class VolumeReader(data.ImageReader):  # type: ignore[misc, name-defined]
        def verify_suffix(self, filename: Any) -> bool:
            return True

        def read(self, data: Any, **_: Any) -> Any:
            return data

        def get_data(self, img: Any) -> tuple[Any, Mapping[str, Any]]:
            return array, {**meta, "affine": affine.copy(), "original_affine": affine.copy()}

    return VolumeReader()


def _source_axes(affine: Any, volume: Volume) -> tuple[int, int, int]:
    """For each axis of the image the axis of the volume that runs the same way."""
    world = [int(axis) for axis, _ in orientation_from_affine(volume.geometry.affine_mm)]
    x, y, z = (world.index(int(axis)) for axis, _ in orientation_from_affine(affine))
    return x, y, z


def _labels_of(found: Any, spec: ModelSpec, volume: Volume, workflow: OwnWorkflow) -> Tensor:
    """(X, Y, Z) uint8 of what post-processing gave, which must be labels or masks on the CT's grid."""
    shape = volume.array.shape[::-1]
    if not isinstance(found, Tensor) or found.ndim != 4 or tuple(found.shape[1:]) != shape:
        what = tuple(found.shape) if hasattr(found, "shape") else type(found).__name__
        raise BundleInvalid(
            f"the bundle's postprocessing gave {what}, not labels on the CT's grid, (channels, {shape[0]}, {shape[1]}, "
            f"{shape[2]}): it must end with Invertd and AsDiscreted",
            reason="own-code",
        )
    affine = getattr(found, "affine", None)
    if affine is not None and not np.allclose(np.asarray(affine, dtype=float), _ras_affine(volume), atol=1e-2):
        raise BundleInvalid("the bundle's postprocessing gave labels that lie elsewhere than the CT", reason="own-code")
    values = found.as_subclass(Tensor)
    if len(values) > 1:
        return _painted_masks(values, spec, workflow)
    allowed = torch.tensor([0, *(segment.number for segment in spec.segments)], device=values.device)
    if not bool(torch.isin(values[0], allowed.to(values.dtype)).all()):
        raise BundleInvalid(
            "the bundle's postprocessing gave values that are not labels of its channels", reason="own-code"
        )
    return values[0].to(torch.uint8)


def _painted_masks(values: Tensor, spec: ModelSpec, workflow: OwnWorkflow) -> Tensor:
    first = int(workflow.has_background)
    if len(values) - first != len(spec.segments) or not bool(((values == 0) | (values == 1)).all()):
        raise BundleInvalid(
            f"the bundle's postprocessing gave {len(values)} channels, not a mask of 0 and 1 for each segment",
            reason="own-code",
        )
    labels = torch.zeros(values.shape[1:], dtype=torch.uint8, device=values.device)
    for segment, mask in zip(spec.segments, values[first:], strict=True):
        labels[mask == 1] = segment.number
    return labels
