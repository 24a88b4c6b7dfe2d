"""Enhanced CT (multi-frame) as scanners write it, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, ExplicitVRLittleEndian

from ctflow.core.volume import Volume
from ctflow.dicom.write.ct_series import write_ct_series

ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
Frame = tuple[Volume, int, dict[str, object]]  # a volume, a slice of it, and what tells it apart


def frames_of(volume: Volume, **attributes: object) -> list[Frame]:
    """Every slice of a volume as a frame with these attributes of its frame content."""
    return [(volume, d, attributes) for d in range(len(volume.array))]


def write_enhanced(
    path: Path,
    frames: Sequence[Frame],
    *,
    rescale_of: Callable[[int], tuple[float, float]] = lambda _: (1.0, -1024.0),
    shared: bool = True,
    change: Callable[[Dataset], object] = lambda _: None,
    uid: str = "1.2.4.1",
) -> Path:
    """Write frames, in their order, as one Enhanced CT.

    Args:
        path: The file.
        frames: Its frames.
        rescale_of: Slope and intercept of the frame with this index.
        shared: Whether orientation and spacing (and the rescale of frame 0) are in the shared groups.
        change: Changes the dataset before it is written.
        uid: Its SOPInstanceUID.
    """
    dataset = _common(path, frames[0][0])
    dataset.SOPClassUID, dataset.SOPInstanceUID = UID(ENHANCED), UID(uid)
    pixels, groups = [], []
    for index, (volume, d, attributes) in enumerate(frames):
        slope, intercept = rescale_of(index)
        pixels.append(np.rint((volume.array[d].astype(float) - intercept) / slope).astype("<u2"))
        groups.append(_groups(volume, d, attributes, slope, intercept))
    common = Dataset()
    if shared:
        kept = ["PlaneOrientationSequence", "PixelMeasuresSequence"]
        if len({rescale_of(index) for index in range(len(frames))}) == 1:
            kept.append("PixelValueTransformationSequence")
        for keyword in kept:
            setattr(common, keyword, getattr(groups[0], keyword))
            for group in groups:
                delattr(group, keyword)
    dataset.SharedFunctionalGroupsSequence = [common]
    dataset.PerFrameFunctionalGroupsSequence = groups
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = b"".join(each.tobytes() for each in pixels)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    change(dataset)
    dataset.save_as(path, enforce_file_format=True)
    return path


def compressed(syntax: str) -> Callable[[Dataset], object]:
    """Compress the frames of a dataset, each on its own."""

    def change(dataset: Dataset) -> None:
        count, rows, columns = int(dataset.NumberOfFrames), dataset.Rows, dataset.Columns
        values = np.frombuffer(dataset.PixelData, "<u2").reshape(count, rows, columns)
        encoded = []
        for frame in values:
            one = Dataset()
            one.update({key: dataset[key] for key, _ in dataset.group_dataset(0x28).items() if key.element != 0x0008})
            one.file_meta = FileMetaDataset()
            one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            one.SOPClassUID, one.SOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
            one.PixelData = frame.tobytes()
            one.compress(UID(syntax), generate_instance_uid=False)
            encoded.append(next(pydicom.encaps.generate_frames(one.PixelData, number_of_frames=1)))
        dataset.PixelData = encapsulate(encoded)
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID(syntax)

    return change


def _common(path: Path, volume: Volume) -> Dataset:
    """A slice's patient, study and equipment, without what frames say for themselves."""
    folder = path.parent / f"{path.stem}-slices"
    first = write_ct_series(volume, folder)[0]
    dataset = pydicom.dcmread(first)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    for keyword in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices",
        "RescaleSlope", "RescaleIntercept", "RescaleType", "AcquisitionNumber", "KVP", "ConvolutionKernel",
        "WindowCenter", "WindowWidth",
    ):  # fmt: skip
        delattr(dataset, keyword)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = "1.2.3", "1.2.4", "1.2.5"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    dataset.AcquisitionDateTime, dataset.PresentationLUTShape = "20260101120000", "IDENTITY"
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    return dataset


def _groups(volume: Volume, d: int, attributes: dict[str, object], slope: float, intercept: float) -> Dataset:
    geometry, group = volume.geometry, Dataset()

    def item(**values: object) -> list[Dataset]:
        made = Dataset()
        for keyword, value in values.items():
            setattr(made, keyword, value)
        return [made]

    content = {name: value for name, value in attributes.items() if name not in ("phase", "FrameType", "KVP")}
    group.FrameContentSequence = item(**{"FrameAcquisitionNumber": 1, **content})
    position = [f"{mm:.6g}" for mm in geometry.world_from_index([d, 0, 0])]
    group.PlanePositionSequence = item(ImagePositionPatient=position)
    orientation = [f"{part:.6g}" for part in geometry.directions[:, [2, 1]].T.reshape(-1)]
    group.PlaneOrientationSequence = item(ImageOrientationPatient=orientation)
    between, rows, columns = geometry.spacing_mm
    group.PixelMeasuresSequence = item(PixelSpacing=[f"{rows:.6g}", f"{columns:.6g}"], SliceThickness=f"{between:.6g}")
    group.PixelValueTransformationSequence = item(
        RescaleSlope=f"{slope:.6g}", RescaleIntercept=f"{intercept:.6g}", RescaleType="HU"
    )
    frame_type = attributes.get("FrameType", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
    group.CTImageFrameTypeSequence = item(FrameType=frame_type)
    if "phase" in attributes:
        group.CardiacSynchronizationSequence = item(NominalPercentageOfCardiacPhase=float(attributes["phase"]))
    if "KVP" in attributes:
        group.CTXRayDetailsSequence = item(KVP=attributes["KVP"])
    return group
