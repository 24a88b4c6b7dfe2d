"""Damaged and hostile files: refused by name, within little memory and time."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from ctflow.core.errors import UnsupportedPixels
from ctflow.dicom.read.pixels.frames import flaw_of_rle, flaw_of_size, slices_unlike_both_neighbours
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.structure import Layout, layout_of_header
from dicom_support import DEPTH, assembled, small_volume
from fuzz_series import FINE, fuzz
from odd_series import ODD, nested, transcode
from reasons import raises_reason

HOSTILE = ("a deflate bomb", "sequences nested 400 deep", "a length beyond the file", "a header of 100 MB")


def test_500_mutants_are_never_silent_and_never_hang_or_crash(tmp_path):
    result = fuzz(500, 7, tmp_path)
    assert result["bad"] == []
    assert sum(result.get(verdict, 0) for verdict in FINE) == 500
    assert result["identical"] > 50
    assert result["refused"] > 200
    assert result["warned"] > 2, "the oracle's second parser has had something to do"


_PEAK = """
import resource, sys
from pathlib import Path
from ctflow.dicom.read.scan import scan_folder
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
scan_folder(Path(sys.argv[1]))
before = peak()
scan = scan_folder(Path(sys.argv[2]))
print(peak() - before, len(scan.unreadable), len(scan.instances))
"""


def write_hostile(name: str, folder: Path) -> None:
    if name == "a header of 100 MB":
        folder.mkdir()
        head = bytes(128) + b"DICM" + b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
        (folder / "large.dcm").write_bytes(head + b"\x29\x00\x10\x10OB\0\0" + (100 * 2**20).to_bytes(4, "little"))
        with (folder / "large.dcm").open("r+b") as stream:
            stream.truncate(100 * 2**20 + 200)
        return
    folder.mkdir()
    (odd,) = (odd for odd in ODD if odd.name == name)
    odd.write(folder)


@pytest.mark.parametrize("name", HOSTILE)
def test_an_attack_is_refused_within_50_mb(write, tmp_path, name):
    write_hostile(name, tmp_path / "hostile")
    command = [sys.executable, "-c", _PEAK, write(), tmp_path / "hostile"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    grown_mb, unreadable, instances = done.stdout.split()
    assert float(grown_mb) < 50
    assert int(unreadable) == 1
    assert int(instances) in (0, 15)


def test_sequences_as_deep_as_real_ones_are_read(write):
    path = sorted(write().iterdir())[0]
    content = path.read_bytes()
    at = content.rindex(b"\xe0\x7f\x10\x00OW")
    for depth, flaw in ((8, None), (33, "nested more than 32 deep")):
        path.write_bytes(content[:at] + nested(depth) + content[at:])
        with path.open("rb") as stream:
            found = layout_of_header(stream, preamble=True)
        assert isinstance(found, Layout) if flaw is None else flaw in str(found)


def test_a_group_length_may_stand_before_the_pixels(write):
    """dcmtk writes (7FE0,0000), and pydicom does not stop there."""
    path = sorted(write().iterdir())[0]
    content = path.read_bytes()
    at = content.rindex(b"\xe0\x7f\x10\x00OW")
    path.write_bytes(content[:at] + b"\xe0\x7f\x00\x00UL\x04\x00\xfc\x00\x00\x00" + content[at:])
    assert not scan_folder(path.parent).unreadable
    assert assembled(path.parent).volume.array.shape[0] == DEPTH


@pytest.mark.parametrize("tail", [b"\0" * 40, b"\1\2"])
def test_what_follows_a_deflated_part_is_damage(write, tail):
    path = sorted(write().iterdir())[0]
    transcode(path, DeflatedExplicitVRLittleEndian)
    assert not scan_folder(path.parent).unreadable
    path.write_bytes(path.read_bytes() + tail)
    (unreadable,) = scan_folder(path.parent).unreadable
    assert "ends before the file" in unreadable.message


def rle_frame(write):
    path = sorted(write(small_volume(shape=(DEPTH, 32, 40))).iterdir())[5]
    transcode(path, RLELossless)
    return path, get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)


def test_an_rle_frame_is_looked_through_before_it_is_decoded(write):
    path, frame = rle_frame(write)
    assert flaw_of_rle(frame, 32 * 40, 2) is None
    assert "another number of pixels" in flaw_of_rle(frame, 32 * 40 + 1, 2)
    assert "another number of pixels" in flaw_of_rle(frame[:-40], 32 * 40, 2)
    assert "segments than bytes" in flaw_of_rle(frame, 32 * 40, 1)
    assert "cut short" in flaw_of_rle(frame[:63], 32 * 40, 2)
    crossed = frame[:4] + frame[8:12] + frame[4:8] + frame[12:]
    assert "follow each other" in flaw_of_rle(crossed, 32 * 40, 2)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([crossed])
    dataset.save_as(path)
    with raises_reason(UnsupportedPixels, "damaged-frame", names="00005.dcm"):
        assembled(path.parent)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1])
def test_a_frame_that_claims_a_huge_size_is_not_decoded(write, syntax):
    """JPEG 2000 would take 7 GB and 46 s, JPEG-LS would end the process."""
    path = sorted(write(small_volume(shape=(DEPTH, 32, 40))).iterdir())[5]
    for each in path.parent.iterdir():
        transcode(each, syntax)
    assert np.array_equal(assembled(path.parent).volume.array, small_volume(shape=(DEPTH, 32, 40)).array)
    content = path.read_bytes()
    marker = {JPEG2000Lossless: b"\xff\x51", JPEGLSLossless: b"\xff\xf7", JPEGLosslessSV1: b"\xff\xc3"}[syntax]
    at = content.index(marker, content.rindex(b"\xe0\x7f\x10\x00"))
    wide = (60000).to_bytes(4, "big") * 2 if syntax == JPEG2000Lossless else (60000).to_bytes(2, "big") * 2
    at += 6 if syntax == JPEG2000Lossless else 5
    path.write_bytes(content[:at] + wide + content[at + len(wide) :])
    start = time.perf_counter()
    with raises_reason(UnsupportedPixels, "damaged-frame", names="00005.dcm"):
        assembled(path.parent)
    assert time.perf_counter() - start < 5


def test_a_frame_without_a_header_is_named():
    assert flaw_of_size(b"", 32, 40) == "has no readable header"
    assert flaw_of_size(b"\xff\xd8\xff\xd9" + bytes(40), 32, 40) == "has no readable header"
    assert flaw_of_size(b"\xff\x4f\xff\x51" + bytes(20), 32, 40) == "has no readable header"


def test_a_slice_unlike_both_neighbours_is_found():
    smooth = np.cumsum(np.full((12, 16, 16), 3), axis=0)
    assert slices_unlike_both_neighbours(smooth) == ()
    smooth[6, :, 8:] = 500
    assert slices_unlike_both_neighbours(smooth) == (6,)
    assert slices_unlike_both_neighbours(np.random.default_rng(0).integers(-1000, 1000, (16, 32, 32))) == ()
