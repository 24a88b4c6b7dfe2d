"""Bring a chest CT series to cubic voxels, as a background that tumours are put into.

    python training/make_background.py SERIES_DIR NODULE.nii.gz background.npz

The nodule's mask (NIfTI) says which part of the lung must never be trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ctflow.dicom.assemble import assemble_series
from ctflow.dicom.scan import scan_folder
from ctflow.dicom.select import select_series

SPACING_MM = 1.5  # the model's


def main() -> None:
    """Read, resample, save."""
    series_folder, nodule_path, target = (Path(word) for word in sys.argv[1:4])
    scan = scan_folder(series_folder)
    (candidate,) = select_series(scan).chosen
    volume = assemble_series(candidate.series).volume
    spacing = volume.geometry.spacing_mm
    hu = ndimage.zoom(volume.array.astype(np.float32), [mm / SPACING_MM for mm in spacing], order=1)
    nodule = nib.load(nodule_path)
    marked = np.argwhere(np.asarray(nodule.dataobj) > 0)
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ nodule.affine
    world = marked @ to_lps[:3, :3].T + to_lps[:3, 3]
    inverse = np.linalg.inv(volume.geometry.affine_mm)
    index = (world @ inverse[:3, :3].T + inverse[:3, 3]) * np.array(spacing) / SPACING_MM
    box = np.stack([np.floor(index.min(axis=0)), np.ceil(index.max(axis=0)) + 1], axis=1).astype(int)
    np.savez_compressed(target, hu=np.rint(hu).astype(np.int16), nodule=box, spacing_mm=SPACING_MM)
    print(hu.shape, "nodule", box.tolist())


if __name__ == "__main__":
    main()
