"""Put malformed values into the headers of a 16-slice series; what is written conforms, or the series is named.

`python tests/fuzz_values.py [COUNT [SEED [FIRST]]]` prints one line for each mutant that ends otherwise, and one JSON
document at the end; the same seed gives the same mutants. There is no network: the same box is marked in every volume.
The tests run 24.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset

import ctflow.dicom
from ctflow.core.errors import CtflowError, Unexpected
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.dicom.attributes import PARSE_ERRORS, texts, value_of
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import moment_of, series_number
from ctflow.pipeline import run, segmenter
from ctflow.pipeline import write as written
from ctflow.pipeline.case import Case
from ctflow.settings.run import Settings
from dicom_support import small_volume
from marking_support import MarkingSegmenter, marking_model
from tests_support import dciodvfy_errors

FINE = ("written", "rejected")
# A result has to refer to its source's UIDs, whoever may have given them out.
_ROOTS = ("Illegal root for UID uses non-existent ISO arc", "Invalid use of NEMA organization root")
HANG_S = 20
_TAKEN = (
    *(
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
        "StudyDate",
        "StudyTime",
        "StudyID",
        "AccessionNumber",
    ),
    *(
        "ReferringPhysicianName",
        "StudyInstanceUID",
        "StudyDescription",
        "IssuerOfPatientID",
        "PatientAge",
        "PatientSize",
    ),
    *("PatientWeight", "PatientIdentityRemoved", "TimezoneOffsetFromUTC", "ClinicalTrialSponsorName"),
)
_LONG = frozenset({"OB", "OW", "SQ", "UN", "UT", "UC", "UR", "OF", "OD", "OL", "SV", "UV", "OV"})
_PIXELS, _META = 0x7FE00000, 0x00030000
_SETTINGS = Settings(device="cpu", cache=None, report="none")

# What files hold under any text VR, and what none may: lengths, letters, controls, escapes, several values.
_BLANK = (
    b"",
    b" ",
    b"\0\0",
    b"a\tb",
    b"a\nb",
    b"\x7f\x01",
    b"\xff\xfe",
    b"\x1b",
    b"M\x81ller",
    b"\xe2\x82",
    b"\xef\xbf\xbd",
)
_LENGTHS = tuple(b"x" * count for count in (16, 17, 64, 65, 1025))
_LETTERS = tuple(
    text.encode(encoding)
    for text, encoding in (
        ("Müller^Jürgen", "latin-1"),
        ("Müller^Jürgen", "utf-8"),
        ("誠^小东", "gbk"),  # a second byte is a backslash
        ("ﾔﾏﾀﾞ^ﾀﾛｳ", "shift_jis"),
        ("山田^太郎", "iso2022_jp"),
        ("Люксембург", "iso8859_5"),
    )
)
_TEXTS = (*_BLANK, *_LENGTHS, *_LETTERS, *rb"\ A\B A\ ANON = ^^^^^^ a=b=c=d a^b^c^d^e^f".split())
_DATES = (
    *rb"19500231 20190229 20240229 00000000 99999999 1950 1950.01.01 19500101-19510101 19501301".split(),
    *rb"20260101\20260102 00010101".split(),
)
_TIMES = tuple(b"25 10:20:30 235960 1 1200 120000.1234567 120000. 12-13 noon 115959.999999".split())
_NUMBERS = (
    *rb"0 -1 +7 1e999 -1e-999 nan inf 1,5 0x10 1_000 99999999999 -2147483648 2147483647 21474836 .5 1. 2.5mm".split(),
    *rb"1.23456789012345678901 1\2 1\2\3 1\0\0\0\1\0 0\0 070Y 70Y YES NO F x +0100 +9999".split(),
)
_UIDS = (
    *rb"1.2.3 1..3 01.2 1.02.3 1.2.abc . 1.2\1.3 1.2.840.10008.5.1.4.1.1.2 1.2.840.10008.5.1.4.1.1.4 2.25.0".split(),
    *(b"1.2.3\0", b"1.2.3 ", b"1." + b"2" * 63),
)
_SETS = (
    *(
        b"ISO IR 100",
        b"\\ISO 2022 IR 87",
        b"ISO 2022 IR 6\\ISO 2022 IR 149",
        b"ISO 2022 IR 100",
        b"ISO_IR 100\\ISO_IR 144",
    ),
    *(b"ISO_IR 192\\ISO 2022 IR 87", b"ISO 2022 IR 13\\ISO 2022 IR 87", b"\\\\", b"\xff", b"ISO_IR 100", b"ISO_IR 192"),
    *(
        b"ISO_IR 144",
        b"ISO_IR 13",
        b"ISO_IR 6",
        b"ISO_IR 999",
        b"GB18030",
        b"GBK",
        b"UTF-8",
        b"unicode_escape",
        b"rot13",
    ),
)
_CODE = struct.pack("<HH2sH", 0x0008, 0x0100, b"SH", 20) + b"T" * 20
_ITEM, _END = struct.pack("<HH", 0xFFFE, 0xE000), struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
_ITEMS = (
    b"",
    *(_ITEM + struct.pack("<L", size) for size in (0, 1000)),
    _ITEM + b"\x1c\0\0\0" + _CODE,
    b"\xff" * 8,
    _END,
)
_BINARY = (b"", b"\0", b"\0\0", b"\1\0", b"\xff\xff", b"\0\0\0\0", b"\0\0\xc0\x7f\0\0\xf8\x7f", bytes(range(16)))


# -------------------------------------------------------------------------------------------------------- the mutants


def keywords_of(pattern: str = "*.py") -> tuple[str, ...]:
    """Every attribute of a data set that modules of `ctflow.dicom` name in any way; new ones are also fuzzed."""
    found: set[str] = set()
    for path in Path(ctflow.dicom.__file__).parent.rglob(pattern):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", getattr(node, "arg", None))
            if isinstance(name, str) and name.isidentifier():
                found.add(name)
    found |= {f"{kind}{what}" for kind in ("Acquisition", "Content", "Series") for what in ("Date", "Time")}
    tags = {name: tag_for_keyword(name) for name in found}
    return tuple(sorted(name for name, tag in tags.items() if tag is not None and _META <= tag < _PIXELS))


@dataclass(frozen=True)
class Change:
    """One attribute's new bytes in some slices."""

    keyword: str
    vr: str
    value: bytes
    slices: tuple[int, ...]


def forms_of(vr: str, keyword: str) -> tuple[bytes, ...]:
    """Values that an attribute of a VR may be found with."""
    if keyword == "SpecificCharacterSet":
        return _SETS
    if vr == "SQ":
        return _ITEMS
    if vr in {"OB", "OW", "US", "SS", "UL", "SL", "FL", "FD", "UV", "SV", "AT"}:
        return _BINARY
    own = {"DA": _DATES, "DT": _DATES, "TM": _TIMES, "UI": _UIDS, "DS": _NUMBERS, "IS": _NUMBERS, "AS": _NUMBERS}
    return own.get(vr, ()) * 3 + _TEXTS + (_NUMBERS if vr in {"CS", "SH"} else ())


def changes(number: int, seed: int, keywords: Sequence[tuple[str, ...]], depth: int) -> list[Change]:
    """What is changed in a mutant: one attribute or two of any of some lists, and in every third the character set."""
    rng = np.random.default_rng([seed, number])
    lists = [keywords[int(rng.integers(len(keywords)))] for _ in range(int(rng.integers(1, 3)))]
    chosen = [str(rng.choice(names)) for names in lists]
    if rng.random() < 0.3:
        chosen.append("SpecificCharacterSet")
    made = []
    for keyword in dict.fromkeys(chosen):
        vr = dictionary_VR(keyword).partition(" ")[0]
        forms = forms_of(vr, keyword)
        value = forms[int(rng.integers(len(forms)))] if rng.random() < 0.95 else rng.bytes(int(rng.integers(1, 80)))
        if rng.random() < 0.07:
            vr = ("LO", "UN", "OB", "DS", "IS", "CS", "UI", "UT")[int(rng.integers(8))]
        some = (tuple(range(depth)), tuple(range(depth)), tuple(range(depth)), (0,), (int(rng.integers(depth)),))
        made.append(Change(keyword, vr, value, some[int(rng.integers(len(some)))]))
    return made


@cache
def _elements(content: bytes) -> dict[int, bytes]:
    """Each top-level element of a file of Explicit VR Little Endian that holds no sequence of undefined length."""
    found, at = {}, 132
    while at < len(content):
        group, number, vr = struct.unpack_from("<HH2s", content, at)
        is_long = vr.decode() in _LONG
        (length,) = struct.unpack_from("<L" if is_long else "<H", content, at + (8 if is_long else 6))
        end = at + (12 if is_long else 8) + length
        found[group << 16 | number] = content[at:end]
        at = end
    return found


def changed(content: bytes, made: Sequence[Change]) -> bytes:
    """A file with other values of some attributes, or with ones that it did not have."""
    elements = dict(_elements(content))
    for change in made:
        tag = tag_for_keyword(change.keyword)
        value = change.value + b"\0"[: len(change.value) % 2]
        length = struct.pack("<HL", 0, len(value)) if change.vr in _LONG else struct.pack("<H", len(value))
        elements[tag] = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + change.vr.encode() + length + value
    return content[:132] + b"".join(elements[tag] for tag in sorted(elements))


# ------------------------------------------------------------------------------------------------------------- oracle


def _header(path: Path) -> Dataset:
    """A header as pydicom reads it; an empty one where it does not."""
    try:
        return pydicom.dcmread(path, stop_before_pixels=True)
    except PARSE_ERRORS:
        return Dataset()


def verdict_of(folder: Path, output: Path, settings: Settings, source: Dataset) -> tuple[str, bool]:
    """What became of a mutant: one of `FINE`, or what is wrong; and whether a warning names an attribute."""
    model = marking_model()
    try:
        report = run.run_folder(folder, output, model, settings)
    except Unexpected as error:
        return f"unexpected: {error}", False
    except CtflowError:
        return "rejected", False
    warned = False
    for case in report.cases:
        if isinstance(case.error, Unexpected):
            return f"unexpected: {case.error}", False
        if case.error is not None:
            continue
        warned = warned or any("do not conform" in warning for warning in case.warnings)
        for name in sorted(path.name for path in case.folder.glob("*.dcm")):
            errors = _errors_of(case.folder / name)
            if errors:
                return f"{name}: {errors[0]}", False
            flaw = _flaw(pydicom.dcmread(case.folder / name), source, " ".join(case.warnings))
            if flaw:
                return f"{name}: {flaw}", False
    return ("written" if any(case.error is None for case in report.cases) else "rejected"), warned


@cache
def _known_errors(_content: bytes, path: Path) -> tuple[str, ...]:
    return tuple(error for error in dciodvfy_errors(path) if not any(each in error for each in _ROOTS))


def _errors_of(path: Path) -> tuple[str, ...]:
    """What dciodvfy says of a file; asked once where changes left it as it was."""
    return _known_errors(hashlib.sha256(path.read_bytes()).digest(), path)


def _text_of(value: object) -> str:
    """A value as text; a size of 0 is also a value."""
    return "" if value is None else str(value).strip(" \0")


def _flaw(written: Dataset, source: Dataset, warnings_of_case: str) -> str | None:
    """What is wrong with attributes of patient and study, next to the first image's, if anything is."""
    for keyword in _TAKEN:
        value, its = (_text_of(each) for each in (written.get(keyword), value_of(source, keyword)))
        if value and value != its:
            return f"{keyword} is not the source's"
        if any(texts(source, keyword)) and not value and keyword not in warnings_of_case:
            return f"{keyword} is left out and no warning names it"
    return None


# ------------------------------------------------------------------------------------------------------------- driver


def _hangs(*_: object) -> None:
    raise TimeoutError


def fuzz(count: int, seed: int, root: Path, first: int = 0, say: Callable[[str], object] = str) -> dict[str, object]:
    """Try mutants, one after another; of five the first also has its picture, the next contours, the next a PDF.

    Returns:
        Counts of verdicts, and what `say` was told of each that is not fine.
    """
    whole = [path.read_bytes() for path in write_ct_series(small_volume(), root / "base")]
    # What is taken over as often as all the others, which are many more.
    keywords, started = (keywords_of(), keywords_of("source.py")), time.monotonic()
    verdicts: Counter[str] = Counter()
    bad: list[str] = []
    put_back = _stand_in()
    try:
        for number in range(first, first + count):
            made = changes(number, seed, keywords, len(whole))
            also = {name: number % 5 == place for place, name in enumerate(("secondary_capture", "rtstruct", "pdf"))}
            settings = replace(_SETTINGS, **also)
            verdict, warned = _try(made, whole, root / "in", root / "out", settings)
            verdicts[verdict if verdict in FINE else "bad"] += 1
            verdicts["warned"] += warned
            if verdict not in FINE:
                what = ", ".join(f"{each.keyword} {each.vr} {each.value[:70]!r} in {len(each.slices)}" for each in made)
                bad.append(f"{number}: {what}: {verdict}")
                say(bad[-1])
    finally:
        put_back()
    seconds = round(time.monotonic() - started, 1)
    return {"count": count, "seed": seed, "keywords": len(keywords[0]), "seconds": seconds, **verdicts, "bad_ones": bad}


def _stand_in() -> Callable[[], None]:
    """Run without a network, without messages and without endless waiting; gives what undoes that."""
    real, write, level = segmenter.Segmenter, written.write_case, logging.root.manager.disable
    handler = signal.signal(signal.SIGVTALRM, _hangs)
    fsync, os.fsync = os.fsync, lambda _descriptor: None
    segmenter.Segmenter, written.write_case = MarkingSegmenter, _written_once(write)
    logging.disable(logging.CRITICAL)

    def put_back() -> None:
        segmenter.Segmenter, written.write_case, os.fsync = real, write, fsync
        logging.disable(level)
        signal.signal(signal.SIGVTALRM, handler)

    return put_back


def _written_once(write: Callable[..., Case]) -> Callable[..., Case]:
    """Write nothing again that follows from the same: objects are made of what was taken over, and of nothing else."""
    known: dict[bytes, Case] = {}

    def write_case(case: Case, model: Model, settings: Settings, output: Path, progress: Progress = silent) -> Case:
        if case.error is not None:
            return case
        header = case.prepared.header
        facts = (*map(str, case.prepared.cleaned), moment_of(header), series_number(header, 1), settings)
        volume = case.loaded.volume
        facts = (*facts, case.prepared.measures, volume.geometry.affine_mm.tobytes(), volume.array.tobytes())
        key = hashlib.sha256(repr(facts).encode()).digest()
        if key not in known:
            known[key] = write(case, model, settings, output, progress)
        return replace(known[key], candidate=case.candidate, warnings=case.warnings)

    return write_case


def _try(made: list[Change], whole: list[bytes], folder: Path, output: Path, settings: Settings) -> tuple[str, bool]:
    for each in (folder, output):
        shutil.rmtree(each, ignore_errors=True)
    folder.mkdir()
    for d, content in enumerate(whole):
        own = [change for change in made if d in change.slices]
        (folder / f"{d:05d}.dcm").write_bytes(changed(content, own))
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S)  # of this process alone, however busy the machine is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's, of values; ctflow's own are in the result
            return verdict_of(folder, output, settings, _header(folder / "00000.dcm"))
    except Exception as error:
        return f"crash: {type(error).__name__}", False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


if __name__ == "__main__":
    words = [*sys.argv[1:4], *["5000", "7", "0"][len(sys.argv[1:4]) :]]
    count, seed, first = (int(word) for word in words)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(count, seed, Path(folder), first, lambda line: print(line, flush=True))  # noqa: T201
    bad = result.pop("bad_ones")
    sys.stdout.write(json.dumps(result) + "\n")
    sys.exit(bool(bad))
