"""Small synthetic series for the tests of the DICOM room."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctflow.dicom.assemble import Assembled, assemble_series
from ctflow.dicom.scan import scan_folder
from ctflow.dicom.select import Selection, select_series
from ctflow.volume import Geometry, Volume

DEPTH, ROWS, COLUMNS = 16, 12, 10


def small_volume(affine=None, shape=(DEPTH, ROWS, COLUMNS), seed=0) -> Volume:
    """Random HU on a grid that differs along every axis."""
    if affine is None:
        affine = np.array([[0, 0, 0.9, -10.5], [0, 0.6, 0, 20.25], [2.5, 0, 0, -300], [0, 0, 0, 1.0]])
    values = np.random.default_rng(seed).integers(-1024, 1500, shape, dtype=np.int16)
    return Volume(values, Geometry(shape, np.asarray(affine, float)))


def selection_of(folder: Path, **options) -> Selection:
    return select_series(scan_folder(folder), **options)


def assembled(folder: Path) -> Assembled:
    (candidate,) = selection_of(folder, force=True).chosen
    return assemble_series(candidate.series)
