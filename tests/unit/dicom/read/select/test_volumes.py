"""Series that hold several volumes."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from ctflow.core.errors import BrokenSeries
from ctflow.core.volume import Volume
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import require_selected
from ctflow.dicom.write.ct_series import write_ct_series
from dicom_support import axes, selection_of, setter, small_volume

DEPTH = 16
GRID = axes((2, 1, 0), (1, 1, 1))
IDS = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5", "PatientID": "P"}


def part(folder, number, *, up_mm=0.0, depth=DEPTH, adjust=None, **attributes) -> Volume:
    """Write one volume of the series 1.2.4; its files are named by `number` alone."""
    affine = GRID.copy()
    affine[2, 3] += up_mm
    volume = small_volume(affine, (depth, 8, 10), seed=number)
    change = setter(**IDS, **attributes)

    def both(dataset: Dataset, d: int) -> None:
        change(dataset, d)
        if adjust is not None:
            adjust(dataset, d)

    write_ct_series(volume, folder / f"p{number}", seed=number, adjust=both)
    return volume


def read(folder, **options) -> dict[str | None, Volume]:
    """The volume of each selected part by its name."""
    found = {}
    for candidate in selection_of(folder, **options).selected:
        name = candidate.series.part.name if candidate.series.part else None
        assert name not in found
        found[name] = assemble_series(candidate.series).volume
    return found


def assert_is(found: Volume, truth: Volume) -> None:
    np.testing.assert_array_equal(found.array, truth.array)
    np.testing.assert_allclose(found.geometry.affine_mm, truth.geometry.affine_mm, atol=1e-4)


APART = [
    ("TemporalPositionIndex", [2, 1, 10], ["temporal-2", "temporal-1", "temporal-10"]),
    ("TemporalPositionIdentifier", ["1", "2", "3"], ["temporal-1", "temporal-2", "temporal-3"]),
    ("AcquisitionNumber", ["4", "5", "7"], ["acquisition-4", "acquisition-5", "acquisition-7"]),
    ("AcquisitionTime", ["120000.5", "120100", "115900"], ["time-2", "time-3", "time-1"]),
    ("AcquisitionDateTime", ["20260101120000.5", "20260101120100", "20260101115900"], ["time-2", "time-3", "time-1"]),
    ("TriggerTime", ["75.5", "0", "150"], ["trigger-75.5", "trigger-0", "trigger-150"]),
    ("NominalPercentageOfCardiacPhase", [40, 75, 0], ["phase-40", "phase-75", "phase-0"]),
    (
        "ImageType",
        [["DERIVED", "SECONDARY", "AXIAL", word] for word in ("LOW", "HIGH", "MIXED")],
        [f"type-derived-secondary-axial-{word}" for word in ("low", "high", "mixed")],
    ),
    ("ContrastBolusAgent", ["Iopamidol", "Omnipaque for Mrs Smith", ""], ["contrast-2", "contrast-3", "contrast-1"]),
    ("KVP", ["80", "140", "100"], ["energy-80", "energy-140", "energy-100"]),
    ("ConvolutionKernel", ["B70f", "B30f", "Qr40"], ["kernel-2", "kernel-1", "kernel-3"]),
]


@pytest.mark.parametrize(("keyword", "values", "names"), APART, ids=[keyword for keyword, _, _ in APART])
def test_volumes_at_the_same_positions_are_told_apart(tmp_path, keyword, values, names):
    truths = [part(tmp_path, number, **{keyword: value}) for number, value in enumerate(values)]
    found = read(tmp_path)
    assert set(found) == set(names)
    for name, truth in zip(names, truths, strict=True):
        assert_is(found[name], truth)


def test_each_part_says_which_volume_it_is(tmp_path):
    for number, phase in enumerate((40, 75)):
        part(tmp_path, number, NominalPercentageOfCardiacPhase=phase)
    one, other = (candidate.series for candidate in selection_of(tmp_path).selected)
    assert (one.part.label, one.part.number, one.part.count) == ("phase 40 %", 1, 2)
    assert other.dropped[-1].endswith(": phase 75 % (NominalPercentageOfCardiacPhase tells them apart)")
    assert one.uid == other.uid == "1.2.4"
    assert one.digest != other.digest


def test_no_text_of_a_header_is_in_a_name_or_message(tmp_path):
    for number, agent in enumerate(("Iopamidol", "Omnipaque for Mrs Smith")):
        part(tmp_path, number, ContrastBolusAgent=agent, AcquisitionTime=f"1200{number}7")
    said = " ".join(
        f"{each.message} {each.series.dropped} {each.series.part}" for each in selection_of(tmp_path).selected
    )
    assert "Smith" not in said
    assert "12000" not in said


def test_contrast_is_given_or_not(tmp_path):
    truths = [part(tmp_path, 0), part(tmp_path, 1, ContrastBolusAgent="Iopamidol")]
    found = read(tmp_path)
    assert_is(found["contrast-no"], truths[0])
    assert_is(found["contrast-yes"], truths[1])


def test_the_first_attribute_of_the_list_tells_apart(tmp_path):
    for number in range(2):
        attributes = {"TemporalPositionIdentifier": str(number + 1), "NominalPercentageOfCardiacPhase": 10 * number}
        part(tmp_path, number, **attributes, AcquisitionNumber=str(9 - number))
    assert set(read(tmp_path)) == {"temporal-1", "temporal-2"}
    assert set(read(tmp_path, volume="phase=10")) == {"temporal-2"}
    assert set(read(tmp_path, volume="acquisition=9")) == {"temporal-1"}


def test_an_attribute_that_makes_no_volumes_is_passed_over(tmp_path):
    """AcquisitionNumber counts rotations, each of which holds slices of both phases."""
    truths = [
        part(
            tmp_path,
            number,
            NominalPercentageOfCardiacPhase=50 * number,
            adjust=lambda dataset, d: setattr(dataset, "AcquisitionNumber", str(d // 4)),
        )
        for number in range(2)
    ]
    found = read(tmp_path)
    assert_is(found["phase-0"], truths[0])
    assert_is(found["phase-50"], truths[1])


def test_two_attributes_together_tell_apart(tmp_path):
    truths = {
        f"acquisition-{acquisition}-phase-{phase}": part(
            tmp_path,
            10 * acquisition + phase,
            AcquisitionNumber=str(acquisition),
            NominalPercentageOfCardiacPhase=phase,
        )
        for acquisition in (1, 2)
        for phase in (0, 5)
    }
    found = read(tmp_path)
    assert set(found) == set(truths)
    for name, truth in truths.items():
        assert_is(found[name], truth)
    assert set(read(tmp_path, volume="phase=5")) == {"acquisition-1-phase-5", "acquisition-2-phase-5"}


@pytest.mark.parametrize("keyword", ["AcquisitionTime", "AcquisitionDateTime", "TriggerTime"])
def test_times_that_grow_from_slice_to_slice_tell_runs_apart(tmp_path, keyword):
    truths = [
        part(tmp_path, n, adjust=lambda dataset, d, n=n: setattr(dataset, keyword, f"12{n:02d}{d:02d}.5"))
        for n in range(3)
    ]
    found = list(read(tmp_path).values())
    assert len(found) == 3
    for one, truth in zip(found, truths, strict=True):
        assert_is(one, truth)


def test_times_of_runs_of_other_lengths_are_not_guessed(tmp_path):
    """The shorter one runs downwards: cut where a position returns, the first run would take slices of it."""
    part(tmp_path, 0, adjust=lambda dataset, d: setattr(dataset, "AcquisitionTime", f"1200{d:02d}"))
    part(
        tmp_path, 1, up_mm=10 * 2.5, adjust=lambda dataset, d: setattr(dataset, "AcquisitionTime", f"1201{59 - d:02d}")
    )
    assert reason_of(tmp_path) == "doubled"


def test_times_that_run_through_all_phases_at_each_table_position_are_not_runs(tmp_path):
    """Cine 4D: at each table position come all phases, then the table moves."""
    for n in range(2):
        part(
            tmp_path, n, adjust=lambda dataset, d, n=n: setattr(dataset, "AcquisitionTime", f"12{d // 8:02d}{n}{d % 8}")
        )
    assert reason_of(tmp_path) == "doubled"


@pytest.mark.parametrize("up_mm", [10.0, 1.25, 7 * 2.5 + 0.8], ids=["same places", "between the others", "overlap"])
def test_acquisitions_that_overlap_are_two_volumes(tmp_path, up_mm):
    truths = [part(tmp_path, 0), part(tmp_path, 1, up_mm=up_mm, AcquisitionNumber="2")]
    found = read(tmp_path)
    assert_is(found["acquisition-1"], truths[0])
    assert_is(found["acquisition-2"], truths[1])


def test_phases_between_each_other_s_slices_are_never_one_volume(tmp_path):
    truths = [part(tmp_path, n, up_mm=1.25 * n, NominalPercentageOfCardiacPhase=50 * n) for n in range(2)]
    found = read(tmp_path)
    assert_is(found["phase-0"], truths[0])
    assert_is(found["phase-50"], truths[1])


def test_two_regions_are_two_volumes_and_say_that_slices_may_be_missing(tmp_path):
    truths = [part(tmp_path, 0), part(tmp_path, 1, up_mm=DEPTH * 2.5 + 40, AcquisitionNumber="2")]
    assert_is(read(tmp_path)["acquisition-2"], truths[1])
    assert "may be missing" in selection_of(tmp_path).selected[0].series.dropped[-1]


def test_a_slice_lost_between_two_acquisitions_stays_a_gap(tmp_path):
    part(tmp_path, 0)
    part(tmp_path, 1, up_mm=(DEPTH + 1) * 2.5, AcquisitionNumber="2")
    assert reason_of(tmp_path) == "gap"


def test_consecutive_acquisitions_are_one_volume(tmp_path):
    part(tmp_path, 0)
    part(tmp_path, 1, up_mm=DEPTH * 2.5, AcquisitionNumber="2")
    (candidate,) = selection_of(tmp_path).selected
    assert candidate.series.part is None
    assert not candidate.series.dropped
    assert assemble_series(candidate.series).volume.array.shape[0] == 2 * DEPTH


def test_a_slab_scanned_twice_does_not_split_a_volume_into_slabs(tmp_path):
    for number in range(3):
        part(tmp_path, number, up_mm=number * DEPTH * 2.5, AcquisitionNumber=str(number + 1))
    part(tmp_path, 3, up_mm=DEPTH * 2.5, AcquisitionNumber="4")
    assert reason_of(tmp_path) == "doubled"


def test_volumes_of_another_size_are_told_apart(tmp_path):
    truth = part(tmp_path, 0)
    coarse = small_volume(GRID, (DEPTH, 12, 12), seed=5)
    write_ct_series(coarse, tmp_path / "coarse", adjust=setter(**IDS, AcquisitionNumber="2"))
    found = read(tmp_path)
    assert_is(found["acquisition-1"], truth)
    assert_is(found["acquisition-2"], coarse)


def test_a_part_that_lacks_a_slice_is_rejected_alone(tmp_path):
    truth = part(tmp_path, 0, TemporalPositionIdentifier="1")
    part(tmp_path, 1, TemporalPositionIdentifier="2", depth=DEPTH + 1)
    (tmp_path / "p1" / "00007.dcm").unlink()
    one, other = selection_of(tmp_path).selected
    assert_is(assemble_series(one.series).volume, truth)
    with pytest.raises(BrokenSeries) as caught:
        assemble_series(other.series)
    assert caught.value.reason == "gap"
    assert assemble_series(other.series, allow_gaps=True).volume.array.shape[0] == DEPTH + 1


def test_volumes_that_nothing_tells_apart_stay_rejected(tmp_path):
    part(tmp_path, 0)
    part(tmp_path, 1)
    assert reason_of(tmp_path) == "doubled"


def test_volumes_that_share_sop_instance_uids_stay_rejected(tmp_path):
    for number in range(2):
        part(
            tmp_path,
            number,
            TemporalPositionIdentifier=str(number),
            adjust=lambda dataset, d: setattr(dataset, "SOPInstanceUID", f"1.2.6.{d}"),
        )
    assert reason_of(tmp_path) == "doubled"


def test_copies_under_other_acquisition_numbers_are_one_volume(tmp_path):
    truth = part(tmp_path, 0)
    write_ct_series(
        truth,
        tmp_path / "again",
        adjust=lambda dataset, d: setter(**IDS, AcquisitionNumber="2", SOPInstanceUID=f"1.2.7.{d}")(dataset, d),
    )
    (candidate,) = selection_of(tmp_path).selected
    assert candidate.series.part is None
    assembled = assemble_series(candidate.series)
    assert_is(assembled.volume, truth)
    assert any("16 slices that duplicate" in warning for warning in assembled.warnings)


@pytest.mark.parametrize(
    ("volume", "names"),
    [
        ("all", {"phase-0", "phase-50"}),
        ("first", {"phase-0"}),
        ("2", {"phase-50"}),
        ("phase=50", {"phase-50"}),
        ("acquisition=1", {"phase-0", "phase-50"}),
        ("phase=70", set()),
        ("3", set()),
    ],
)
def test_a_volume_is_chosen(tmp_path, volume, names):
    for n in range(2):
        part(tmp_path, n, NominalPercentageOfCardiacPhase=50 * n)
    assert set(read(tmp_path, volume=volume)) == names
    others = [each for each in selection_of(tmp_path, volume=volume).candidates if not each.selected]
    assert {each.reason for each in others} <= {"not-asked-for"}
    assert all("1: phase 0 %; 2: phase 50 %" in each.message for each in others)


@pytest.mark.parametrize("volume", ["first", "2", "phase=50"])
def test_the_choice_does_not_affect_a_series_of_one_volume(tmp_path, volume):
    part(tmp_path, 0)
    assert set(read(tmp_path, volume=volume)) == {None}


def test_best_takes_one_volume_of_a_series(tmp_path):
    for n in range(2):
        part(tmp_path, n, NominalPercentageOfCardiacPhase=50 * n)
    assert set(read(tmp_path, pick="best")) == {"phase-0"}


def test_ten_phases_are_ten_volumes_in_their_order(tmp_path):
    for n in range(10):
        part(tmp_path, n, NominalPercentageOfCardiacPhase=10 * n)
    scan = scan_folder(tmp_path)
    selection = selection_of(tmp_path)
    require_selected(selection, scan)
    assert [each.series.part.number for each in selection.selected] == list(range(1, 11))


def reason_of(folder) -> str:
    (candidate,) = selection_of(folder).selected
    assert candidate.series.part is None
    with pytest.raises(BrokenSeries) as caught:
        assemble_series(candidate.series)
    return caught.value.reason
