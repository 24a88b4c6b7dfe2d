"""Odd and hostile CT: every case that the reader must get right, or refuse by name.

`ODD` is the table. `outcome_of` says what the code really makes of a folder, in the words of docs/dicom.md.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gdcm
import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from ctflow.core.errors import BrokenSeries, CtflowError
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.source import sources_from_headers
from dicom_support import LinearField, axes, indices_of, moved, rotation, setter, small_volume
from enhanced_support import compressed, frames_of, write_enhanced
from odd_headers import FORMS, Form, before_pixels, element, padded

SHAPE = (16, 32, 40)  # JPEG 2000 asks for 32 x 32
RIGHT, WARNED = "correct volume", "correct volume, warned"

Truth = Volume | LinearField | None
Adjust = Callable[[Dataset, int], None]


@dataclass(frozen=True)
class Odd:
    """One odd folder.

    Attributes:
        name: As the table of docs/dicom.md has it.
        outcome: What must become of it, in `outcome_of`'s words.
        write: Fills an empty folder; returns the true volume, or the field of which the slices are samples, or None
            where nothing may come out.
        says: Words that a warning or refusal must hold.
    """

    name: str
    outcome: str
    write: Callable[[Path], Truth]
    says: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the code made of a folder: in words, what it said, and the volumes."""

    text: str
    said: str
    volumes: tuple[Volume, ...]


def outcome_of(folder: Path) -> Outcome:
    """Scan, select and assemble a folder as a run does, and take over what a result needs of its headers."""
    scan = scan_folder(folder)
    texts, said, volumes = [], [], []
    for candidate in select_series(scan, body_parts=("CHEST",)).candidates:
        said += [candidate.message, *candidate.series.dropped]
        if not candidate.selected:
            texts.append(f"set aside: `{candidate.reason}`")
            continue
        try:
            assembled = assemble_series(candidate.series)
        except CtflowError as error:
            reason = f": `{error.reason}`" if isinstance(error, BrokenSeries) else ""
            texts.append(f"`{type(error).__name__}`{reason}")
            said.append(str(error))
            continue
        prepared = sources_from_headers([instance.header for instance in assembled.instances])
        warned = (*candidate.series.dropped, *assembled.warnings, *prepared.warnings)
        texts.append(WARNED if warned else RIGHT)
        said += warned
        volumes.append(assembled.volume)
    if scan.unreadable:
        texts.append("file named")
        said += [f"{file.name}: {file.message}" for file in scan.unreadable]
    counted = [f"{texts.count(text)} x {text}" if texts.count(text) > 1 else text for text in dict.fromkeys(texts)]
    return Outcome(" + ".join(sorted(counted)) or "`NoUsableSeries`", "; ".join(said), tuple(volumes))


# -------------------------------------------------------------------------------------------------- how to write them


def odd_volume(affine=None, seed: int = 0, shape=SHAPE) -> Volume:
    return small_volume(affine, shape, seed)


def written(folder: Path, volume: Volume | None = None, adjust: Adjust | None = None, **options) -> Volume:
    """Write a series into a new subfolder; its name means nothing."""
    volume = volume if volume is not None else odd_volume()
    write_ct_series(volume, folder / f"s{len(list(folder.iterdir()))}", adjust=adjust, **options)
    return volume


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def every(**attributes) -> Callable[[Path], Volume]:
    """A series whose slices all have these attributes (None: absent)."""
    return lambda folder: written(folder, adjust=setter(**attributes))


def nothing(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same, for a series of which no volume may come out."""

    def run(folder: Path) -> None:
        write(folder)

    return run


def one(index: int = 5, **attributes) -> Callable[[Path], Volume]:
    """A series of which one slice has these attributes."""
    change = setter(**attributes)
    return lambda folder: written(folder, adjust=lambda dataset, d: change(dataset, d) if d == index else None)


def placed(affine) -> Callable[[Path], Volume]:
    return lambda folder: written(folder, odd_volume(affine))


def shifted(affine, moved_to: Callable[[int, np.ndarray], np.ndarray]) -> Callable[[Path], Volume]:
    """A series whose positions a scanner wrote a little beside where they are."""

    def adjust(dataset: Dataset, d: int) -> None:
        at = moved_to(d, np.array(dataset.ImagePositionPatient, dtype=np.float64))
        dataset.ImagePositionPatient = [f"{mm:.4f}" for mm in at]

    return lambda folder: written(folder, odd_volume(affine), adjust)


def sampled(z_mm: list[float], tilt: float = 0.0, adjust: Adjust | None = None) -> Callable[[Path], LinearField]:
    """Slices of a linear field at any places: its values are also known between them."""

    def write(folder: Path) -> LinearField:
        field, depth = LinearField(), len(z_mm)
        base = odd_volume(shape=(depth, *SHAPE[1:]))

        def place(dataset: Dataset, d: int) -> None:
            x, y, z = base.geometry.affine_mm[:3, 3] + [0, tilt * z_mm[d], z_mm[d]]
            dataset.ImagePositionPatient = [f"{value:.6f}" for value in (x, y, z)]
            points = indices_of(SHAPE[1:]) @ base.geometry.affine_mm[:3, 1:3].T + [x, y, z]
            stored = np.rint((field.at(points) + 1024) * 20)
            dataset.PixelData = stored.astype("<u2").tobytes()
            dataset.RescaleSlope = "0.05"
            if adjust is not None:
                adjust(dataset, d)

        written(folder, base, place)
        return field

    return write


def without(*indices: int, **attributes) -> Callable[[Path], Volume]:
    """A series that lacks some slices."""

    def write(folder: Path) -> Volume:
        volume = written(folder, odd_volume(shape=(SHAPE[0] + 4, *SHAPE[1:])), setter(**attributes))
        for index in indices:
            files_of(folder)[0].with_name(f"{index:05d}.dcm").unlink()
        kept = [d for d in range(len(volume.array)) if d not in indices]
        array = volume.array[kept]
        return Volume(array, Geometry(array.shape, volume.geometry.affine_mm))

    return write


def resaved(change: Callable[[Dataset], object], *, first: int = 1000) -> Callable[[Path], Volume]:
    """A series whose files are read, changed and saved again (the first ones only, if asked)."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        for path in files_of(folder)[:first]:
            dataset = pydicom.dcmread(path)
            if change(dataset) is None:
                dataset.save_as(path)
        return volume

    return write


def rewritten(change: Callable[[bytes], bytes], *, index: int = 5) -> Callable[[Path], Volume]:
    """A series of which one file's bytes are changed."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        path = files_of(folder)[index]
        path.write_bytes(change(path.read_bytes()))
        return volume

    return write


def in_form(form: Form) -> Callable[[Path], Volume]:
    """A series whose files are all encoded in a way that the standard does not allow."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        for path in files_of(folder):
            path.write_bytes(form.write(path.read_bytes()))
        return volume

    return write


def joined(*writers: Callable[[Path], Truth]) -> Callable[[Path], Truth]:
    """Several in one folder; the truth is the first one's."""

    def write(folder: Path) -> Truth:
        truths = [make(folder) for make in writers]
        return truths[0]

    return write


# ---------------------------------------------------------------------------------------------------- single writers


def signedness(folder: Path) -> Volume:
    """The first slice is unsigned, the others signed; a dtype of the first would turn -1000 HU into 64536."""
    volume = odd_volume()

    def adjust(dataset: Dataset, d: int) -> None:
        if d:
            dataset.PixelRepresentation, dataset.RescaleIntercept = 1, "0"
            dataset.PixelData = volume.array[d].astype("<i2").tobytes()

    return written(folder, volume, adjust)


def rescaled_by_slice(folder: Path) -> Volume:
    volume = odd_volume()
    even = Volume(volume.array // 2 * 2, volume.geometry)

    def adjust(dataset: Dataset, d: int) -> None:
        slope, intercept = 1 + d % 2, -1024 - 2 * d
        dataset.RescaleSlope, dataset.RescaleIntercept = str(slope), str(intercept)
        dataset.PixelData = ((even.array[d].astype(int) - intercept) // slope).astype("<u2").tobytes()

    return written(folder, even, adjust)


def rescaled(slope: str, intercept: str) -> Callable[[Path], Volume]:
    def write(folder: Path) -> Volume:
        volume = written(folder, adjust=setter(RescaleSlope=slope, RescaleIntercept=intercept))
        values = (volume.array.astype(np.float64) + 1024) * float(slope) + float(intercept)
        return Volume(values.astype(np.float32), volume.geometry)

    return write


def outside_circle(padding: int | None, marked: int, vr: str = "SS") -> Callable[[Path], Volume]:
    """A corner of each slice holds a value that no tissue has; as PixelPaddingValue says, or unsaid."""

    def write(folder: Path) -> Volume:
        volume = odd_volume()
        truth = volume.array.copy()
        truth[:, :4, :4] = -1024 if padding is not None else marked - 1024

        def adjust(dataset: Dataset, d: int) -> None:
            stored = volume.array[d].astype(int) + 1024
            stored[:4, :4] = marked
            dataset.PixelRepresentation = 1
            dataset.PixelData = stored.astype("<i2").tobytes()
            if padding is not None:
                dataset.add_new("PixelPaddingValue", vr, padding)

        written(folder, volume, adjust)
        return Volume(truth, volume.geometry)

    return write


def overlay_bits(dataset: Dataset, d: int) -> None:
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") | 0xF000).tobytes()


def doubled(offset_mm: float, count: int = SHAPE[0], **attributes) -> Callable[[Path], None]:
    """A second run of slices (another phase or acquisition) under the same SeriesInstanceUID."""

    def write(folder: Path) -> None:
        written(folder)
        uid = pydicom.dcmread(files_of(folder)[0]).SeriesInstanceUID
        study, frame = (
            str(pydicom.dcmread(files_of(folder)[0])[key].value) for key in ("StudyInstanceUID", "FrameOfReferenceUID")
        )
        shared = {
            "SeriesInstanceUID": uid,
            "StudyInstanceUID": study,
            "FrameOfReferenceUID": frame,
            "PatientID": "PHANTOM-0",
        }
        change, shift = setter(**shared, **attributes), moved(lambda _: 1, offset_mm)

        def adjust(dataset: Dataset, d: int) -> None:
            change(dataset, d)
            shift(dataset, d)

        written(folder, odd_volume(seed=1), adjust, seed=1)
        for path in files_of(folder)[SHAPE[0] + count :]:
            path.unlink()

    return write


def copied_file(folder: Path) -> Volume:
    volume = written(folder)
    shutil.copy(files_of(folder)[3], folder / "again.dcm")
    return volume


def copied_slices(count: int, **attributes) -> Callable[[Path], Volume]:
    """The first slices again, under SOPInstanceUIDs (and whatever else) of their own."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        (folder / "again").mkdir()
        for path in files_of(folder)[:count]:
            dataset = pydicom.dcmread(path)
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID + ".7"
            dataset.InstanceNumber = int(dataset.InstanceNumber) + 100
            setter(**attributes)(dataset, 0)
            dataset.save_as(folder / "again" / path.name)
        return volume

    return write


def with_object(sop_class: str, **attributes) -> Callable[[Path], Volume]:
    """An object in the series that is no slice: a picture of the screen, a dose report, a plan."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        dataset = pydicom.dcmread(files_of(folder)[0])
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(sop_class)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID + ".1"
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
        setter(**attributes)(dataset, 0)
        dataset.save_as(folder / "object.dcm")
        return volume

    return write


PLACE = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient"))
COLOUR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0, "BitsAllocated": 8}
EXTRAS = (  # what scanners and archives put into a series, or beside it: class and attributes
    ("1.2.840.10008.5.1.4.1.1.88.67", {"Modality": "SR", "PixelData": None, **PLACE}),  # radiation dose report
    ("1.2.840.10008.5.1.4.1.1.7", {"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"], **PLACE, **COLOUR}),
    ("1.2.840.10008.5.1.4.1.1.11.1", {"Modality": "PR", "PixelData": None, **PLACE}),  # presentation state
    ("1.2.840.10008.5.1.4.1.1.104.1", {"Modality": "DOC", "PixelData": None, **PLACE}),  # PDF
    ("1.2.840.10008.5.1.4.1.1.88.59", {"Modality": "KO", "PixelData": None, **PLACE}),  # key images
    ("1.2.840.10008.5.1.4.1.1.2", {"FrameOfReferenceUID": None, "PixelSpacing": None, **PLACE}),
    ("1.2.840.10008.5.1.4.1.1.2", {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "Rows": 16, "Columns": 80}),
)


def with_extras(folder: Path, **attributes) -> Volume:
    """One of each kind of `EXTRAS`, in the series unless attributes name another."""
    volume = written(folder)
    (folder / "more").mkdir()
    for number, (sop_class, changes) in enumerate(EXTRAS):
        dataset = pydicom.dcmread(files_of(folder / "s0")[0])
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID(sop_class)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{dataset.SOPInstanceUID}.{number}"
        own = {keyword: f"{value}.{number}" for keyword, value in attributes.items()}
        setter(**{keyword: value for keyword, value in changes.items() if value or keyword in dataset}, **own)(
            dataset, 0
        )
        dataset.save_as(folder / "more" / f"{number}.dcm")
    return volume


def empty_pixels(folder: Path) -> Volume:
    """Beside the series an intact file that ends in a PixelData of no length, which is 8 bytes in Implicit VR."""
    volume = written(folder)
    dataset = pydicom.dcmread(files_of(folder)[0], stop_before_pixels=True)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.481.3")
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID, dataset.Modality = "1.2.3.1", "1.2.3", "RTSTRUCT"
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.PixelData = b""
    pydicom.dcmwrite(folder / "structures.dcm", dataset, implicit_vr=True, little_endian=True, force_encoding=True)
    assert (folder / "structures.dcm").read_bytes()[-8:] == struct.pack("<HHL", 0x7FE0, 0x0010, 0)
    return volume


def renamed(syntax: str, source: str = ExplicitVRLittleEndian) -> Callable[[Path], None]:
    """A series in one transfer syntax whose meta information names another."""

    def write(folder: Path) -> None:
        in_syntax(source)(folder)
        for path in files_of(folder):
            content = path.read_bytes()
            end = 144 + struct.unpack("<L", content[140:144])[0]
            meta = pydicom.filereader.read_file_meta_info(path)
            meta.TransferSyntaxUID = UID(syntax)
            stream = pydicom.filebase.DicomBytesIO(content[:132])
            stream.seek(132)
            pydicom.filewriter.write_file_meta_info(stream, meta)
            path.write_bytes(stream.getvalue() + content[end:])

    return write


def with_object_again(number: int) -> Callable[[Path], None]:
    """A CT image without a place, in the series that is there."""

    def write(folder: Path) -> None:
        dataset = pydicom.dcmread(files_of(folder)[0])
        del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{dataset.SOPInstanceUID}.{number}"
        dataset.save_as(folder / f"s0/z{number}.dcm")

    return write


def with_localizer(shape, **attributes) -> Callable[[Path], Volume]:
    """A scout in the series: a sagittal image, of the slices' size or another."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        dataset = pydicom.dcmread(files_of(folder)[0])
        dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
        dataset.Rows, dataset.Columns = shape
        dataset.PixelData = bytes(2 * shape[0] * shape[1])
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID + ".1"
        setter(**attributes)(dataset, 0)
        dataset.save_as(folder / "scout.dcm")
        return volume

    return write


def enhanced(order: int = 1, moments: int = 1, **options) -> Callable[[Path], Volume]:
    """An Enhanced CT; its frames run backwards, or the volume returns at other moments, if asked."""

    def write(folder: Path) -> Volume:
        volume = odd_volume()
        frames = [frame for n in range(moments) for frame in frames_of(volume, TemporalPositionIndex=n + 1)][::order]
        write_enhanced(folder / "enhanced.dcm", frames, **options)
        return volume

    return write


def in_parts(*numbers: int) -> Callable[[Path], Volume]:
    """An Enhanced CT in two objects, of which these are there."""

    def write(folder: Path) -> Volume:
        volume = odd_volume()
        for n in numbers:
            whole = {"ConcatenationUID": "1.2.9", "InConcatenationTotalNumber": 2, "InConcatenationNumber": n}
            change = partial(setter(**whole, ConcatenationFrameOffsetNumber=9 * (n - 1)), _index=0)
            part = frames_of(volume)[9 * (n - 1) : 9 * n]
            write_enhanced(folder / f"{n}.dcm", part, uid=f"1.2.4.{n}", change=change)
        return volume

    return write


def _enhanced() -> Iterator[Odd]:
    aside = "set aside: `enhanced`"
    lossless = compressed(JPEG2000Lossless)
    yield Odd("Enhanced CT, orientation, spacing and rescale in the shared group", RIGHT, enhanced())
    yield Odd("Enhanced CT, orientation, spacing and rescale per frame", RIGHT, enhanced(shared=False))
    yield Odd(
        "Enhanced CT, another rescale in each frame",
        WARNED,
        enhanced(rescale_of=lambda index: (1, -1024 - index)),
        "RescaleIntercept differs",
    )
    yield Odd("Enhanced CT, frames in another order", RIGHT, enhanced(order=-1))
    yield Odd("Enhanced CT, frames compressed with JPEG 2000", RIGHT, enhanced(change=lossless))
    yield Odd(
        "Enhanced CT, two temporal positions",
        f"2 x {WARNED}",
        enhanced(moments=2, rescale_of=lambda index: (1, -1024 - index // SHAPE[0])),
        "temporal 2 (TemporalPositionIndex tells them apart)",
    )
    yield Odd("Enhanced CT, a concatenation of two objects", RIGHT, in_parts(1, 2))
    yield Odd("Enhanced CT, the second object of a concatenation is missing", aside, nothing(in_parts(1)), "2 parts")
    repaired = "have the sender repair it"
    fewer = enhanced(change=lambda dataset: setattr(dataset, "NumberOfFrames", 15))
    yield Odd("Enhanced CT, NumberOfFrames contradicts the frames", aside, nothing(fewer), repaired)
    groups = enhanced(change=lambda dataset: delattr(dataset, "PerFrameFunctionalGroupsSequence"))
    yield Odd("Enhanced CT, no functional groups", aside, nothing(groups), repaired)
    yield Odd(
        "Enhanced CT, a frame without a position",
        "`BrokenSeries`: `no-geometry`",
        nothing(
            enhanced(
                change=lambda dataset: delattr(dataset.PerFrameFunctionalGroupsSequence[4], "PlanePositionSequence")
            )
        ),
        "frame 5",
    )
    both = joined(enhanced(), every(StudyInstanceUID="1.2.3", SeriesInstanceUID="1.2.4"))
    yield Odd("Enhanced CT and CT images in one series", aside, nothing(both), "separate them")


def cut_to(count: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        written(folder)
        for path in files_of(folder)[count:]:
            path.unlink()

    return write


def with_a_copy(write: Callable[[Path], Volume]) -> Callable[[Path], Volume]:
    """The first file is there twice."""

    def copied(folder: Path) -> Volume:
        volume = write(folder)
        shutil.copy(files_of(folder)[0], folder / "copy")
        return volume

    return copied


def ending_elsewhere(count: int, **attributes) -> Callable[[Path], Volume]:
    """18 slices, of which the last ones have these attributes; the others are the truth."""
    change = setter(**attributes)

    def write(folder: Path) -> Volume:
        depth = 18
        whole = odd_volume(shape=(depth, *SHAPE[1:]))
        written(folder, whole, lambda dataset, d: change(dataset, d) if d >= depth - count else None)
        array = whole.array[: depth - count]
        return Volume(array, Geometry(array.shape, whole.geometry.affine_mm))

    return write


def wrong_vrs(dataset: Dataset, _d: int) -> None:
    """Numbers as text and text as other text: what some gateways make of a file."""
    for keyword, vr in (
        ("RescaleSlope", "LO"),
        ("RescaleIntercept", "LO"),
        ("PixelSpacing", "LO"),
        ("Rows", "UL"),
        ("Modality", "LO"),
    ):
        value = dataset[keyword].value
        del dataset[keyword]
        dataset.add_new(
            keyword, vr, list(map(str, value)) if keyword == "PixelSpacing" else value if vr == "UL" else str(value)
        )


def private_junk(dataset: Dataset, _d: int) -> None:
    block = dataset.private_block(0x0029, "JUNK", create=True)
    block.add_new(1, "OB", bytes(range(256)))
    block.add_new(2, "UN", b"\xfe\xff\x00\xe0\xff\xff\xff\xff")
    dataset.add_new(0x00091001, "LO", "no creator for this block")
    dataset.add_new(0x00280107, "SS", -5)


def dicomdir(folder: Path) -> Volume:
    volume = written(folder)
    dataset = pydicom.dcmread(files_of(folder)[0], stop_before_pixels=True)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    dataset.save_as(folder / "DICOMDIR")
    return volume


def zipped(folder: Path) -> None:
    written(folder)
    with zipfile.ZipFile(folder / "study.zip", "w") as archive:
        for path in files_of(folder):
            if path.suffix == ".dcm":
                archive.write(path, path.name)
    shutil.rmtree(folder / "s0")


def linked(folder: Path) -> Volume:
    volume = written(folder)
    (folder / "s0" / "loop").symlink_to(folder)
    (folder / "other").symlink_to(folder / "s0")
    return volume


def among_others(folder: Path) -> Volume:
    volume = written(folder)
    (folder / "rest").mkdir()
    for number in range(20_000):
        os.close(os.open(folder / "rest" / f"{number}.txt", os.O_CREAT | os.O_WRONLY))
    return volume


def without_preamble(folder: Path) -> Volume:
    volume = written(folder)
    for number, path in enumerate(files_of(folder)):
        dataset = pydicom.dcmread(path)
        del dataset.file_meta
        dataset.preamble = None
        dataset.save_as(folder / f"{number * 7 % 16}", implicit_vr=True, little_endian=True, enforce_file_format=False)
        path.unlink()
    return volume


def in_syntax(syntax: str) -> Callable[[Path], Volume]:
    """A series in another transfer syntax; GDCM writes JPEG Lossless, which pydicom cannot."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        for path in files_of(folder):
            transcode(path, syntax)
        return volume

    return write


def in_high_throughput(syntax: str) -> Callable[[Path], Volume]:
    """In HTJ2K, which no library of the tests writes: frames of the very same pixels, by OpenJPH 0.26.3 (RPCL)."""

    def write(folder: Path) -> Volume:
        volume = written(folder)
        with zipfile.ZipFile(Path(__file__).parent / "data" / "htj2k.zip") as frames:
            for path, name in zip(files_of(folder), sorted(frames.namelist()), strict=True):
                dataset = pydicom.dcmread(path)
                dataset.PixelData = encapsulate([frames.read(name)])
                dataset["PixelData"].is_undefined_length = True
                dataset.file_meta.TransferSyntaxUID = UID(syntax)
                dataset.save_as(path)
        return volume

    return write


def transcode(path: Path, syntax: str) -> None:
    """Rewrite a native little-endian file without loss in another transfer syntax."""
    dataset = pydicom.dcmread(path)
    if syntax in (JPEG2000Lossless, JPEGLSLossless, RLELossless):
        dataset.compress(syntax, generate_instance_uid=False)
        dataset.save_as(path)
    elif syntax.startswith("1.2.840.10008.1.2.4."):
        reader = gdcm.ImageReader()
        reader.SetFileName(str(path))
        change = gdcm.ImageChangeTransferSyntax()
        code = (
            gdcm.TransferSyntax.JPEGLosslessProcess14
            if syntax.endswith("57")
            else gdcm.TransferSyntax.JPEGLosslessProcess14_1
        )
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(code))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    else:
        if syntax == ExplicitVRBigEndian:
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = UID(syntax)
        encoding = {"implicit_vr": UID(syntax).is_implicit_VR, "little_endian": UID(syntax).is_little_endian}
        pydicom.dcmwrite(path, dataset, **encoding, force_encoding=True)


def lossy(syntax: str) -> Callable[[Path], Volume]:
    """Only named so: the frame is a valid lossless one, which lies within every loss."""

    def change(dataset: Dataset) -> None:
        dataset.compress(JPEG2000Lossless if syntax.endswith("91") else JPEGLSLossless, generate_instance_uid=False)
        dataset.file_meta.TransferSyntaxUID = UID(syntax)

    return resaved(change)


def encapsulated(syntax: str, frame: bytes) -> Callable[[Path], None]:
    def change(dataset: Dataset) -> None:
        dataset.PixelData = encapsulate([frame])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = UID(syntax)

    return nothing(resaved(change))


def zero_frames(folder: Path) -> None:
    written(folder, Volume(np.full(SHAPE, -1024, np.int16), odd_volume().geometry))
    for path in files_of(folder):
        transcode(path, RLELossless)


def damaged_frame(folder: Path) -> None:
    in_syntax(JPEG2000Lossless)(folder)
    path = files_of(folder)[5]
    content = path.read_bytes()
    at = content.index(b"\xff\x4f\xff\x51")
    path.write_bytes(content[: at + 40] + bytes(60) + content[at + 100 :])


def huge_frame(folder: Path) -> None:
    """One JPEG 2000 frame claims 60000 x 60000: decoding it would take 7 GB."""
    in_syntax(JPEG2000Lossless)(folder)
    path = files_of(folder)[5]
    content = path.read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    path.write_bytes(content[:at] + struct.pack(">LL", 60000, 60000) + content[at + 8 :])


def nested(depth: int) -> bytes:
    """Sequences of undefined length within each other."""
    start = struct.pack("<HH2sHL", 0x0029, 0x1010, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    end = struct.pack("<HHL", 0xFFFE, 0xE00D, 0) + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
    return start * depth + end * depth


def bomb(content: bytes) -> bytes:
    """A deflated file that inflates to 400 MB; its meta information stays as it is but for the transfer syntax."""
    dataset = pydicom.dcmread(io.BytesIO(content), stop_before_pixels=True)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    stream = io.BytesIO()
    dataset.save_as(stream)
    start = stream.getvalue()
    at = 144 + struct.unpack("<L", start[140:144])[0]
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = zlib.decompress(start[at:], -zlib.MAX_WBITS)
    head = struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, 400 * 2**20)
    packed = [pack.compress(body + head), *(pack.compress(bytes(2**20)) for _ in range(400)), pack.flush()]
    return start[:at] + b"".join(packed)


def vr_length(keyword_tag: tuple[int, int], vr: bytes, length: int) -> Callable[[bytes], bytes]:
    """Change the 16 bit length of an element."""
    head = struct.pack("<HH2s", *keyword_tag, vr)

    def change(content: bytes) -> bytes:
        at = content.index(head) + 6
        return content[:at] + struct.pack("<H", length) + content[at + 2 :]

    return change


def patients(folder: Path) -> Volume:
    volume = written(folder, adjust=setter(PatientID="A"))
    written(folder, volume, setter(PatientID="B"), seed=1)
    return volume


def phases(folder: Path) -> Volume:
    """The same places twice, each phase a series of its own; the second is the first one's copy in other files."""
    volume = written(folder, adjust=setter(StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4"))
    written(folder, volume, setter(StudyInstanceUID="1.2.3", FrameOfReferenceUID="1.2.4"), seed=1)
    return volume


def padded_once(folder: Path) -> Volume:
    """One slice alone says which value is padding: there it becomes air."""
    volume = odd_volume()
    truth = volume.array.copy()
    value = int(truth[5, 0, 0]) + 1024
    truth[5][truth[5] == value - 1024] = -1024
    written(folder, volume, lambda dataset, d: dataset.add_new("PixelPaddingValue", "US", value) if d == 5 else None)
    return Volume(truth, volume.geometry)


# --------------------------------------------------------------------------------------------------------- the table

TILT = 0.3  # tangent: 16.7 degrees
FEET_FIRST = axes((2, 1, 0), (-1, 1, -1))
PRONE = axes((2, 1, 0), (1, -1, -1))
DECUBITUS = axes((2, 0, 1), (1, -1, 1))
CORONAL = axes((1, 2, 0), (1, -1, 1))


def oblique(angles) -> np.ndarray:
    affine = axes((2, 1, 0), (1, 1, 1))
    affine[:3, :3] = rotation(angles) @ affine[:3, :3]
    return affine


def runs(*pieces: tuple[int, float]) -> list[float]:
    """Places of slices with so many gaps of such a width, one after another."""
    return [0.0, *np.cumsum([width for count, width in pieces for _ in range(count)]).tolist()]


def several(*parts: tuple[float, Callable[[int], dict[str, object]]]) -> Callable[[Path], LinearField]:
    """Volumes of one field in one series: where each begins, in mm, and attributes of its slices."""

    def write(folder: Path) -> LinearField:
        field = LinearField()
        for number, (start, of_slice) in enumerate(parts):
            shared = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}

            def adjust(dataset: Dataset, d: int, number=number, of_slice=of_slice, shared=shared) -> None:
                uid = UID(f"1.2.6.{number}.{d}")
                dataset.file_meta.MediaStorageSOPInstanceUID = uid
                setter(**{"SOPInstanceUID": uid, **shared, **of_slice(d)})(dataset, d)
                # The same HU, but not the same pixels: those would be copies.
                dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") + number).astype("<u2").tobytes()
                dataset.RescaleIntercept = f"{float(dataset.RescaleIntercept) - 0.05 * number:.2f}"

            field = sampled([start + z for z in runs((SHAPE[0] - 1, 2.5))], adjust=adjust)(folder)
        return field

    return write


def alike(**attributes) -> Callable[[int], dict[str, object]]:
    """The same attributes in every slice."""
    return lambda _: attributes


def _volumes() -> Iterator[Odd]:
    two, three = f"2 x {WARNED}", f"3 x {WARNED}"
    yield Odd(
        "two acquisitions, one between the other's slices",
        two,
        several((0, alike(AcquisitionNumber="1")), (1.25, alike(AcquisitionNumber="2"))),
        "acquisition 2 (AcquisitionNumber tells them apart)",
    )
    yield Odd(
        "two acquisitions of tables that overlap",
        two,
        several((0, alike(AcquisitionNumber="1")), (21, alike(AcquisitionNumber="2"))),
        "acquisition 2",
    )
    yield Odd(
        "two acquisitions, 50 mm apart",
        two,
        several((0, alike(AcquisitionNumber="1")), (90, alike(AcquisitionNumber="2"))),
        "slices between them may be missing",
    )
    yield Odd(
        "a slice is missing between two acquisitions",
        "`BrokenSeries`: `gap`",
        nothing(several((0, alike(AcquisitionNumber="1")), (42.5, alike(AcquisitionNumber="2")))),
    )
    yield Odd(
        "three phases (4D), TemporalPositionIdentifier",
        three,
        several(*((0, alike(TemporalPositionIdentifier=str(n))) for n in (1, 2, 3))),
        "volume 3 of 3",
    )
    yield Odd(
        "two cardiac phases, acquisitions of four slices",
        two,
        several(
            *(
                (0, lambda d, phase=phase: {"NominalPercentageOfCardiacPhase": phase, "AcquisitionNumber": str(d // 4)})
                for phase in (40, 75)
            )
        ),
        "phase 75 %",
    )
    yield Odd("two energies, KVP", two, several(*((0, alike(KVP=kv)) for kv in ("80", "140"))), "energy 140 kV")
    yield Odd(
        "without and with contrast medium",
        two,
        several((0, alike()), (0, alike(ContrastBolusAgent="Iopamidol"))),
        "contrast yes",
    )
    yield Odd(
        "two acquisitions, one after the other by AcquisitionTime",
        two,
        several(*((0, lambda d, n=n: {"AcquisitionTime": f"120{n}{d:02d}"}) for n in (1, 2))),
        "time 2",
    )
    yield Odd(
        "two phases that take turns in AcquisitionTime",
        "`BrokenSeries`: `doubled`",
        nothing(several(*((0, lambda d, n=n: {"AcquisitionTime": f"12{d // 4:02d}{n}{d % 4}"}) for n in (1, 2)))),
    )
    yield Odd(
        "three contiguous acquisitions, one of them twice",
        "`BrokenSeries`: `doubled`",
        nothing(several(*((z, alike(AcquisitionNumber=str(n))) for n, z in enumerate((0, 40, 80, 40))))),
    )
    yield Odd(
        "two phases that share SOPInstanceUIDs",
        "`BrokenSeries`: `doubled`",
        nothing(
            several(
                *(
                    (0, lambda d, n=n: {"SOPInstanceUID": f"1.2.7.{d}", "TemporalPositionIdentifier": str(n)})
                    for n in (1, 2)
                )
            )
        ),
        "share a SOPInstanceUID",
    )


def _geometry() -> Iterator[Odd]:
    yield Odd("plain, anisotropic PixelSpacing", RIGHT, every())
    yield Odd(
        "anisotropic PixelSpacing, the other axis larger", RIGHT, placed(axes((2, 1, 0), (1, 1, 1), (2.5, 0.9, 0.6)))
    )
    yield Odd("feet first", RIGHT, placed(FEET_FIRST))
    yield Odd("prone", RIGHT, placed(PRONE))
    yield Odd("on the side", RIGHT, placed(DECUBITUS))
    yield Odd("coronal slices", RIGHT, placed(CORONAL))
    yield Odd("oblique", RIGHT, placed(oblique((0.2, -0.4, 0.7))))
    yield Odd(
        "a slice is missing in the middle",
        "`BrokenSeries`: `gap`",
        nothing(without(7)),
        "00006.dcm): send the whole series",
    )
    yield Odd("the last slice is missing and no attribute gives the number", RIGHT, without(19))
    yield Odd(
        "the last slice is missing, ImagesInAcquisition", WARNED, without(19, ImagesInAcquisition="20"), "holds 19"
    )
    yield Odd("a file twice", WARNED, copied_file, "duplicate file omitted")
    yield Odd(
        "a second slice at one position", "`BrokenSeries`: `doubled`", nothing(doubled(12.5, 1)), "one acquisition"
    )
    yield Odd("a near-double", "`BrokenSeries`: `irregular`", nothing(doubled(12.8, 1)))
    yield Odd(
        "every position twice, and nothing tells the volumes apart", "`BrokenSeries`: `doubled`", nothing(doubled(0.0))
    )
    yield Odd("two phases, each a series", f"2 x {RIGHT}", phases)
    yield Odd(
        "a localizer of the same size",
        WARNED,
        with_localizer(SHAPE[1:], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "1 localizer",
    )
    yield Odd(
        "a localizer of another size",
        WARNED,
        with_localizer((40, 8), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "1 localizer",
    )
    yield Odd(
        "a localizer that is not marked as one",
        "`BrokenSeries`: `mixed-orientation`",
        nothing(with_localizer(SHAPE[1:])),
    )
    yield Odd(
        "a localizer of another size that is not marked as one",
        WARNED,
        with_localizer((8, 64)),
        "another direction and size than all slices",
    )
    even = runs((17, 2.5))
    yield Odd("gantry tilt", WARNED, sampled(even, TILT), "tilt of 16.7 degrees")
    yield Odd("gantry tilt the other way", WARNED, sampled(even, -TILT), "tilt of 16.7 degrees")
    yield Odd(
        "slices displaced further than by any gantry tilt", "`BrokenSeries`: `tilted`", nothing(sampled(even, 1.2))
    )
    yield Odd("half 2 mm, half 3 mm apart", WARNED, sampled(runs((9, 2), (9, 3))), "9 of 2.000 mm, 9 of 3.000 mm")
    yield Odd("two sections that overlap", WARNED, sampled(runs((9, 2), (1, 0.7), (9, 3))), "1 of 0.700 mm")
    yield Odd(
        "tilted, in sections of different spacing, as tilted/ is",
        WARNED,
        sampled(runs((13, 4.002), (1, 1.081), (13, 6.999)), 0.335),
        "resampled by position",
    )
    yield Odd(
        "every second slice of one half is missing",
        "`BrokenSeries`: `gap`",
        nothing(without(13, 15, 17, 19)),
        "00012.dcm, ",
    )
    yield Odd(
        "equal sections, offset against each other",
        "`BrokenSeries`: `irregular`",
        nothing(sampled(runs((9, 2.5), (1, 1.2), (9, 2.5)))),
    )
    yield Odd(
        "irregular distances",
        "`BrokenSeries`: `irregular`",
        nothing(sampled(runs((4, 2.5), (1, 3.1), (6, 2.5), (1, 2.0), (5, 2.5)))),
    )
    yield Odd(
        "a slice is shifted sideways",
        "`BrokenSeries`: `irregular`",
        nothing(one(ImagePositionPatient=["-9", "20.25", "-287.5"])),
    )
    for spacing in (0.625, 1.25):
        affine = axes((2, 1, 0), (1, 1, 1), (spacing, 0.6, 0.9))
        name = f"positions rounded to 0.1 mm, slices {spacing} mm apart"
        yield Odd(name, WARNED, shifted(affine, lambda d, at: np.round(at, 1)), "ImagePositionPatient puts slices")
    yield Odd(
        "slices jitter by 0.03 mm around their line",
        WARNED,
        shifted(axes((2, 1, 0), (1, 1, 1)), lambda d, at: at + [0.03 * (-1) ** d, 0, 0]),
        "0.035 mm (4% of a voxel)",
    )
    yield Odd(
        "slices jitter by 0.3 mm around their line",
        "`BrokenSeries`: `irregular`",
        nothing(shifted(axes((2, 1, 0), (1, 1, 1)), lambda d, at: at + [0.3 * (-1) ** d, 0, 0])),
        "more than a tenth",
    )
    yield Odd(
        "cosines of a slice differ in the fourth decimal",
        WARNED,
        one(ImageOrientationPatient=["1", "0.0008", "0", "-0.0008", "1", "0"]),
        "ImageOrientationPatient puts slices",
    )
    yield Odd("PixelSpacing of a slice is rounded", WARNED, one(PixelSpacing=["0.6005", "0.9"]), "PixelSpacing puts")
    orphaned = f"{WARNED} + set aside: `orphaned`"
    for count, ends in ((1, "the last slice of 18 has"), (2, "the last two slices of 18 have")):
        write = ending_elsewhere(count, SeriesInstanceUID="1.2.3")
        yield Odd(f"{ends} another SeriesInstanceUID", orphaned, write, "its next slices would lie there")
    yield Odd(
        "the last slice of 18 has no SeriesInstanceUID",
        orphaned,
        ending_elsewhere(1, SeriesInstanceUID=""),
        "is empty or absent",
    )
    copied = with_a_copy(ending_elsewhere(1, SeriesInstanceUID="1.2.3"))
    yield Odd("the last slice of 18 has another SeriesInstanceUID, and a file is there twice", orphaned, copied)
    elsewhere = ending_elsewhere(1, SeriesInstanceUID="1.2.3", SeriesNumber="7")
    yield Odd("one more slice of another series", f"{RIGHT} + set aside: `too-few-slices`", elsewhere)
    yield Odd("one slice only", "set aside: `too-few-slices`", cut_to(1))
    yield Odd("two slices", "set aside: `too-few-slices`", cut_to(2))
    yield Odd("slices 6 mm apart", "set aside: `too-thick`", nothing(placed(axes((2, 1, 0), (1, 1, 1), (6, 0.6, 0.9)))))
    yield Odd(
        "SpacingBetweenSlices of 7 where slices lie 2.5 mm apart", WARNED, every(SpacingBetweenSlices="7"), "7 mm"
    )
    yield Odd("SpacingBetweenSlices is negative", WARNED, every(SpacingBetweenSlices="-2.5"), "says -2.5 mm")
    yield Odd("SpacingBetweenSlices is 0", WARNED, every(SpacingBetweenSlices="0"), "positions count")
    yield Odd("SliceThickness is 0", WARNED, every(SliceThickness="0"), "SliceThickness says 0 mm")
    yield Odd("SliceThickness is negative", WARNED, every(SliceThickness="-2.5"), "SliceThickness says -2.5 mm")
    yield Odd("slices overlap (SliceThickness of 5 every 2.5 mm)", RIGHT, every(SliceThickness="5"))
    yield Odd(
        "GantryDetectorTilt says 18 degrees, positions show none", WARNED, every(GantryDetectorTilt="18"), "18 degrees"
    )
    yield Odd(
        "InstanceNumber and SliceLocation contradict the positions",
        RIGHT,
        lambda folder: written(
            folder, adjust=lambda dataset, d: setter(InstanceNumber=str(99 - d), SliceLocation=str(-d))(dataset, d)
        ),
    )
    yield Odd("PatientPosition contradicts the orientation", RIGHT, every(PatientPosition="FFP"))
    yield Odd("no ImagePositionPatient", "`BrokenSeries`: `no-geometry`", nothing(every(ImagePositionPatient=None)))
    yield Odd(
        "no ImageOrientationPatient", "`BrokenSeries`: `no-geometry`", nothing(every(ImageOrientationPatient=None))
    )
    yield Odd("no PixelSpacing", "`BrokenSeries`: `no-geometry`", nothing(every(PixelSpacing=None)))
    yield Odd("PixelSpacing of 0", "`BrokenSeries`: `no-geometry`", nothing(every(PixelSpacing=["0", "0.9"])))
    yield Odd(
        "an orientation that is none",
        "`BrokenSeries`: `no-geometry`",
        nothing(every(ImageOrientationPatient=["1", "0", "0", "1", "0", "0"])),
    )
    yield Odd("Rows and Columns of 0", "`BrokenSeries`: `no-geometry`", nothing(every(Rows=0, Columns=0)))


def _values() -> Iterator[Odd]:
    pixels = "`UnsupportedPixels`"
    yield Odd("an unsigned first slice, the others signed", WARNED, signedness, "PixelRepresentation")
    yield Odd("fractional rescale", RIGHT, rescaled("0.5", "-1000.25"))
    yield Odd("values beyond 16 bits", RIGHT, rescaled("40", "-40960"))
    yield Odd("another rescale in each slice", WARNED, rescaled_by_slice, "RescaleIntercept")
    yield Odd("PixelPaddingValue -32768, intercept -1024", RIGHT, outside_circle(-32768, -32768))
    yield Odd("the same as US", RIGHT, outside_circle(32768, -32768, "US"))
    yield Odd("-1500 outside the scan circle and no PixelPaddingValue", RIGHT, outside_circle(None, -1500))
    yield Odd(
        "old overlays above HighBit",
        RIGHT,
        lambda folder: written(folder, Volume(odd_volume().array % 4096 - 1024, odd_volume().geometry), overlay_bits),
    )
    yield Odd("RescaleType US", pixels, nothing(every(RescaleType="US")), "RescaleType")
    yield Odd("RescaleType MGML (an iodine map)", pixels, nothing(every(RescaleType="MGML")), "iodine")
    yield Odd("no RescaleType", RIGHT, every(RescaleType=None))
    yield Odd("no rescale", pixels, nothing(every(RescaleSlope=None, RescaleIntercept=None)), "RescaleSlope")
    yield Odd("RescaleSlope 0", pixels, nothing(every(RescaleSlope="0")), "RescaleSlope")
    yield Odd("a Modality LUT", pixels, nothing(every(ModalityLUTSequence=[])), "Modality LUT")
    yield Odd("MONOCHROME1", pixels, nothing(every(PhotometricInterpretation="MONOCHROME1")), "MONOCHROME2")
    yield Odd("32 bit", pixels, nothing(every(BitsAllocated=32)), "BitsAllocated")
    yield Odd("HighBit contradicts BitsStored", pixels, nothing(every(HighBit=11)), "HighBit")
    for keyword in ("PixelRepresentation", "BitsStored", "PhotometricInterpretation"):
        yield Odd(f"no {keyword}", pixels, nothing(every(**{keyword: None})), f"{keyword} is empty or absent")


def _one_slice_deviates() -> Iterator[Odd]:
    size, plane = "`BrokenSeries`: `mixed-size`", "`BrokenSeries`: `mixed-orientation`"
    yield Odd(
        "one slice: another ImageOrientationPatient",
        plane,
        nothing(one(ImageOrientationPatient=["1", "0", "0", "0", "0.995", "0.0998"])),
    )
    yield Odd("one slice: another FrameOfReferenceUID", plane, nothing(one(FrameOfReferenceUID="1.2.3")))
    yield Odd("one slice: other Rows", size, nothing(one(Rows=12)))
    yield Odd("one slice: another PixelSpacing", size, nothing(one(PixelSpacing=["0.6", "0.91"])))
    yield Odd("one slice: another PatientID", "set aside: `mixed-patients`", nothing(one(PatientID="OTHER")))
    mixed = "set aside: `mixed-patients`"
    second = nothing(alternating({"PatientID": b"A\\B"}, {"PatientID": b"A\\C"}))
    yield Odd("another second PatientID in every other slice", mixed, second, "PatientID of")
    issuers = nothing(alternating({"IssuerOfPatientID": b"NORTH"}, {"IssuerOfPatientID": b"SOUTH"}))
    yield Odd("another IssuerOfPatientID in every other slice", mixed, issuers, "IssuerOfPatientID of")
    for what, keyword, value in (
        ("another PatientName", "PatientName", b"Doe^John"),
        ("another PatientBirthDate", "PatientBirthDate", b"19500202"),
    ):
        nameless = {"PatientID": b"", "PatientName": b"Doe^Jane", "PatientBirthDate": b"19500201"}
        deviating = nothing(alternating(nameless, {**nameless, keyword: value}))
        yield Odd(f"no PatientID, {what} in every other slice", mixed, deviating, f"{keyword} of")
    utf8 = {"PatientID": b"", "PatientName": "Müller^J=山".encode(), "SpecificCharacterSet": b"ISO_IR 192"}
    latin = {"PatientID": b"", "PatientName": b"M\xdcLLER ^J^^", "SpecificCharacterSet": b"ISO_IR 100"}
    yield Odd("no PatientID, PatientName in two character sets", WARNED, alternating(utf8, latin), "PatientName")
    yield Odd("one slice: another Modality", "set aside: `modality`", nothing(one(Modality="MR")))
    yield Odd("one slice: another PixelRepresentation", WARNED, one(PixelRepresentation=1), "PixelRepresentation of")
    yield Odd("one slice: other BitsStored", WARNED, one(BitsStored=15, HighBit=14), "BitsStored of")
    yield Odd("one slice: a PixelPaddingValue", WARNED, padded_once, "PixelPaddingValue of")
    yield Odd("one slice: another SliceThickness", WARNED, one(SliceThickness="5"), "SliceThickness of")
    yield Odd("one slice: another PatientPosition", WARNED, one(PatientPosition="HFP"), "PatientPosition of")
    yield Odd("one slice: MONOCHROME1", "`UnsupportedPixels`", nothing(one(PhotometricInterpretation="MONOCHROME1")))


def _objects() -> Iterator[Odd]:
    yield Odd("MR", "set aside: `modality`", nothing(every(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")))
    yield Odd("several frames in a CT image", "set aside: `multi-frame`", nothing(every(NumberOfFrames="2")))
    yield Odd("colour", "set aside: `colour`", nothing(every(SamplesPerPixel=3)))
    yield Odd("no SamplesPerPixel", "set aside: `no-pixels`", nothing(every(SamplesPerPixel=None)), "empty or absent")
    yield Odd("no pixel data", "set aside: `no-pixels`", nothing(every(PixelData=None)))
    yield Odd("a MIP", "set aside: `derived`", nothing(every(ImageType=["DERIVED", "SECONDARY", "MIP"])))
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        yield Odd(f"an empty {keyword}", "set aside: `no-uid`", nothing(every(**{keyword: ""})), keyword)
    for value in ("CHEST_TO_PELVIS", "CHESTABDPELVIS", "LUNG", "Thorax", "C/A/P"):
        yield Odd(f"BodyPartExamined {value}, a model of the chest", RIGHT, every(BodyPartExamined=value))
    aside = "set aside: `body-part`"
    yield Odd("BodyPartExamined HEAD, a model of the chest", aside, nothing(every(BodyPartExamined="HEAD")), "(HEAD)")
    other = "an unknown BodyPartExamined, a model of the chest"
    yield Odd(other, aside, nothing(every(BodyPartExamined="KATZE")), "an unknown term")
    yield Odd(
        "a scout of one image with a series",
        f"{RIGHT} + set aside: `localizer`",
        with_localizer(SHAPE[1:], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SeriesInstanceUID="1.2.3"),
        "localizer images (1), which form no volume",
    )
    yield Odd("two patients in a folder", f"2 x {RIGHT}", patients)
    yield Odd(
        "two patients in a series",
        "set aside: `mixed-patients`",
        nothing(lambda folder: written(folder, adjust=lambda dataset, d: setattr(dataset, "PatientID", str(d % 2)))),
    )
    yield Odd("wrong VRs: numbers and codes as LO, Rows as UL", RIGHT, lambda folder: written(folder, adjust=wrong_vrs))
    yield Odd(
        "PixelSpacing as OB",
        "`BrokenSeries`: `no-geometry`",
        nothing(
            lambda folder: written(
                folder, adjust=lambda dataset, _d: dataset.add_new("PixelSpacing", "OB", b"\xff\xfe")
            )
        ),
    )
    yield Odd("private junk", RIGHT, lambda folder: written(folder, adjust=private_junk))


def put_raw(dataset: Dataset, attributes: dict[str, bytes]) -> None:
    for keyword, value in attributes.items():
        padded = value + b" "[: len(value) % 2]
        tag = Tag(keyword)
        dataset[tag] = RawDataElement(tag, dictionary_VR(tag), len(padded), padded, 0, False, True)


def raw(slices: slice = slice(None), **attributes: bytes) -> Callable[[Path], Volume]:
    """A series some of whose slices have these bytes as values, whatever they are."""

    def adjust(dataset: Dataset, d: int) -> None:
        if d in range(*slices.indices(SHAPE[0])):
            put_raw(dataset, attributes)

    def write(folder: Path) -> Volume:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of a character set
            return written(folder, adjust=adjust)

    return write


def alternating(*kinds: dict[str, bytes]) -> Callable[[Path], Volume]:
    """A series whose slices have the kinds' bytes as values by turns."""
    return lambda folder: written(folder, adjust=lambda dataset, d: put_raw(dataset, kinds[d % len(kinds)]))


def _header_values() -> Iterator[Odd]:
    letter = "誠".encode("gbk")  # its second byte is a backslash
    for name, attributes in {
        "an invalid birth date (19500231)": {"PatientBirthDate": b"19500231"},
        "an invalid study date (20190229)": {"StudyDate": b"20190229"},
        "a PatientName with a backslash": {"PatientName": b"Wang\\XiaoDong"},
        "a GBK letter in PatientName, no SpecificCharacterSet": {"PatientName": letter, "SpecificCharacterSet": b""},
        "a Latin-1 letter in PatientName, SpecificCharacterSet ISO_IR 192": {"PatientName": b"M\xfcller"},
        "two PatientIDs": {"PatientID": b"A-1\\A-2"},
        "a PatientID of 65 characters": {"PatientID": b"x" * 65},
        "an AccessionNumber of 17 characters": {"AccessionNumber": b"x" * 17},
        "two AccessionNumbers": {"AccessionNumber": b"A-1\\A-2"},
        "a StudyID of 17 characters": {"StudyID": b"x" * 17},
        "PatientIdentityRemoved YES without a method": {"DeidentificationMethod": b""},
        "a Clinical Trial Subject module without its subject": {"ClinicalTrialSponsorName": b"Sponsor"},
    }.items():
        named = {"DeidentificationMethod": "PatientIdentityRemoved"}.get(next(iter(attributes)), next(iter(attributes)))
        yield Odd(name, WARNED, raw(**attributes), named)
    yield Odd("a GB18030 letter whose second byte is a backslash", RIGHT, raw(
        PatientName=letter, SpecificCharacterSet=b"GB18030"
    ))  # fmt: skip
    yield Odd("a SpecificCharacterSet that does not exist", WARNED, raw(SpecificCharacterSet=b"ISO_IR 999"))
    malformed = "set aside: `malformed-uid`"
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        yield Odd(
            f"two UIDs as {keyword}", malformed, nothing(raw(**{keyword: b"1.2\\1.3"})), f"{keyword} is not a valid UID"
        )
    yield Odd(
        "a SOPInstanceUID of letters",
        malformed,
        nothing(raw(slice(3, 4), SOPInstanceUID=b"1.2.x")),
        "is not a valid UID",
    )
    yield Odd("a StudyInstanceUID with a superfluous 0", malformed, nothing(raw(StudyInstanceUID=b"1.02.3")), "--force")


def _other_objects() -> Iterator[Odd]:
    for name, sop_class, attributes in (
        ("a Secondary Capture", "1.2.840.10008.5.1.4.1.1.7", {}),
        ("a colour Secondary Capture of modality OT", "1.2.840.10008.5.1.4.1.1.7.4", {"Modality": "OT"}),
        ("a dose report", "1.2.840.10008.5.1.4.1.1.88.67", {"PixelData": None, "Modality": "SR"}),
        ("an encapsulated PDF", "1.2.840.10008.5.1.4.1.1.104.1", {"PixelData": None, "Modality": "DOC"}),
        ("a private object without pixels", "1.3.12.2.1107.5.9.1", {"PixelData": None}),
        ("a protocol page as CT image", "1.2.840.10008.5.1.4.1.1.2", {"ImageType": ["DERIVED", "SECONDARY", "PROT"]}),
    ):
        yield Odd(f"{name} in the series", WARNED, with_object(sop_class, **attributes), "not a slice omitted")
    ct = "1.2.840.10008.5.1.4.1.1.2"
    yield Odd("a colour picture as CT image in the series", WARNED, with_object(ct, **COLOUR), "it has colours")
    nowhere = "an image without position and orientation in the series"
    yield Odd(nowhere, WARNED, with_object(ct, PixelSpacing=None), "neither position nor orientation")
    yield Odd(
        "four images without position and orientation in the series",
        "`BrokenSeries`: `no-geometry`",
        nothing(joined(written, *(with_object_again(n) for n in range(4)))),
    )
    yield Odd("seven kinds of extra objects in the series", WARNED, with_extras, "Radiation Dose SR Storage; ")
    yield Odd(
        "seven kinds of extra objects, each a series of its own",
        f"5 x set aside: `modality` + {RIGHT} + set aside: `localizer` + set aside: `no-frame-of-reference`",
        lambda folder: with_extras(folder, SeriesInstanceUID="1.2.8"),
    )
    unknown = "1.2.840.10008.5.1.4.1.1.22"
    yield Odd("a picture of an unknown class in the series", WARNED, with_object(unknown), "an unknown class")
    for what, sop_class in (("that DICOM's tables lack", unknown), ("that is a transfer syntax", "1.2.840.10008.1.2")):
        name = f"the last 3 slices of 18 have a SOPClassUID {what}"
        last = nothing(ending_elsewhere(3, SOPClassUID=sop_class))
        yield Odd(name, "set aside: `modality`", last, "00017.dcm is ")
    yield Odd("an RTSTRUCT with an empty PixelData, Implicit VR", f"{RIGHT} + set aside: `modality`", empty_pixels)
    yield Odd("CT images with an empty PixelData", "set aside: `no-pixels`", nothing(every(PixelData=b"")))
    yield Odd("no Modality", "set aside: `modality`", nothing(every(Modality=None)), "Modality is empty or absent")
    yield Odd("an empty Modality", "set aside: `modality`", nothing(every(Modality="")), "Modality is empty or absent")
    yield Odd(
        "CT images of modality MR", "set aside: `modality`", nothing(every(Modality="MR")), "whose Modality is MR"
    )
    once = "another under a different SOPInstanceUID omitted"
    yield Odd(
        "all slices twice, under new SOPInstanceUIDs",
        WARNED,
        copied_slices(16),
        f"16 slices that duplicate {once}",
    )
    yield Odd(
        "one slice twice, under a new SOPInstanceUID",
        WARNED,
        copied_slices(1),
        f"1 slice that duplicates {once}",
    )
    yield Odd(
        "all slices twice, of another acquisition time",
        WARNED,
        copied_slices(16, AcquisitionTime="130000"),
        f"16 slices that duplicate {once}",
    )
    yield Odd(
        "all slices twice, rescaled in another way",
        "`BrokenSeries`: `doubled`",
        nothing(copied_slices(16, RescaleIntercept="-1000")),
    )


def _encodings() -> Iterator[Odd]:
    for form in FORMS:
        says = next((note.value for note in form.notes), "")
        odd = WARNED if form.notes or "padding" in form.name else RIGHT
        yield Odd(form.name, odd, in_form(form), says or ("padding after" if odd is WARNED else ""))
    broken = "`BrokenSeries`: `unreadable`"
    pixels = "`UnsupportedPixels`"
    yield Odd(
        "an extra row of pixels after the image", broken, nothing(rewritten(padded(b"\1" * 80))), "are not padding"
    )
    yield Odd(
        "padding cut off", broken, nothing(rewritten(lambda content: padded(bytes(50))(content)[:-9])), "cut short"
    )
    yield Odd(
        "Rows twice, with different values",
        "file named + set aside: `too-few-slices`",
        nothing(rewritten(before_pixels(element(0x0028, 0x0010, b"US", struct.pack("<H", 16))))),
        "with different values",
    )
    base = "1.2.840.10008.1.2"
    for name, says, write in (
        ("little endian declared as big endian", "which is little endian", renamed(ExplicitVRBigEndian)),
        (
            "big endian declared as little endian",
            "which is big endian",
            renamed(ExplicitVRLittleEndian, ExplicitVRBigEndian),
        ),
    ):
        yield Odd(name, "file named", write, says)
    for name, says, write in (
        ("native pixels declared as JPEG 2000", "is not encapsulated", renamed(JPEG2000Lossless)),
        ("JPEG 2000 declared as native", "is encapsulated", renamed(ExplicitVRLittleEndian, JPEG2000Lossless)),
        ("JPEG 2000 declared as RLE", "its frame is JPEG 2000", renamed(RLELossless, JPEG2000Lossless)),
        ("RLE declared as JPEG-LS", "its frame is RLE", renamed(JPEGLSLossless, RLELossless)),
        ("JPEG-LS declared as JPEG Lossless", "its frame is JPEG-LS", renamed(base + ".4.70", JPEGLSLossless)),
        ("a private transfer syntax", "is private", renamed("1.2.840.113619.5.2", ImplicitVRLittleEndian)),
        ("a retired transfer syntax (1.2.4.52)", "is retired", renamed(base + ".4.52")),
        (
            "a TransferSyntaxUID of another kind",
            "not a transfer syntax of the standard",
            renamed("1.2.840.10008.5.1.4.1.1.2"),
        ),
        ("encapsulated uncompressed pixels (1.2.1.98)", "is not supported", renamed(base + ".1.98")),
    ):
        yield Odd(name, pixels, write, says)


def _files() -> Iterator[Odd]:
    broken = "file named + set aside: `too-few-slices`"
    yield Odd("a DICOMDIR", RIGHT, dicomdir)
    yield Odd("a zip file", "`NoUsableSeries`", zipped)
    yield Odd("a loop of symbolic links", RIGHT, linked)
    yield Odd("among 20,000 other files", RIGHT, among_others)
    yield Odd("no preamble, no meta information, no file extension", RIGHT, without_preamble)
    yield Odd(
        "an empty file with the name of a DICOM file",
        f"{RIGHT} + file named",
        joined(every(), lambda folder: (folder / "empty.dcm").touch()),
    )
    yield Odd("a file cut in its header", broken, nothing(rewritten(lambda content: content[:700])), "00005.dcm")
    yield Odd(
        "a file cut in its pixels",
        "`BrokenSeries`: `unreadable`",
        nothing(rewritten(lambda content: content[:-20])),
        "00005.dcm",
    )
    yield Odd(
        "a length beyond the file",
        broken,
        nothing(rewritten(before_pixels(struct.pack("<HH2sHL", 0x0029, 0x1010, b"OB", 0, 0xFFFFFFF0)))),
        "00005.dcm",
    )
    yield Odd(
        "a value that swallows bytes of the next",
        broken,
        nothing(rewritten(vr_length((0x0018, 0x0050), b"DS", 9))),
        "00005.dcm",
    )
    yield Odd(
        "a value that swallows whole elements",
        WARNED,
        rewritten(vr_length((0x0018, 0x0050), b"DS", 60)),
        "SliceThickness of",
    )
    yield Odd("sequences nested 400 deep", broken, nothing(rewritten(before_pixels(nested(400)))), "00005.dcm")
    yield Odd("a deflate bomb", broken, nothing(rewritten(bomb)), "00005.dcm")


def _syntaxes() -> Iterator[Odd]:
    base = "1.2.840.10008."
    names = {
        "1.2": "Implicit VR", "1.2.1": "Explicit VR", "1.2.2": "Explicit VR big endian", "1.2.1.99": "Deflated",
        "1.2.4.90": "JPEG 2000 lossless", "1.2.4.80": "JPEG-LS lossless", "1.2.4.57": "JPEG Lossless, process 14",
        "1.2.4.70": "JPEG Lossless, first-order prediction", "1.2.5": "RLE",
    }  # fmt: skip
    for suffix, name in names.items():
        yield Odd(f"{name} ({suffix})", RIGHT, in_syntax(base + suffix))
    for suffix, name in {"201": "HTJ2K lossless", "202": "HTJ2K lossless, RPCL"}.items():
        yield Odd(f"{name} (1.2.4.{suffix})", RIGHT, in_high_throughput(f"{base}1.2.4.{suffix}"))
    yield Odd("HTJ2K (1.2.4.203)", WARNED, in_high_throughput(base + "1.2.4.203"), "not exact")
    yield Odd("JPEG 2000 (1.2.4.91)", WARNED, lossy(base + "1.2.4.91"), "not exact")
    yield Odd("JPEG-LS near-lossless (1.2.4.81)", WARNED, lossy(base + "1.2.4.81"), "not exact")
    for suffix in ("50", "51", "53", "55"):
        yield Odd(
            f"lossy JPEG (1.2.4.{suffix})",
            "`UnsupportedPixels`",
            encapsulated(f"{base}1.2.4.{suffix}", b"\xff\xd8\xff\xd9"),
            suffix,
        )
    yield Odd("a video (1.2.4.102)", "`UnsupportedPixels`", encapsulated(f"{base}1.2.4.102", bytes(64)), "102")
    yield Odd("a damaged compressed frame", "`UnsupportedPixels`", damaged_frame, "00005.dcm")
    yield Odd("a compressed frame that claims 60000 x 60000", "`UnsupportedPixels`", huge_frame, "another size")
    yield Odd("frames that decode to zeros", "`UnsupportedPixels`", zero_frames, "zeros only")


ODD: tuple[Odd, ...] = (
    *_geometry(),
    *_volumes(),
    *_enhanced(),
    *_values(),
    *_one_slice_deviates(),
    *_objects(),
    *_header_values(),
    *_other_objects(),
    *_files(),
    *_encodings(),
    *_syntaxes(),
)
