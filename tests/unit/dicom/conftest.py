"""Series written for one test, and the real CT where it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from ctflow.core.volume import Volume
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import small_volume


@pytest.fixture
def volume() -> Volume:
    return small_volume()


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes a series into a new folder; `adjust(dataset, index)` makes it odd."""
    count = iter(range(1000))

    def make(volume: Volume | None = None, adjust: Callable[[Dataset, int], None] | None = None, **options) -> Path:
        folder = tmp_path / f"series{next(count)}"
        write_ct_series(volume if volume is not None else small_volume(), folder, adjust=adjust, **options)
        return folder

    return make
