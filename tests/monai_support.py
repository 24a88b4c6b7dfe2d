"""A CT for the agreement with MONAI's own workflow, and the NIfTI file that MONAI reads of it."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from ctflow.core.volume import Geometry, Volume
from zoo_bundles import ZooBundle


def scan_for(bundle: ZooBundle) -> Volume:
    """A CT of bright structures in a body: 2 x 2 x 2 windows of the bundle, on another grid than its own."""
    rng = np.random.default_rng(4)
    share = (1.32, 0.83, 0.79)
    shape = tuple(int(bundle.roi * 1.2 / each) for each in share)
    d, h, w = np.indices(shape)
    hu = 40 + 250 * np.sin(d / 4) * np.cos(h / 6) * np.sin(w / 5 + 1) + rng.normal(0, 30, shape)
    outside = (2 * h / shape[1] - 1) ** 2 + (2 * w / shape[2] - 1) ** 2 > 0.9
    hu[outside] = -1000 + rng.normal(0, 5, int(outside.sum()))
    hu = np.where(np.abs(hu) < 2, 3, hu)  # what is exactly 0 behind a resampling is chance (docs/bundles.md)
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, [2, 1, 0]] * (np.array(bundle.spacing_mm)[::-1] * share)
    affine[:3, 3] = (-40.5, 12.25, 100)
    return Volume(hu.round().astype(np.int16), Geometry(shape, affine))


def written_nifti(folder: Path, volume: Volume) -> Path:
    """A CT as MONAI's readers take it."""
    ras = np.diag([-1.0, -1, 1, 1]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]
    path = folder / "ct.nii"
    nibabel.save(nibabel.Nifti1Image(volume.array.transpose(2, 1, 0), ras), path)
    return path
