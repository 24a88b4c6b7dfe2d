"""`ctflow phantom`: a synthetic CT series and its truth on disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from ctflow import __version__
from ctflow.core.atomic import make_output_folder
from ctflow.core.errors import NotWritten, SettingsInvalid
from ctflow.core.model import Code, ModelSpec, NetworkSpec, Segment
from ctflow.core.progress import Progress
from ctflow.core.volume import PADDING_HU, Size3
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.phantom import Phantom, phantom_from_seed

log = logging.getLogger(__name__)

_TRUTH = ModelSpec(
    name="ctflow phantom truth",
    version=__version__,
    network=NetworkSpec("none", {}),
    in_channels=1,
    out_channels=2,
    preprocessing=(),
    roi=(1, 1, 1),
    overlap=0.0,
    blend="constant",
    batch_size=1,
    activation="none",
    threshold=None,
    segments=(
        Segment(
            number=1,
            label="tumour",
            category=Code("49755003", "SCT", "Morphologically Abnormal Structure"),
            type=Code("108369006", "SCT", "Neoplasm"),
            anatomy=(Code("39607008", "SCT", "Lung"),),
        ),
    ),
    intended_use="The truth of a synthetic CT.",
    demonstration=True,
)


def write_phantom(folder: Path, seed: int, shape: Size3, *, tumours: int | None = None, varied: bool = False) -> int:
    """Write FOLDER/ct/*.dcm and FOLDER/truth.dcm.

    Args:
        folder: Made if absent; must not hold a phantom yet.
        seed: Draws the phantom.
        shape: Voxels along (D, H, W).
        tumours: How many; None draws that too.
        varied: Whether to vary the phantom as real scans do.

    Returns:
        How many tumours it has.

    Raises:
        SettingsInvalid: The shape or number of tumours cannot be drawn.
        OutputError: The folder cannot be written, or holds a phantom already.
    """
    _check_absent(folder)
    try:
        phantom = phantom_from_seed(seed, shape, tumours=tumours, varied=varied)
    except ValueError as error:
        raise SettingsInvalid(f"phantom: {error}", reason="invalid-value") from error
    make_output_folder(folder)
    if tumours is not None and len(phantom.tumours) < tumours:
        log.warning("only %d of %d tumours found a place in this chest", len(phantom.tumours), tumours)
    paths = _write_ct(phantom, folder / "ct", seed)
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    provenance = Provenance(ctflow_version=__version__, weights_digest="0" * 64, settings={"seed": seed})
    truth = segmentation_from_labels(phantom.labels, headers, _TRUTH, provenance)
    write_dataset(truth, folder / "truth.dcm")
    return len(phantom.tumours)


def _check_absent(folder: Path) -> None:
    if os.path.lexists(folder / "ct"):
        raise NotWritten(f"{folder / 'ct'} exists already: choose another folder or remove it", reason="already-there")


def _write_ct(phantom: Phantom, folder: Path, seed: int) -> tuple[Path, ...]:
    """The series, with padding as scanners write it: far below air, and named by PixelPaddingValue or not."""
    padding = None if phantom.variety is None else phantom.variety.padding
    if padding is None or (padding.hu >= PADDING_HU and not padding.declared):
        return write_ct_series(phantom.volume, folder, seed=seed)
    intercept = 0 if padding.hu == -2000 else -1024  # as those scanners have it
    stored = padding.hu - intercept
    mask = phantom.volume.padding

    def declare(dataset: Dataset, d: int) -> None:
        dataset.add_new("PixelPaddingValue", "SS", stored)
        if mask is not None:
            pixels = np.frombuffer(dataset.PixelData, "<i2").reshape(mask.shape[1:]).copy()
            pixels[mask[d]] = stored
            dataset.PixelData = pixels.tobytes()

    adjust = declare if padding.declared else None
    return write_ct_series(phantom.volume, folder, seed=seed, intercept=intercept, signed=True, adjust=adjust)


def write_phantoms(
    folder: Path,
    seed: int,
    count: int,
    shape: Size3,
    *,
    tumours: int | None,
    varied: bool = False,
    progress: Progress,
) -> tuple[int, ...]:
    """Write FOLDER/<seed>/{ct,truth.dcm} for `count` seeds from `seed` on; raises as `write_phantom`.

    Returns:
        How many tumours each has.
    """
    for number in range(count):  # before the first minutes of work
        _check_absent(folder / str(seed + number))
    counts = []
    progress("phantom", 0, count)
    for number in range(count):
        counts.append(write_phantom(folder / str(seed + number), seed + number, shape, tumours=tumours, varied=varied))
        progress("phantom", number + 1, count)
    return tuple(counts)
