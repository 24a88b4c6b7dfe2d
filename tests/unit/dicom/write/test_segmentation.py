from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as itk
from pydicom.sr.codedict import codes
from scipy.spatial import cKDTree

from ctflow.core.errors import NotWritten
from ctflow.core.model import Code, Segment
from ctflow.core.volume import Geometry
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.source import sources_from_headers
from dicom_support import assembled, selection_of, setter, small_volume, spec_of
from reasons import raises_reason
from tests_support import dciodvfy_errors, segment_points_by_dcmqi, segments_by_dcmqi

NOTICE = "RESEARCH ONLY - NOT FOR CLINICAL USE"
CATEGORY = Code("49755003", "SCT", "Morphologically Abnormal Structure")
NEOPLASM = Code("108369006", "SCT", "Neoplasm")
LUNG = Code("39607008", "SCT", "Lung")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
TUMOUR = Segment(1, "Lung tumour", CATEGORY, NEOPLASM, (LUNG,))
LUNGS = Segment(2, "Lungs", ORGAN, LUNG)
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager", "precision": "fp32", "overlap": 0.25})


def affine_from(columns, origin=(-10.5, 20.25, -300.0)):
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(columns)
    affine[:3, 3] = origin
    return affine


TURN = 0.3
GRIDS = {
    "head first": affine_from([(0, 0, 2.5), (0, 0.8, 0), (0.8, 0, 0)]),
    "feet first": affine_from([(0, 0, -2.5), (0, 0.8, 0), (-0.8, 0, 0)]),
    "prone": affine_from([(0, 0, 2.5), (0, -0.8, 0), (-0.8, 0, 0)]),
    "anisotropic": affine_from([(0, 0, 3.0), (0, 0.5, 0), (1.25, 0, 0)]),
    "oblique": affine_from(
        [
            (0, -2 * np.sin(TURN), 2 * np.cos(TURN)),
            (0, 0.7 * np.cos(TURN), 0.7 * np.sin(TURN)),
            (0.9, 0, 0),
        ]
    ),
}


def some_labels(shape, segments=1):
    """A lopsided body for each segment, so that any flip or swap of axes shows."""
    labels = np.zeros(shape, np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    labels[7, 2, 1] = 1
    if segments > 1:
        labels[9:12, 7:9, 3:5] = 2
    return labels


def segmented(folder, labels=None, spec=None, made_by=MADE_BY):
    """A SEG, and the volume and headers that it lies on."""
    loaded = assembled(folder)
    headers = [instance.header for instance in loaded.instances]
    labels = some_labels(loaded.volume.array.shape) if labels is None else labels
    return segmentation_from_labels(labels, headers, spec or spec_of((TUMOUR,)), made_by), loaded.volume, headers


@pytest.fixture
def written(tmp_path):
    def make(dataset, name="segmentation.dcm"):
        write_dataset(dataset, tmp_path / name)
        return tmp_path / name

    return make


def ordered(points):
    points = np.round(points, 3) + 0.0
    return points[np.lexsort(points.T)]


def world_points(labels, geometry: Geometry):
    return ordered(geometry.world_from_index(np.argwhere(labels)))


def points_by_highdicom(path, number=1):
    volume = hd.seg.segread(path).get_volume(segment_numbers=[number], combine_segments=True)
    index = np.argwhere(volume.array)
    return ordered(index @ volume.affine[:3, :3].T + volume.affine[:3, 3])


@pytest.mark.parametrize("grid", GRIDS)
def test_two_other_readers_find_the_same_voxels(write, written, grid):
    dataset, volume, _ = segmented(write(small_volume(GRIDS[grid])))
    path = written(dataset)
    expected = world_points(some_labels(volume.array.shape), volume.geometry)
    assert dciodvfy_errors(path) == []
    assert np.allclose(ordered(segment_points_by_dcmqi(path)), expected, atol=2e-3)
    assert np.allclose(points_by_highdicom(path), expected, atol=2e-3)


@pytest.mark.parametrize(
    "declared",
    [
        {"SpacingBetweenSlices": "7"},
        {"SpacingBetweenSlices": "-2.5"},
        {"SpacingBetweenSlices": "0", "SliceThickness": "0"},
        {"SpacingBetweenSlices": None, "SliceThickness": "-1"},
        {"SpacingBetweenSlices": None, "SliceThickness": ""},
    ],
)
@pytest.mark.parametrize("grid", ["feet first", "oblique"])
def test_declared_distances_put_the_mask_nowhere_else(write, written, grid, declared):
    folder = write(small_volume(GRIDS[grid]), setter(**declared))
    warnings = " ".join(assembled(folder).warnings)
    dataset, volume, _ = segmented(folder)
    path = written(dataset)
    expected = world_points(some_labels(volume.array.shape), volume.geometry)
    assert dciodvfy_errors(path) == []
    assert np.allclose(ordered(segment_points_by_dcmqi(path)), expected, atol=2e-3)
    assert np.allclose(points_by_highdicom(path), expected, atol=2e-3)
    assert ("positions count" in warnings or "is used instead" in warnings) == any(declared.values())


@pytest.mark.parametrize("kind", ["rounded", "beside the line"])
def test_what_scanners_round_is_read_at_its_place(write, written, kind):
    """Slices every 0.625 mm, positions to 0.1 mm; both readers find each voxel within a tenth of its size."""
    affine = affine_from([(0, 0, 0.625), (0, 0.8, 0), (0.8, 0, 0)])

    def adjust(dataset, index):
        x, y, z = (float(mm) for mm in dataset.ImagePositionPatient)
        jitter = 0.03 if kind == "beside the line" and index % 2 else 0.0
        dataset.ImagePositionPatient = [x + jitter, y, round(z, 1) if kind == "rounded" else z]

    dataset, volume, _ = segmented(write(small_volume(affine), adjust))
    path = written(dataset)
    assert not volume.geometry.is_tilted
    true = world_points(some_labels(volume.array.shape), Geometry(volume.array.shape, affine))
    seg = hd.seg.segread(path)
    by_highdicom = seg.get_volume(combine_segments=True, rtol=0.2, perpendicular_tol=0.1, allow_missing_positions=True)
    index = np.argwhere(by_highdicom.array)
    for found in (segment_points_by_dcmqi(path), index @ by_highdicom.affine[:3, :3].T + by_highdicom.affine[:3, 3]):
        assert len(found) == len(true)
        assert cKDTree(found).query(true)[0].max() < 0.08


def tilted_by(shift_mm):
    def tilted(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, float(y) + shift_mm * index, z]

    return tilted


def in_pieces(dataset, index):
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, float(z) + 1.5 * max(index - 5, 0)]


@pytest.mark.parametrize(
    ("adjust", "lies"),
    [
        (tilted_by(0.8), "tilted slices"),
        (tilted_by(-0.8), "tilted slices"),
        (in_pieces, "unevenly spaced slices"),
    ],
)
def test_what_readers_make_of_tilted_and_uneven_slices_is_what_is_said_of_them(write, written, adjust, lies):
    """They report success and misplace or lose the mask: if they refuse some day, warning and docs are wrong."""
    loaded = assembled(write(adjust=adjust))
    headers = [instance.header for instance in loaded.instances]
    labels = some_labels((len(headers), 12, 10))
    sources = sources_from_headers(headers)
    path = written(segmentation_from_labels(labels, sources, spec_of((TUMOUR,)), MADE_BY))
    assert dciodvfy_errors(path) == []
    true = np.array([header.ImagePositionPatient for header in headers], float)
    at = np.argwhere(labels)
    points = true[at[:, 0]] + at[:, 1:] @ loaded.volume.geometry.affine_mm[:3, 1:3].T
    by_dcmqi = segment_points_by_dcmqi(path)  # none where its first frame lies beside the last in the image plane
    assert len(by_dcmqi) == 0 or cKDTree(by_dcmqi).query(points)[0].max() > 1.0
    with pytest.raises(RuntimeError, match="regularly-spaced"):
        hd.seg.segread(path).get_volume()
    image = itk.ReadImage(path)
    assert np.abs(np.array(image.TransformIndexToPhysicalPoint((0, 0, image.GetSize()[2] - 1))) - true[7]).max() > 1.0
    assert (
        f"lies on {lies}: dcmqi (3D Slicer uses it), pydicom-seg and ITK put it elsewhere or lose it"
        in sources.measures.misread
    )
    read = hd.seg.segread(path).get_pixels_by_source_instance(
        [header.SOPInstanceUID for header in headers], assert_missing_frames_are_empty=True
    )
    assert np.array_equal(read[..., 0], labels)


def test_slices_with_a_gap_keep_their_distance(write):
    """dcmqi and highdicom leave a place for what is missing."""
    folder = write(small_volume(shape=(18, 12, 10)))
    (folder / "00006.dcm").unlink()
    (candidate,) = selection_of(folder).selected
    headers = [instance.header for instance in assemble_series(candidate.series, allow_gaps=True).instances]
    measures = sources_from_headers(headers).measures
    assert (measures.distance_mm, measures.is_even, measures.misread) == (2.5, True, None)


def test_several_segments_of_which_one_is_empty(write, written):
    segments = (TUMOUR, LUNGS, Segment(3, "Other", ORGAN, LUNG))
    labels = some_labels((16, 12, 10), segments=2)
    dataset, volume, _ = segmented(write(), labels, spec_of(segments))
    path = written(dataset)
    assert dciodvfy_errors(path) == []
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["Lung tumour", "Lungs", "Other"]
    for number in (1, 2):
        expected = world_points(labels == number, volume.geometry)
        assert np.allclose(points_by_highdicom(path, number), expected, atol=2e-3)
    assert not np.any(hd.seg.segread(path).get_volume(segment_numbers=[3]).array)
    meta, _ = segments_by_dcmqi(path)
    found = [segment["SegmentLabel"] for group in meta["segmentAttributes"] for segment in group]
    assert found[:2] == ["Lung tumour", "Lungs"]


@pytest.mark.parametrize("demonstration", [True, False])
def test_an_empty_result_is_valid_and_says_so(write, written, demonstration):
    labels = np.zeros((16, 12, 10), np.uint8)
    dataset, _, _ = segmented(write(), labels, spec_of((TUMOUR,), demonstration=demonstration))
    path = written(dataset)
    assert dciodvfy_errors(path) == []
    assert re.search(r"(None marked, not excluded|marked nothing; this does not exclude)", dataset.ContentDescription)
    assert (NOTICE in dataset.ContentDescription) == demonstration
    assert len(dataset.ContentDescription) <= 64
    assert not hd.seg.segread(path).pixel_array.any()


@pytest.mark.parametrize("name", ["m", "a_model_with_a_name_that_is_much_longer_than_sixty_four_characters_are"])
def test_demonstration_results_say_that_they_are_for_research_only(write, name):
    dataset, _, _ = segmented(write(), spec=spec_of((TUMOUR,), name=name))
    for keyword in ("SeriesDescription", "ContentDescription"):
        assert dataset[keyword].value.startswith(NOTICE)
        assert len(dataset[keyword].value) <= 64
    other, _, _ = segmented(write(), spec=spec_of((TUMOUR,), name=name, demonstration=False))
    assert "RESEARCH" not in other.SeriesDescription + other.ContentDescription
    assert name[:20] in other.SeriesDescription


def test_odd_names_fit_their_attributes(write, written):
    odd = Segment(1, "Tumour\\left\n" + "x" * 80, CATEGORY, NEOPLASM)
    dataset, _, _ = segmented(write(), spec=spec_of((odd,), name="m\\n" * 40, version="v" * 90))
    assert dciodvfy_errors(written(dataset)) == []
    (segment,) = dataset.SegmentSequence
    assert segment.SegmentLabel.startswith("Tumour left x")
    assert len(segment.SegmentLabel) == 64
    unnamed = Segment(1, " \n", CATEGORY, NEOPLASM)
    dataset, _, _ = segmented(write(), spec=spec_of((unnamed,)))
    assert dataset.SegmentSequence[0].SegmentLabel == "unnamed"


def test_segments_are_coded_in_the_dictionarys_words(write):
    dataset, _, _ = segmented(write())
    (segment,) = dataset.SegmentSequence
    for keyword, code in (
        ("SegmentedPropertyCategoryCodeSequence", codes.SCT.MorphologicallyAbnormalStructure),
        ("SegmentedPropertyTypeCodeSequence", codes.SCT.Neoplasm),
        ("AnatomicRegionSequence", codes.SCT.Lung),
    ):
        (item,) = segment[keyword].value
        assert (item.CodeValue, item.CodingSchemeDesignator) == (code.value, code.scheme_designator)
        assert item.CodeMeaning == code.meaning


def test_the_algorithm_is_identified(write):
    dataset, _, _ = segmented(write())
    (segment,) = dataset.SegmentSequence
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("lung_tumour", "0.1.0")
    for part in (MADE_BY.weights_digest, "ctflow_version", "overlap", "0.25", "fp32"):
        assert part in algorithm.AlgorithmParameters
    assert dataset.Manufacturer == "ctflow"
    assert dataset.SoftwareVersions == "0.1.0"
    assert dataset.DeviceSerialNumber == MADE_BY.weights_digest[:12]
    assert dataset.SegmentationType == "BINARY"


def test_frames_alone_name_their_images(write):
    """OHIF before 3.13 (@cornerstonejs/adapters 1.32) takes a top-level list for the frames' sources, in its order."""
    dataset, _, headers = segmented(write())
    assert "SourceImageSequence" not in dataset
    named = {
        item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        for item in dataset.PerFrameFunctionalGroupsSequence
    }
    assert named <= {header.SOPInstanceUID for header in headers}
    assert len(named) == dataset.NumberOfFrames
    assert dataset["ContentCreatorName"].value in (None, "")


def test_the_result_belongs_to_its_source(write):
    dataset, _, headers = segmented(write())
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName", "StudyDate"):
        assert dataset[keyword].value == headers[0][keyword].value
    (series,) = dataset.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == headers[0].SeriesInstanceUID
    assert dataset.SeriesInstanceUID != headers[0].SeriesInstanceUID
    own = {header.SOPInstanceUID for header in headers}
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} <= own


@pytest.mark.parametrize(
    ("number", "expected"),
    [("3", 301), ("", 1), ("-2", 1), ("2147483647", 1), ("21474834", 2147483401), (None, 1)],
)
def test_the_series_number_stands_beside_the_sources(write, number, expected):
    def adjust(dataset, _):
        if number is None:
            del dataset.SeriesNumber
        else:
            dataset.SeriesNumber = number

    dataset, _, _ = segmented(write(adjust=adjust))
    assert dataset.SeriesNumber == expected


DATES = [
    ({}, ("20260101", "120000")),
    ({"AcquisitionDate": "20250203", "AcquisitionTime": "010203.5"}, ("20250203", "010203.5")),
    ({"AcquisitionDate": "20250203", "AcquisitionTime": "noon"}, ("20250203", "000000")),
    ({"AcquisitionDate": "", "ContentDate": "20240506", "ContentTime": ""}, ("20240506", "000000")),
    (dict.fromkeys(("AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate"), ""), ("19000101", "000000")),
]


@pytest.mark.parametrize(("values", "moment"), DATES)
def test_dates_come_from_the_source(write, written, values, moment):
    def adjust(dataset, _):
        for keyword, value in values.items():
            dataset.add_new(keyword, pydicom.datadict.dictionary_VR(keyword), value)
            dataset[keyword].validation_mode = pydicom.config.IGNORE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pydicom.config.settings, "_writing_validation_mode", pydicom.config.IGNORE)
        patch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.IGNORE)
        folder = write(adjust=adjust)
    dataset, _, _ = segmented(folder)
    assert (dataset.ContentDate, dataset.ContentTime) == moment
    assert (dataset.SeriesDate, dataset.SeriesTime) == moment
    assert "InstanceCreationDate" not in dataset
    assert dciodvfy_errors(written(dataset)) == []


PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
from pathlib import Path
from test_segmentation import segmented
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.write.derived import write_dataset
write_dataset(segmented(Path(sys.argv[1]))[0], Path(sys.argv[2]))
"""


def test_the_same_mask_gives_the_same_bytes_in_any_process(write, written, tmp_path):
    folder = write()
    first = written(segmented(folder)[0]).read_bytes()
    assert written(segmented(folder)[0], "again.dcm").read_bytes() == first
    here = os.path.dirname(__file__)  # noqa: PTH120  # a text for the other process
    code = PROCESS.format(tests=str(pytest.importorskip("dicom_support").__file__).rsplit("/", 1)[0], here=here)
    for seed in ("1", "77"):
        path = tmp_path / f"{seed}.dcm"
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": f"UTC+{seed[0]}"}
        subprocess.run([sys.executable, "-c", code, folder, path], check=True, env=environment)
        assert path.read_bytes() == first


def test_another_result_is_another_object_of_another_series(write):
    folder = write()
    first, _, _ = segmented(folder)
    labels = some_labels((16, 12, 10))
    labels[0, 0, 0] = 1
    others = [
        segmented(folder, labels)[0],
        segmented(folder, made_by=Provenance("0.1.0", "cd" * 32, MADE_BY.settings))[0],
        segmented(folder, made_by=Provenance("0.2.0", MADE_BY.weights_digest, MADE_BY.settings))[0],
        segmented(folder, made_by=Provenance("0.1.0", MADE_BY.weights_digest, {"overlap": 0.5}))[0],
    ]
    assert len({dataset.SOPInstanceUID for dataset in (first, *others)}) == 5
    assert len({dataset.SeriesInstanceUID for dataset in (first, *others)}) == 5
    newer, _, _ = segmented(folder, spec=spec_of((TUMOUR,), version="0.2.0"))
    assert newer.SeriesInstanceUID != first.SeriesInstanceUID


def test_sources_are_not_changed(write):
    loaded = assembled(write())
    headers = [instance.header for instance in loaded.instances]
    before = copy.deepcopy(headers)
    segmentation_from_labels(some_labels(loaded.volume.array.shape), headers, spec_of((TUMOUR,)), MADE_BY)
    assert headers == before


def test_tracking_is_per_patient_and_stays_over_runs(write):
    tracked = [segmented(write(small_volume(seed=seed)))[0].SegmentSequence[0].TrackingUID for seed in (0, 0, 1)]
    assert tracked[0] == tracked[1] != tracked[2]


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        (np.zeros((15, 12, 10), np.uint8), (TUMOUR,)),
        (np.zeros((16, 12, 10), np.int64), (TUMOUR,)),
        (np.zeros((16, 12), np.uint8), (TUMOUR,)),
        (np.full((16, 12, 10), 2, np.uint8), (TUMOUR,)),
        (np.zeros((16, 12, 10), np.uint8), (LUNGS,)),
        (np.zeros((16, 12, 10), np.uint8), ()),
    ],
)
def test_labels_that_do_not_suit_are_a_programming_mistake(write, labels, segments):
    with pytest.raises(ValueError, match="labels"):
        segmented(write(), labels, spec_of(segments))


def test_a_file_that_cannot_be_written_is_named(write, tmp_path):
    with raises_reason(NotWritten, "unwritable", names="segmentation.dcm"):
        write_dataset(segmented(write())[0], tmp_path / "absent" / "segmentation.dcm")


def test_real_headers_give_a_conforming_object(data, written):
    (candidate,) = selection_of(data / "lidc-idri-0314", force=True).selected
    assert candidate.series.instances
    loaded = assembled(data / "lidc-idri-0314")
    shape = loaded.volume.array.shape
    steps = [np.arange(n) - n // 2 for n in shape]
    mm = np.meshgrid(
        *(s * step for s, step in zip(steps, loaded.volume.geometry.spacing_mm, strict=True)),
        sparse=True,
        indexing="ij",
    )
    labels = (sum(x**2 for x in mm) < 12**2).astype(np.uint8)
    path = written(
        segmentation_from_labels(
            labels, [instance.header for instance in loaded.instances], spec_of((TUMOUR,)), MADE_BY
        )
    )
    assert dciodvfy_errors(path) == []
    expected = world_points(labels, loaded.volume.geometry)
    assert np.allclose(ordered(segment_points_by_dcmqi(path)), expected, atol=2e-3)
