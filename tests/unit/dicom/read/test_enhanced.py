"""Enhanced CT: the right volumes, by readers that share no code with ctflow, or a specific rejection."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.volume import Volume
from ctflow.dicom.read.assemble import Assembled, assemble_series
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import axes, rotation, selection_of, setter, small_volume
from enhanced_support import compressed, frames_of, write_enhanced

SHAPE = (16, 32, 40)


def volume(seed=0, up_mm=0.0, affine=None) -> Volume:
    placed = (axes((2, 1, 0), (1, 1, 1)) if affine is None else affine).copy()
    placed[2, 3] += up_mm
    return small_volume(placed, SHAPE, seed)


def read(folder: Path, **options) -> dict[str | None, Assembled]:
    selected = selection_of(folder, **options).selected
    return {each.series.part and each.series.part.name: assemble_series(each.series) for each in selected}


def only(folder: Path) -> Assembled:
    (found,) = read(folder).values()
    return found


def assert_is(found: Assembled, truth: Volume) -> None:
    np.testing.assert_array_equal(found.volume.array, truth.array)
    np.testing.assert_allclose(found.volume.geometry.affine_mm, truth.geometry.affine_mm, atol=1e-3)


def by_highdicom(path: Path) -> hd.Volume:
    """Its volume, whose slices run the other way."""
    return hd.imread(path).get_volume().flip_spatial(0)


def reason_of(folder: Path) -> tuple[str, str]:
    (candidate,) = selection_of(folder).candidates
    assert not candidate.selected
    return candidate.reason, candidate.message


OBLIQUE = axes((2, 1, 0), (1, 1, 1))
OBLIQUE[:3, :3] = rotation((0.2, -0.4, 0.7)) @ OBLIQUE[:3, :3]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per frame"])
@pytest.mark.parametrize(
    "affine", [None, axes((2, 1, 0), (-1, 1, -1)), OBLIQUE], ids=["axial", "feet first", "oblique"]
)
def test_frames_are_the_slices_of_a_volume(tmp_path, shared, affine):
    truth = volume(affine=affine)
    write_enhanced(tmp_path / "e.dcm", frames_of(truth), shared=shared)
    found = only(tmp_path)
    assert_is(found, truth)
    assert found.volume.array.dtype == np.int16
    assert not found.warnings


def test_highdicom_and_itk_read_the_same_volume(tmp_path):
    truth = volume()
    path = write_enhanced(tmp_path / "e.dcm", frames_of(truth))
    found = only(tmp_path).volume
    theirs = by_highdicom(path)
    np.testing.assert_array_equal(theirs.array, found.array)
    np.testing.assert_allclose(theirs.affine, found.geometry.affine_mm, atol=1e-3)
    image = sitk.ReadImage(path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), found.array)
    np.testing.assert_allclose(image.GetOrigin(), found.geometry.affine_mm[:3, 3], atol=1e-3)


@pytest.mark.parametrize("seed", [1, 2])
def test_frames_in_any_order_are_placed_by_position(tmp_path, seed):
    truth = volume()
    frames = frames_of(truth)
    random.Random(seed).shuffle(frames)
    path = write_enhanced(tmp_path / "e.dcm", frames)
    assert_is(only(tmp_path), truth)
    np.testing.assert_array_equal(by_highdicom(path).array, truth.array)


def test_each_frame_has_its_own_rescale(tmp_path):
    truth = volume()
    even = Volume(truth.array // 2 * 2, truth.geometry)
    write_enhanced(tmp_path / "e.dcm", frames_of(even), rescale_of=lambda index: (1 + index % 2, -1024 - 2 * index))
    assert_is(only(tmp_path), even)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless], ids=lambda syntax: syntax.name)
def test_compressed_frames_are_decoded(tmp_path, syntax):
    truth = volume()
    write_enhanced(tmp_path / "e.dcm", frames_of(truth), change=compressed(syntax))
    assert_is(only(tmp_path), truth)


def test_many_compressed_frames_are_decoded_in_processes(tmp_path):
    truth = small_volume(axes((2, 1, 0), (1, 1, 1)), (80, 32, 32))
    write_enhanced(tmp_path / "e.dcm", frames_of(truth), change=compressed(RLELossless))
    assert_is(only(tmp_path), truth)


def test_a_damaged_frame_is_named(tmp_path):
    path = write_enhanced(tmp_path / "e.dcm", frames_of(volume()), change=compressed(RLELossless))
    dataset = pydicom.dcmread(path)
    frames = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=16))
    frames[4] = frames[4][:100]
    dataset.PixelData = pydicom.encaps.encapsulate(frames)
    dataset.save_as(path)
    with pytest.raises(UnsupportedPixels, match="frame 5"):
        only(tmp_path)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian], ids=lambda syntax: syntax.name)
def test_native_frames_of_any_encoding_are_read(tmp_path, syntax):
    truth = volume()
    path = write_enhanced(tmp_path / "e.dcm", frames_of(truth))
    dataset = pydicom.dcmread(path)
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    kept = Dataset(dataset)
    kept.file_meta = dataset.file_meta
    pydicom.dcmwrite(
        path, kept, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian,
        force_encoding=True,
    )  # fmt: skip
    assert_is(only(tmp_path), truth)


def test_pixels_that_are_cut_short_are_an_error(tmp_path):
    write_enhanced(
        tmp_path / "e.dcm",
        frames_of(volume()),
        change=lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[:-2000]),
    )
    with pytest.raises(BrokenSeries) as caught:
        only(tmp_path)
    assert caught.value.reason == "unreadable"


# --------------------------------------------------------------------------------------------- stacks, times, parts


def test_temporal_positions_are_volumes(tmp_path):
    truths = [volume(seed) for seed in range(3)]
    frames = [frame for n, one in enumerate(truths) for frame in frames_of(one, TemporalPositionIndex=n + 1)]
    write_enhanced(tmp_path / "e.dcm", frames)
    found = read(tmp_path)
    for n, truth in enumerate(truths):
        assert_is(found[f"temporal-{n + 1}"], truth)


def test_cardiac_phases_are_volumes(tmp_path):
    truths = {percent: volume(percent) for percent in (40, 75)}
    frames = [frame for percent, one in truths.items() for frame in frames_of(one, phase=percent)]
    write_enhanced(tmp_path / "e.dcm", frames)
    found = read(tmp_path)
    for percent, truth in truths.items():
        assert_is(found[f"phase-{percent}"], truth)


def test_energies_are_volumes(tmp_path):
    truths = {kv: volume(kv) for kv in (80, 140)}
    write_enhanced(tmp_path / "e.dcm", [frame for kv, one in truths.items() for frame in frames_of(one, KVP=str(kv))])
    assert_is(read(tmp_path)["energy-140"], truths[140])


def test_stacks_of_two_directions_are_two_volumes(tmp_path):
    """One array with one geometry for both would misplace the second (dcm2niix issue 1009)."""
    axial, coronal = volume(0), volume(1, affine=axes((1, 2, 0), (1, -1, 1)))
    write_enhanced(tmp_path / "e.dcm", frames_of(axial, StackID="1") + frames_of(coronal, StackID="2"), shared=False)
    found = read(tmp_path)
    assert_is(found["stack-1"], axial)
    assert_is(found["stack-2"], coronal)


def test_interleaved_stacks_of_one_volume_are_one(tmp_path):
    """Slices of packages lie between each other's; as volumes of their own each would be thinned out (issue 839)."""
    truth = volume()
    frames = [(truth, d, {"StackID": str(d % 3 + 1)}) for step in range(3) for d in range(step, SHAPE[0], 3)]
    write_enhanced(tmp_path / "e.dcm", frames)
    found = read(tmp_path)
    assert_is(found[None], truth)


def test_each_of_several_objects_is_a_volume(tmp_path):
    """An Enhanced CT for each moment, whose TemporalPositionIndex may go on or not (dicom2nifti issue 140)."""
    truths = [volume(seed) for seed in range(3)]
    for n, truth in enumerate(truths):
        write_enhanced(tmp_path / f"{n}.dcm", frames_of(truth), uid=f"1.2.4.{n + 1}")
    found = read(tmp_path)
    for n, truth in enumerate(truths):
        assert_is(found[f"object-{n + 1}"], truth)


def test_a_concatenation_is_one_volume(tmp_path):
    truth = volume()
    frames = frames_of(truth)
    for n, part in enumerate((frames[:7], frames[7:])):
        write_enhanced(
            tmp_path / f"{n}.dcm",
            part,
            uid=f"1.2.4.{n + 1}",
            change=lambda dataset, n=n: setter(
                ConcatenationUID="1.2.9",
                InConcatenationNumber=n + 1,
                InConcatenationTotalNumber=2,
                ConcatenationFrameOffsetNumber=7 * n,
            )(dataset, 0),
        )
    assert_is(only(tmp_path), truth)
    (tmp_path / "1.dcm").unlink()
    reason, message = reason_of(tmp_path)
    assert reason == "enhanced"
    assert "2 parts, of which 1" in message


def test_a_missing_frame_is_a_gap_and_a_file_twice_counts_once(tmp_path):
    truth = volume()
    path = write_enhanced(tmp_path / "e.dcm", frames_of(truth))
    shutil.copy(path, tmp_path / "again.dcm")
    found = only(tmp_path)
    assert_is(found, truth)
    assert found.warnings == ("1 duplicate file omitted",)
    (tmp_path / "again.dcm").unlink()
    longer = small_volume(axes((2, 1, 0), (1, 1, 1)), (SHAPE[0] + 2, *SHAPE[1:]))
    write_enhanced(path, [frame for frame in frames_of(longer) if frame[1] != 7])
    with pytest.raises(BrokenSeries) as caught:
        only(tmp_path)
    assert caught.value.reason == "gap"


def test_a_frame_twice_counts_once(tmp_path):
    truth = volume()
    write_enhanced(tmp_path / "e.dcm", [*frames_of(truth), *frames_of(truth)[3:4]])
    found = only(tmp_path)
    assert_is(found, truth)
    assert any("1 slice that duplicates" in warning for warning in found.warnings)


def test_localizer_frames_are_omitted(tmp_path):
    truth = volume()
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    scout = frames_of(volume(1, affine=axes((0, 2, 1), (1, -1, 1))), FrameType=localizer)
    write_enhanced(tmp_path / "e.dcm", [*frames_of(truth), *scout[:1]], shared=False)
    (candidate,) = selection_of(tmp_path).selected
    assert_is(assemble_series(candidate.series), truth)
    assert candidate.series.dropped == ("1 localizer image of the series omitted",)


# --------------------------------------------------------------------------------------------------------- rejected


def without_place(dataset: Dataset) -> None:
    del dataset.PerFrameFunctionalGroupsSequence[5].PlanePositionSequence


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda dataset: setattr(dataset, "NumberOfFrames", 15), "describes 16 frames"),
        (lambda dataset: delattr(dataset, "NumberOfFrames"), "NumberOfFrames says 0"),
        (lambda dataset: delattr(dataset, "PerFrameFunctionalGroupsSequence"), "describes 0 frames"),
    ],
)
def test_frames_that_nothing_describes_are_rejected(tmp_path, change, says):
    write_enhanced(tmp_path / "e.dcm", frames_of(volume()), change=change)
    reason, message = reason_of(tmp_path)
    assert reason == "enhanced"
    assert says in message


def test_a_frame_without_a_place_is_rejected_by_name(tmp_path):
    write_enhanced(tmp_path / "e.dcm", frames_of(volume()), change=without_place)
    with pytest.raises(BrokenSeries, match="frame 6") as caught:
        only(tmp_path)
    assert caught.value.reason == "no-geometry"


def test_enhanced_and_single_frame_images_in_one_series_are_rejected(tmp_path):
    write_enhanced(tmp_path / "e.dcm", frames_of(volume()))
    write_ct_series(volume(1), tmp_path / "ct", adjust=setter(StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4"))
    reason, message = reason_of(tmp_path)
    assert reason == "enhanced"
    assert "shares the series" in message


def test_groups_do_not_say_whose_a_frame_is(tmp_path):
    def change(dataset: Dataset) -> None:
        (content,) = dataset.PerFrameFunctionalGroupsSequence[3].FrameContentSequence
        content.PatientID, content.SOPInstanceUID, content.Rows = "ANOTHER", "1.2.99", 7
        content.NumberOfFrames = 9

    truth = volume()
    write_enhanced(tmp_path / "e.dcm", frames_of(truth), change=change)
    found = only(tmp_path)
    assert_is(found, truth)
    assert {instance.header.SOPInstanceUID for instance in found.instances} == {"1.2.4.1"}
    assert {instance.header.PatientID for instance in found.instances} == {"PHANTOM-0"}
