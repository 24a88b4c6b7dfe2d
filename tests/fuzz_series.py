"""Damage one file of a 16-slice series in many ways; nothing wrong may come out of it without a word.

`python tests/fuzz_series.py [COUNT [SEED]]` prints one line for each mutant that is silent, hangs or crashes, and one
JSON document at the end; the same seed gives the same mutants. The tests run 500.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import gdcm
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ctflow.core.errors import CtflowError
from ctflow.core.volume import PADDING_HU, Volume
from ctflow.dicom.attributes import PARSE_ERRORS
from ctflow.dicom.read.assemble import Assembled, assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series
from ctflow.dicom.read.structure import Layout, layout_of_header
from dicom_support import indices_of
from odd_headers import FORMS, LONG
from odd_series import files_of, odd_volume, transcode, written

BASE = "1.2.840.10008."
SYNTAXES = ("1.2.1", "1.2.1", "1.2.1", "1.2", "1.2", "1.2.2", "1.2.1.99", "1.2.4.90", "1.2.4.80", "1.2.4.70", "1.2.5")
# Half of the mutants are of headers that the standard does not allow and that are read nevertheless.
ODD = {form.name: form for form in FORMS}
KINDS = (*SYNTAXES, *ODD)
HANG_S = 10.0
SAME_MM = 0.05  # of the whole volume; what one slice rounds moves it by less, or is warned about
SAME_SHARE = 0.1  # of a voxel, where a warning says that slices lie beside their grid
FINE = ("identical", "refused", "warned", "valid frame")
# A "valid frame" is damage inside compressed values that leaves a valid stream of an image like its neighbours. As with
# bytes inside native pixels nothing in the file tells it, and GDCM reads the same image. It is counted by itself.


@dataclass(frozen=True)
class Element:
    """Where an element of a file lies: its tag, its length field, its value."""

    start: int
    vr: bytes
    length_at: int
    length_size: int
    value: int
    length: int


# -------------------------------------------------------------------------------------------------------- the series


def rich(dataset: Dataset, _index: int) -> None:
    """Elements of many kinds, a padding value and sequences, so that there is something to damage."""
    dataset.add_new("PixelPaddingValue", "US", 63000)
    item, inner = Dataset(), Dataset()
    inner.CodeValue, inner.CodingSchemeDesignator, inner.CodeMeaning = "24627-2", "LN", "CT chest"
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = dataset.SOPClassUID, "1.2.3"
    item.PurposeOfReferenceCodeSequence = [inner]
    dataset.ReferencedImageSequence = [item, item]
    dataset["ReferencedImageSequence"].is_undefined_length = True
    dataset.ProcedureCodeSequence = [inner]
    dataset.ImageComments = "synthetic"
    dataset.private_block(0x0029, "FUZZ", create=True).add_new(1, "OB", bytes(range(64)))


def write_base(folder: Path, kind: str) -> None:
    """A chest's worth of edges with some noise, so that slices are alike as those of a patient are."""
    geometry = odd_volume().geometry
    _, h, w = np.moveaxis(indices_of(geometry.shape), -1, 0)
    body = np.where((h - 16) ** 2 / 180 + (w - 20) ** 2 / 300 < 1, 40, -1000)
    body = np.where((h - 16) ** 2 / 60 + (abs(w - 20) - 9) ** 2 / 40 < 1, -850, body)
    noise = np.random.default_rng(0).normal(0, 12, geometry.shape)
    folder.mkdir(exist_ok=True, parents=True)
    written(folder, Volume(np.rint(body + noise).clip(-1024).astype(np.int16), geometry), rich)
    for path in files_of(folder):
        if kind in ODD:
            path.write_bytes(ODD[kind].write(path.read_bytes()))
        else:
            transcode(path, BASE + kind)


def elements_of(content: bytes) -> tuple[list[Element], Element | None]:
    """Top-level elements of a whole file up to the pixel data, the meta information among them; and its pixel data."""
    layout = layout_of_header(io.BytesIO(content), preamble=True)
    assert isinstance(layout, Layout)
    found = [_element(each) for each in (*layout.meta, *layout.elements)]
    pixels = _element(layout.pixels) if layout.pixels else None
    return [*found, *([pixels] if pixels else [])], pixels


def _element(place: tuple[int, bytes, int, int, int]) -> Element:
    _, vr, length, value, _ = place
    if not vr:
        return Element(value - 8, vr, value - 4, 4, value, length)
    return (
        Element(value - 12, vr, value - 4, 4, value, length)
        if vr in LONG
        else Element(value - 8, vr, value - 2, 2, value, length)
    )


# --------------------------------------------------------------------------------------------------------- mutations


def mutated(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One kind of damage, drawn at random, and the damaged file; values of native pixels stay as they are."""
    elements, pixels = elements_of(content)
    end = pixels.start if pixels else len(content)
    kinds = ["truncate", "tag", "vr", "length", "delimiter", "delete", "insert", "value", "value", "number", "swap"]
    if pixels is None or pixels.length == 0xFFFFFFFF:
        kinds += ["frame"] * 3
    kind = str(rng.choice(kinds))
    element = elements[int(rng.integers(len(elements)))]
    if kind == "truncate":
        return kind, content[: int(rng.integers(len(content)))]
    if kind == "tag":
        return kind, _over(content, element.start + int(rng.integers(4)), rng.bytes(1))
    if kind == "vr":
        vrs = (b"UN", b"OB", b"LO", b"US", b"SS", b"DS", b"IS", b"SQ", b"UI", b"UT", rng.bytes(2))
        return kind, _over(content, element.start + 4, vrs[int(rng.integers(len(vrs)))])
    if kind == "length":
        return kind, _with_length(content, element, rng)
    if kind == "delimiter":
        return kind, _with_delimiter(content, end, rng)
    at = int(rng.integers(132, max(end, 133)))
    if kind == "delete":
        return kind, content[:at] + content[at + int(rng.integers(1, 17)) :]
    if kind == "insert":
        return kind, content[:at] + rng.bytes(int(rng.integers(1, 17))) + content[at:]
    if kind == "frame":
        start = pixels.start if pixels else elements[-1].value + elements[-1].length
        return kind, _over(content, int(rng.integers(start, len(content))), rng.bytes(int(rng.integers(1, 9))))
    if kind == "swap":
        other = elements[int(rng.integers(len(elements)))]
        return kind, _over(content, element.start, content[other.start : other.start + 4])
    return kind, _with_value(content, elements, kind, rng)


def _over(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :] if at + len(new) <= len(content) else content[:at]


def _with_length(content: bytes, element: Element, rng: np.random.Generator) -> bytes:
    top = 256**element.length_size
    near = element.length + int(rng.integers(-8, 200))
    choices = (near, near, 0, top - 1, top - 2, int(rng.integers(top)), element.length + 2)
    new = choices[int(rng.integers(len(choices)))] % top
    return _over(content, element.length_at, new.to_bytes(element.length_size, "little"))


def _with_delimiter(content: bytes, end: int, rng: np.random.Generator) -> bytes:
    marks = (b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0")
    places = [at for mark in marks for at in _found(content, mark, end)]
    if places and rng.random() < 0.7:
        at = places[int(rng.integers(len(places)))]
        return _over(content, at + int(rng.integers(8)), rng.bytes(1))
    at = int(rng.integers(132, max(end, 133)))
    return content[:at] + marks[int(rng.integers(3))] + bytes(4) + content[at:]


def _found(content: bytes, mark: bytes, end: int) -> Iterator[int]:
    at = content.find(mark)
    while 0 <= at < end:
        yield at
        at = content.find(mark, at + 1)


def _with_value(content: bytes, elements: list[Element], kind: str, rng: np.random.Generator) -> bytes:
    small = [element for element in elements if 0 < element.length <= 128]
    if kind == "number":
        group = [
            e for e in small if content[e.start : e.start + 2] in (b"\x28\x00", b"\x20\x00", b"\x18\x00", b"\x00\x28")
        ]
        small = group or small
    if not small:
        return _over(content, int(rng.integers(132, len(content))), rng.bytes(2))
    element = small[int(rng.integers(len(small)))]
    at = element.value + int(rng.integers(element.length))
    digit = content[at : at + 1] in b"0123456789.-" and kind == "number"
    return _over(content, at, bytes([b"0123456789.-\\ "[int(rng.integers(14))]]) if digit else rng.bytes(1))


# ------------------------------------------------------------------------------------------------------------ oracle


def read(folder: Path) -> Assembled:
    """As a run does: the only series that is chosen, or its named refusal."""
    scan = scan_folder(folder)
    selection = select_series(scan)
    require_selected(selection, scan)
    (candidate,) = selection.selected
    return assemble_series(candidate.series)


def is_same(found: Volume, base: Volume) -> bool:
    return np.array_equal(found.array, base.array) and _is_same_place(found, base)


def _is_same_place(found: Volume, base: Volume) -> bool:
    corners = np.array([[d, h, w] for d in (0, 15) for h in (0, 31) for w in (0, 39)])
    away = found.geometry.world_from_index(corners) - base.geometry.world_from_index(corners)
    return found.array.shape == base.array.shape and float(np.abs(away).max()) <= SAME_MM


def _is_warned_place(found: Assembled, base: Volume) -> bool:
    """Whether the volume lies within a tenth of a voxel, and a warning says that slices are beside their grid."""
    if found.volume.array.shape != base.array.shape or not any("puts slices" in each for each in found.warnings):
        return False
    away = found.volume.geometry.affine_mm - base.geometry.affine_mm
    corners = np.array([[d, h, w, 1] for d in (0, 15) for h in (0, 31) for w in (0, 39)]) @ away.T
    return float(np.abs(corners[:, :3] @ np.linalg.inv(base.geometry.affine_mm[:3, :3]).T).max()) <= SAME_SHARE


def verdict_of(what: str, path: Path, d: int, base: Volume, header: Dataset) -> str:
    """What became of a mutant: one of `FINE`, or "silent: ..."."""
    try:
        found = read(path.parents[1])
    except CtflowError:
        return "refused"
    if is_same(found.volume, base):
        return "identical"
    if np.array_equal(found.volume.array, base.array) and _is_warned_place(found, base):
        return "warned"
    if not _is_same_place(found.volume, base):
        return "silent: another place"
    others = [other for other in range(len(base.array)) if other != d]
    if not np.array_equal(found.volume.array[others], base.array[others]):
        return "silent: another slice changed"
    warned = any(path.name in warning for warning in found.warnings)
    implied = [hu for hu in (slice_by_gdcm(path), slice_by_pydicom(path)) if hu is not None]
    if not implied or not all(np.allclose(hu, found.volume.array[d], atol=1e-3) for hu in implied):
        return "silent: GDCM or pydicom reads another slice" + (", warned" if warned else "")
    if warned:
        return "warned"
    in_values = what.startswith("frame") or (what.endswith(" 1.2.1.99") and _header(path) == header)
    return "valid frame" if in_values else "silent: no warning names the file"


def _header(path: Path) -> Dataset:
    return pydicom.dcmread(path, stop_before_pixels=True)


def slice_by_gdcm(path: Path) -> npt.NDArray[np.float64] | None:
    """(H, W) HU as GDCM reads the file."""
    if "group 0002" in path.parents[1].name:  # GDCM ends the process at some of these once they are damaged
        return None
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        return None
    image, dataset = reader.GetImage(), reader.GetFile().GetDataSet()
    form = image.GetPixelFormat()
    kind = ("i" if form.GetPixelRepresentation() else "u") + str(form.GetBitsAllocated() // 8)
    buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
    stored = np.frombuffer(buffer, kind).reshape(image.GetDimension(1), image.GetDimension(0)).astype(np.int64)
    padding = _integers(dataset, 0x0120), _integers(dataset, 0x0121)
    signed = bool(form.GetPixelRepresentation())
    return hounsfield(stored, form.GetBitsStored(), signed, (image.GetSlope(), image.GetIntercept()), padding)


def slice_by_pydicom(path: Path) -> npt.NDArray[np.float64] | None:
    """(H, W) HU as pydicom reads native pixels; None where it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(path)
            if "TransferSyntaxUID" not in dataset.file_meta:
                implicit, little = dataset.original_encoding
                syntax = (
                    ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                )
                dataset.file_meta.TransferSyntaxUID = syntax
            if dataset["PixelData"].is_undefined_length:  # decoders do not survive every damaged frame
                return None
            stored = pixel_array(dataset, raw=True).astype(np.int64)
            rescale = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
            padding = [dataset.get(keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
            unsigned = [None if value is None else int(value) % 65536 for value in padding]
            return hounsfield(stored, int(dataset.BitsStored), dataset.PixelRepresentation == 1, rescale, unsigned)
        except (*PARSE_ERRORS, RuntimeError):
            return None


def hounsfield(stored, bits: int, signed: bool, rescale, padding) -> npt.NDArray[np.float64]:
    """Stored values as HU; `padding` as unsigned 16 bit patterns."""
    spare = 2**bits
    values = stored % spare
    if signed:
        values = np.where(values >= spare // 2, values - spare, values)
    hu = values * rescale[0] + rescale[1]
    low, limit = padding
    if low is not None:
        ends = sorted((low, low if limit is None else limit))
        hu = np.where((stored % 65536 >= ends[0]) & (stored % 65536 <= ends[1]), PADDING_HU, hu)
    return hu


def _integers(dataset: gdcm.DataSet, element: int) -> int | None:
    tag = gdcm.Tag(0x0028, element)
    if not dataset.FindDataElement(tag):
        return None
    value = dataset.GetDataElement(tag).GetByteValue()
    raw = value.GetBuffer().encode("utf-8", "surrogateescape") if value is not None else b""
    return int.from_bytes(raw[:2], "little") if len(raw) == 2 else None


# ------------------------------------------------------------------------------------------------------------ driver


def mutant(number: int, seed: int, folders: dict[str, Path]) -> tuple[Path, int, str, bytes]:
    """File, its slice, what is done to it, and its damaged content."""
    rng = np.random.default_rng([seed, number])
    kinds = tuple(ODD) if number % 2 else SYNTAXES
    kind = kinds[int(rng.integers(len(kinds)))]
    d = int(rng.integers(16))
    path = files_of(folders[kind])[d]
    damage, content = mutated(path.read_bytes(), rng)
    return path, d, f"{damage} in {kind}", content


def _work(numbers: range, seed: int, root: Path, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    folders = {kind: root / kind for kind in set(KINDS)}
    bases = {kind: read(folder).volume for kind, folder in folders.items()}
    for number in numbers:
        path, d, what, content = mutant(number, seed, folders)
        whole, header = path.read_bytes(), _header(path)
        pipe.send((number, what, None))
        try:
            path.write_bytes(content)
            verdict = verdict_of(what, path, d, bases[path.parents[1].name], header)
        except Exception as error:
            verdict = f"crash: {type(error).__name__}"
        finally:
            path.write_bytes(whole)
        pipe.send((number, what, verdict))


def fuzz(count: int, seed: int, root: Path) -> dict[str, object]:
    """Try mutants in a process of its own, which may hang or die.

    Returns:
        Counts of verdicts, and (number, what, verdict) of each that is not fine.
    """
    for kind in set(KINDS):
        write_base(root / kind, kind)
    verdicts, bad, slowest, start = Counter(), [], 0.0, 0
    while start < count:
        here, there = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(
            target=_work, args=(range(start, count), seed, root, there)
        )
        worker.start()
        there.close()
        number, what = start, "reading the series"
        began = time.monotonic()
        verdict: str | None = None
        while number < count:
            try:
                if not here.poll(HANG_S + 20 * (what == "reading the series")):
                    verdict = "hang"
                    break
                number, what, verdict = here.recv()
            except EOFError:
                verdict = "crash: the process died"
                break
            if verdict is None:
                began = time.monotonic()
                continue
            slowest = max(slowest, time.monotonic() - began)
            verdicts[verdict.split(":")[0]] += 1
            if verdict not in FINE:
                bad.append((number, what, verdict))
            if number == count - 1:
                break
        if verdict in ("hang", "crash: the process died"):
            verdicts[verdict.split(":")[0]] += 1
            bad.append((number, what, verdict))
            for kind in set(KINDS):  # it may have died with a damaged file in place
                _restore(root / kind, kind)
        worker.kill()
        worker.join()
        start = number + 1
    return {"mutants": count, "seed": seed, **verdicts, "slowest_s": round(slowest, 2), "bad": bad}


def _restore(folder: Path, kind: str) -> None:
    shutil.rmtree(folder)
    write_base(folder, kind)


def main(words: list[str]) -> int:
    count, seed = (int(word) for word in [*words, "5000", "7"][:2]) if len(words) != 1 else (int(words[0]), 7)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(count, seed, Path(folder))
    for number, what, verdict in result["bad"]:
        sys.stdout.write(f"{number}: {what}: {verdict}\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "bad"}) + "\n")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
