"""A long compressed series is decoded in processes: the same values, and a name for what goes wrong there."""

from __future__ import annotations

import os

import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless

from ctflow.dicom import decode
from ctflow.errors import UnsupportedPixels
from dicom_support import assembled, small_volume
from odd_series import transcode

SHAPE = (20, 32, 40)


@pytest.fixture
def folder(write, monkeypatch):
    monkeypatch.setattr(decode, "LEAST_SLICES", 20)
    monkeypatch.setattr(decode, "_cores", lambda: 2)
    folder = write(small_volume(shape=SHAPE))
    for path in folder.iterdir():
        transcode(path, JPEGLSLossless)
    return folder


def processes_of(folder, monkeypatch) -> list[int]:
    """Read the series, and how many processes took part."""
    pools = []
    real = decode.ProcessPoolExecutor

    def pool(workers, *arguments, **options):
        pools.append(workers)
        return real(workers, *arguments, **options)

    monkeypatch.setattr(decode, "ProcessPoolExecutor", pool)
    assert np.array_equal(assembled(folder).volume.array, small_volume(shape=SHAPE).array)
    return pools


def test_two_processes_give_the_same_volume(folder, monkeypatch):
    assert processes_of(folder, monkeypatch) == [2]


@pytest.mark.parametrize(("name", "value"), [("LEAST_SLICES", 21), ("_cores", lambda: 1)])
def test_a_short_series_or_a_single_core_needs_none(folder, monkeypatch, name, value):
    monkeypatch.setattr(decode, name, value)
    assert processes_of(folder, monkeypatch) == []


def test_a_damaged_frame_is_named_from_there_too(folder):
    path = folder / "00011.dcm"
    content = path.read_bytes()
    at = content.rindex(b"\xff\xd8\xff")
    path.write_bytes(content[:at] + bytes(20) + content[at + 20 :])
    with pytest.raises(UnsupportedPixels, match=r"00011\.dcm"):
        assembled(folder)


def test_a_decoder_that_dies_is_a_refusal(folder, monkeypatch):
    class Dying(decode.ProcessPoolExecutor):
        def submit(self, _function, *_arguments):
            return super().submit(os._exit, 1)

    monkeypatch.setattr(decode, "ProcessPoolExecutor", Dying)
    with pytest.raises(UnsupportedPixels, match=r"00000\.dcm: .*ended its decoder"):
        assembled(folder)
