"""A Volume to a synthetic, standard-conforming CT series on disk."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ctflow import __version__
from ctflow.compat.pydicom import lenient
from ctflow.core.atomic import publish_folder, temporary_folder
from ctflow.core.volume import FloatArray, Volume
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.dicom.write.identity import uid_from_parts

IMPLEMENTATION_UID = uid_from_parts("ctflow", "implementation")
Adjust = Callable[[Dataset, int], None]


@lenient()
def write_ct_series(
    volume: Volume,
    folder: Path,
    *,
    seed: int = 0,
    slope: float = 1.0,
    intercept: float = -1024.0,
    signed: bool = False,
    adjust: Adjust | None = None,
) -> tuple[Path, ...]:
    """Write a volume as single-frame CT images of a made-up patient.

    Args:
        volume: HU on an orthogonal grid.
        folder: Gets one file per slice, atomically; an existing one is replaced.
        seed: Part of the UIDs: the same volume and seed give the same files.
        slope: RescaleSlope of the stored values.
        intercept: RescaleIntercept.
        signed: Whether stored values are signed.
        adjust: Called with each slice's dataset and index before writing, for unusual series.

    Returns:
        The files, slice d at index d.

    Raises:
        ValueError: The grid is not orthogonal, or a value does not fit 16 bits with this slope and intercept.
        OutputError: The folder cannot be written.

    Source: DICOM PS3.3 A.3 (CT Image IOD).
    """
    if not volume.geometry.is_orthogonal:
        raise ValueError("only an orthogonal grid can be written as a CT series")
    stored = np.rint((volume.array.astype(np.float64) - intercept) / slope)
    limits = np.iinfo(np.int16 if signed else np.uint16)
    if stored.min() < limits.min or stored.max() > limits.max:
        raise ValueError("a value does not fit 16 bits with this slope and intercept")
    pixels = stored.astype(limits.dtype)
    digest = hashlib.sha256(volume.geometry.affine_mm.tobytes() + pixels.tobytes()).hexdigest()
    series = _series_dataset(volume, str(seed), digest)
    names = [f"{d:05d}.dcm" for d in range(len(pixels))]
    with temporary_folder(folder.parent, folder.name) as temporary:
        for d, name in enumerate(names):
            dataset = _slice_dataset(series, volume, d, digest)
            dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"
            dataset.PixelRepresentation = int(signed)
            dataset.PixelData = pixels[d].astype(pixels.dtype.newbyteorder("<")).tobytes()
            if adjust is not None:
                adjust(dataset, d)
            dataset.save_as(temporary / name, enforce_file_format=True)
        publish_folder(temporary, folder)
    return tuple(folder / name for name in names)


def _series_dataset(volume: Volume, seed: str, digest: str) -> Dataset:
    """The attributes that all slices share."""
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = CT_IMAGE_STORAGE
    dataset.StudyInstanceUID = uid_from_parts("phantom study", seed, digest)
    dataset.SeriesInstanceUID = uid_from_parts("phantom series", seed, digest)
    dataset.FrameOfReferenceUID = uid_from_parts("phantom frame", seed, digest)
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = "20260101"
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = "120000"
    dataset.PatientName, dataset.PatientID = "CTFLOW^PHANTOM", f"PHANTOM-{seed}"[:64]
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientIdentityRemoved = "", "O", "YES"
    dataset.DeidentificationMethod = "Synthetic: no patient"
    dataset.AccessionNumber = dataset.ReferringPhysicianName = dataset.StudyID = ""
    dataset.Modality, dataset.BodyPartExamined, dataset.PatientPosition = "CT", "CHEST", _patient_position(volume)
    dataset.Manufacturer, dataset.ManufacturerModelName = "ctflow", "phantom"
    dataset.SoftwareVersions = __version__
    dataset.SeriesNumber, dataset.AcquisitionNumber = "1", "1"
    dataset.StudyDescription = dataset.SeriesDescription = "Synthetic chest CT"
    dataset.PositionReferenceIndicator = ""
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.KVP, dataset.ConvolutionKernel, dataset.RescaleType = "120", "SYNTHETIC", "HU"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.WindowCenter, dataset.WindowWidth = "-600", "1500"
    return dataset


def _patient_position(volume: Volume) -> str:
    """Head or feet first; the phantom is always supine."""
    return "HFS" if volume.geometry.directions[2, 0] >= 0 else "FFS"


def _slice_dataset(series: Dataset, volume: Volume, d: int, digest: str) -> Dataset:
    geometry = volume.geometry
    dataset = copy.deepcopy(series)  # elements are mutable, and `adjust` may change only one slice's
    dataset.SOPInstanceUID = uid_from_parts("phantom slice", series.SeriesInstanceUID, digest, str(d))
    dataset.InstanceNumber = str(d + 1)
    dataset.ImagePositionPatient = _decimals(geometry.world_from_index([d, 0, 0]))
    dataset.ImageOrientationPatient = _decimals(geometry.directions[:, [2, 1]].T.reshape(-1))
    between_slices, between_rows, between_columns = geometry.spacing_mm
    dataset.PixelSpacing = _decimals(np.array([between_rows, between_columns]))
    dataset.SliceThickness = dataset.SpacingBetweenSlices = _decimals(np.array([between_slices]))[0]
    dataset.Rows, dataset.Columns = geometry.shape[1:]
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    return dataset


def _decimals(values: FloatArray) -> list[str]:
    """Numbers as decimal strings of at most 16 characters (DICOM VR DS)."""
    return [f"{value:.9g}" if abs(value) >= 1e-4 else f"{value:.8f}" for value in (values + 0.0).tolist()]
