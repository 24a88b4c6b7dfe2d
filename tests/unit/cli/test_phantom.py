from __future__ import annotations

import numpy as np
import pydicom
import pytest

from ctflow.cli import phantom as command
from ctflow.phantom import draw_phantom
from ctflow.phantom.scene.variety import Extent, Padding, Variety
from dicom_support import assembled
from tests_support import dciodvfy_errors


@pytest.mark.parametrize(
    ("hu", "declared", "stored"),
    [(-1024, True, 0), (-1024, False, 0), (-2000, True, -2000), (-3024, True, -2000), (-3024, False, -2000)],
)
def test_padding_is_written_as_scanners_do_and_read_back(tmp_path, monkeypatch, hu, declared, stored):
    variety = Variety(extent=Extent("chest", -20.0, 20.0), padding=Padding((0.0, 0.0), 150.0, hu, declared))
    phantom = draw_phantom(1, (16, 48, 48), 0, variety)
    monkeypatch.setattr(command, "phantom_from_seed", lambda *_, **__: phantom)
    command.write_phantom(tmp_path, 1, (16, 48, 48), varied=True)
    path = sorted((tmp_path / "ct").iterdir())[0]
    dataset = pydicom.dcmread(path)
    assert dataset.pixel_array[0, 0] == stored
    assert ("PixelPaddingValue" in dataset) == declared
    assert dciodvfy_errors(path) == []
    back = assembled(tmp_path / "ct").volume
    assert np.array_equal(back.array, phantom.volume.array)
    assert (back.padding is not None) == declared
    if declared:
        assert back.padding[phantom.volume.padding].all()
        assert (back.array[back.padding] == -1024).all()


def test_a_varied_phantom_is_another_one_on_disk(tmp_path):
    for name, varied in (("plain", False), ("varied", True)):
        command.write_phantom(tmp_path / name, 3, (16, 48, 48), varied=varied)
    plain, varied = (pydicom.dcmread(sorted((tmp_path / name / "ct").iterdir())[0]) for name in ("plain", "varied"))
    assert plain.SeriesInstanceUID != varied.SeriesInstanceUID
