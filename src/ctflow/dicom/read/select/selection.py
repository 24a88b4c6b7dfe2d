"""Headers to a decision: which series are to be run, and why each other is not. Pure; never raises for a bad series."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydicom.uid import UID

from ctflow.compat.pydicom import lenient
from ctflow.core.entry_point import unexpected
from ctflow.core.errors import NoUsableSeries, Unexpected
from ctflow.core.volume import digest_of_uid
from ctflow.dicom.attributes import integer, numbers, text, texts
from ctflow.dicom.body_parts import known_value, listed_parts, suits
from ctflow.dicom.read.geometry.agreement import listed
from ctflow.dicom.read.scan import Instance, Scan
from ctflow.dicom.read.select.description import MODALITIES, describe, known_term, slice_spacing_mm
from ctflow.dicom.read.select.orphans import continues
from ctflow.dicom.read.select.patients import differing_patients
from ctflow.dicom.uids import CT_IMAGE_STORAGE, ENHANCED_CT_STORAGE, malformed_uids

LEAST_SLICES = 16
LARGEST_SPACING_MM = 5.0
_LEAST_LOCALIZERS = 3  # fewer are views from front and side
_MOST_SHOWN = 3
_STRAY = "it continues series {}, of which its SeriesInstanceUID may cut it off"
# Of ImageType: what scanners save in the place of a slice (protocol and dose pages).
_SCREEN_WORDS = frozenset({"SCREEN", "PROT", "PROTOCOL", "DOSE"})
_IMAGE_CLASSES = ("Image Storage", "Image Storage - For Presentation", "Image Storage - For Processing")
_DERIVED_WORDS = frozenset({"MIP", "MINIP", "REFORMATTED", "PROJECTION"})

Verdict = tuple[str, str]  # rule, reason


@dataclass(frozen=True, eq=False)
class Series:
    """The slices that would be stacked.

    Attributes:
        uid: SeriesInstanceUID, as the files say it.
        digest: Its name in messages.
        study_uid: StudyInstanceUID.
        instances: The slices, in the scan's order.
        dropped: Sentences on images of the series that were left out.
    """

    uid: str
    digest: str
    study_uid: str
    instances: tuple[Instance, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Candidate:
    """One series and the rule that decided.

    Attributes:
        series: The series.
        chosen: Whether it is to be run.
        rule: Short stable name of the rule.
        reason: The same as a sentence.
        forced: Chosen although a fitness rule speaks against it.
        description: Technical facts for `ctflow inspect`; no patient data and no free text.
    """

    series: Series
    chosen: bool
    rule: str
    reason: str
    forced: bool
    description: Mapping[str, object]


@dataclass(frozen=True, eq=False)
class Selection:
    """Every series of a scan with its verdict, by UID."""

    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        """Those to be run."""
        return tuple(candidate for candidate in self.candidates if candidate.chosen)

    @property
    def strays(self) -> tuple[Candidate, ...]:
        """Those set aside that seem to be the end of one that is run."""
        return tuple(candidate for candidate in self.candidates if candidate.rule == "stray")

    @property
    def failed(self) -> tuple[Candidate, ...]:
        """Those that a fault of ctflow kept from being judged."""
        return tuple(candidate for candidate in self.candidates if candidate.rule == Unexpected.reason)


@lenient()
def select_series(
    scan: Scan,
    *,
    series_uid: str | None = None,
    pick: Literal["all", "best"] = "all",
    force: bool = False,
    body_parts: Collection[str] = (),
) -> Selection:
    """Decide for every series of a scan.

    Args:
        scan: The headers.
        series_uid: Only this series may be chosen.
        pick: "all" fit series, or the "best" of each study and frame of reference: the one whose slice spacing is
            smallest but not below 1 mm, then with most slices, then with the lowest series number.
        force: Choose series that fitness rules (not possibility rules) speak against.
        body_parts: BodyPartExamined values that suit the model; empty accepts all.

    Returns:
        The verdicts.
    """
    candidates = [_judge_safely(series, series_uid, force, body_parts) for series in _series_of(scan)]
    if pick == "best":
        candidates = _keep_best(candidates)
    if series_uid is None:
        candidates = _name_strays(candidates)
    return Selection(tuple(candidates))


def require_chosen(selection: Selection, scan: Scan) -> None:
    """Raise `NoUsableSeries` with every reason when nothing is chosen; `Unexpected` where that is a fault of ctflow."""
    if selection.chosen:
        return
    lines = [f"series {c.series.digest}: {c.reason} ({c.rule})" for c in selection.candidates]
    lines += [f"file {file.name}: {file.reason}" for file in scan.unreadable]
    most = 20
    if len(lines) > most:
        lines = [*lines[:most], f"and {len(lines) - most} more; `ctflow inspect` lists all"]
    if selection.failed:
        raise Unexpected(f"no series can be run: {'; '.join(lines)}")
    found = "; ".join(lines) if lines else f"no DICOM file among {scan.ignored} files (archives are not opened)"
    raise NoUsableSeries(f"no series can be run: {found}")


def _series_of(scan: Scan) -> list[Series]:
    groups: dict[tuple[str, str], list[Instance]] = {}
    for instance in scan.instances:
        key = (text(instance.header, "StudyInstanceUID"), text(instance.header, "SeriesInstanceUID"))
        groups.setdefault(key, []).append(instance)
    return [
        _slices_alone(Series(uid, digest_of_uid(uid or study), study, tuple(instances)))
        for (study, uid), instances in sorted(groups.items())
    ]


def _slices_alone(series: Series) -> Series:
    """The series without localizers and without objects that are no slices: secondary captures, reports and so on."""
    slices: list[Instance] = []
    others: list[Instance] = []
    for instance in series.instances:
        (others if _is_other_object(instance) else slices).append(instance)
    if not slices:
        return series
    kept = tuple(instance for instance in slices if not _is_localizer(instance))
    localizers = len(slices) - len(kept)
    dropped = []
    if kept and localizers:
        dropped.append(f"{localizers} localizer image{'s' * (localizers > 1)} of the series left out")
    if others:
        names = sorted({_class_name(text(instance.header, "SOPClassUID")) for instance in others})
        what = "1 object that is no slice" if len(others) == 1 else f"{len(others)} objects that are no slices"
        dropped.append(f"{what} left out of the series: {', '.join(names)[:120]}")
    return replace(series, instances=kept or tuple(slices), dropped=tuple(dropped))


def _is_other_object(instance: Instance) -> bool:
    """Whether it is no slice, of whatever modality: a picture of the screen, a report, a plan, a private object."""
    header = instance.header
    uid = UID(text(header, "SOPClassUID"))
    has_place = numbers(header, "ImagePositionPatient", 3) is not None
    if uid == CT_IMAGE_STORAGE:
        return not has_place and bool(_image_words(instance) & _SCREEN_WORDS)
    if uid.is_private:
        return not instance.has_pixels
    if uid.type != "SOP Class":  # damaged, or newer than pydicom's tables: it may be a slice
        return bool(uid) and not (instance.has_pixels and has_place)
    return "Secondary Capture" in uid.name or not uid.name.endswith(_IMAGE_CLASSES)


def _image_words(instance: Instance) -> set[str]:
    return {word for value in texts(instance.header, "ImageType") for word in re.split(r"[^A-Z0-9]+", value.upper())}


def _is_localizer(instance: Instance) -> bool:
    return "LOCALIZER" in _image_words(instance)


def _judge_safely(series: Series, series_uid: str | None, force: bool, body_parts: Collection[str]) -> Candidate:
    try:
        return _judge(series, series_uid, force, body_parts)
    except Exception as error:  # noqa: BLE001  # the others of the folder must be judged
        failure = unexpected(error, f"series {series.digest}")
        return Candidate(series, False, failure.reason, str(failure), False, {})


def _judge(series: Series, series_uid: str | None, force: bool, body_parts: Collection[str]) -> Candidate:
    description = describe(series.instances)

    def verdict(rule: str, reason: str, *, chosen: bool = False, forced: bool = False) -> Candidate:
        return Candidate(series, chosen, rule, reason, forced, description)

    if series_uid is not None and series.uid != series_uid:
        return verdict("not-asked-for", "another series was asked for")
    impossible = _first_verdict(_IMPOSSIBLE, series)
    if impossible:
        return verdict(*impossible)
    unfit = _first_verdict(_UNFIT, series) or _unfit_body_part(series, body_parts)
    if unfit and not force:
        return verdict(unfit[0], f"{unfit[1]}; --force runs it")
    if unfit:
        return verdict(unfit[0], f"run by --force although {unfit[1]}", chosen=True, forced=True)
    return verdict("chosen", "fit to be run", chosen=True)


def _first_verdict(rules: Sequence[Callable[[Series], Verdict | None]], series: Series) -> Verdict | None:
    return next((found for found in (rule(series) for rule in rules) if found), None)


# ------------------------------------------------------------------- possibility: nothing forces a series past these


def _no_uid(series: Series) -> Verdict | None:
    lacking = [
        keyword
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
        if not all(text(instance.header, keyword) for instance in series.instances)
    ]
    return (
        ("no-uid", f"{', '.join(lacking)} is empty or absent: have the sender repair the series") if lacking else None
    )


def _senseless_uid(series: Series) -> Verdict | None:
    senseless, _ = malformed_uids(instance.header for instance in series.instances)
    reason = f"{', '.join(senseless)} is no UID, so that nothing can refer to it: have the sender repair the series"
    return ("malformed-uid", reason) if senseless else None


def _not_ct(series: Series) -> Verdict | None:
    uids = [text(instance.header, "SOPClassUID") for instance in series.instances]
    classes = set(uids)
    if classes & set(ENHANCED_CT_STORAGE):
        return "enhanced", "Enhanced CT is not supported yet: send the series as single-frame CT images"
    if classes != {CT_IMAGE_STORAGE}:
        kinds = ", ".join(sorted({_class_name(uid) for uid in classes - {CT_IMAGE_STORAGE}}))[:120]
        if CT_IMAGE_STORAGE not in classes:
            return "modality", f"not CT images but {kinds}"
        odd = listed([each.name for each, uid in zip(series.instances, uids, strict=True) if uid != CT_IMAGE_STORAGE])
        return "modality", f"not CT images alone (SOPClassUID of {odd} is {kinds}): have the sender repair the series"
    modalities = {text(instance.header, "Modality") for instance in series.instances}
    if "" in modalities:
        return "modality", "Modality is empty or absent, where CT is meant: have the sender repair the series"
    if modalities != {"CT"}:
        names = sorted({known_term(MODALITIES, name) or "no term of DICOM's" for name in modalities - {"CT"}})
        return "modality", f"CT images whose Modality is {', '.join(names)}: have the sender repair the series"
    return None


def _class_name(uid: str) -> str:
    """The class as DICOM's tables name it; what they do not may be anything, and is not repeated."""
    if UID(uid).is_private:
        return "a private class"
    return UID(uid).name if UID(uid).type else "an unknown class"


def _several_patients(series: Series) -> Verdict | None:
    odd = differing_patients(series.instances)
    reason = f"slices of several patients share this SeriesInstanceUID ({odd}): separate them"
    return ("mixed-patients", reason) if odd else None


def _no_frame_of_reference(series: Series) -> Verdict | None:
    if all(text(instance.header, "FrameOfReferenceUID") for instance in series.instances):
        return None
    # One made up here would be no source's: viewers would not lay the SEG over the CT.
    reason = "FrameOfReferenceUID is empty or absent, and a SEG needs it: have the sender repair the series"
    return "no-frame-of-reference", reason


def _no_image(series: Series) -> Verdict | None:
    if not all(instance.has_pixels for instance in series.instances):
        return "no-pixels", "slices without pixel data"
    if any((integer(instance.header, "NumberOfFrames") or 1) != 1 for instance in series.instances):
        return "multi-frame", "multi-frame CT images are not supported: send single-frame CT images"
    samples = {text(instance.header, "SamplesPerPixel") for instance in series.instances}
    if "" in samples:
        return "no-pixels", "SamplesPerPixel is empty or absent: have the sender repair the series"
    if samples != {"1"}:
        return "colour", "colour images carry no Hounsfield units"
    return None


def _no_extent(series: Series) -> Verdict | None:
    """One slice, or localizers that are each a picture by itself, make no volume."""
    count = len(series.instances)
    directions = {numbers(instance.header, "ImageOrientationPatient", 6) for instance in series.instances}
    if _is_localizer(series.instances[0]) and (count < _LEAST_LOCALIZERS or len(directions) > 1):
        return "localizer", f"it holds only localizer images ({count}), which make no volume"
    return ("too-few-slices", "one slice makes no volume") if count == 1 else None


_IMPOSSIBLE = (
    _no_uid,
    _senseless_uid,
    _not_ct,
    _several_patients,
    _no_image,
    _no_frame_of_reference,
    _no_extent,
)


# ------------------------------------------------------------------------------------------- fitness: --force may pass


def _untidy_uid(series: Series) -> Verdict | None:
    _, untidy = malformed_uids(instance.header for instance in series.instances)
    reason = f"a component of its {', '.join(untidy)} is empty or begins with 0, which some readers reject"
    return ("malformed-uid", reason) if untidy else None


def _localizers_only(series: Series) -> Verdict | None:
    return ("localizer", "it holds only localizer images") if _is_localizer(series.instances[0]) else None


def _derived(series: Series) -> Verdict | None:
    for instance in series.instances:
        words = _image_words(instance)
        if "DERIVED" in words and words & _DERIVED_WORDS:
            return "derived", f"its images are derived ({', '.join(sorted(words & _DERIVED_WORDS))})"
    return None


def _too_few(series: Series) -> Verdict | None:
    count = len(series.instances)
    return ("too-few-slices", f"{count} slices are fewer than {LEAST_SLICES}") if count < LEAST_SLICES else None


def _too_thick(series: Series) -> Verdict | None:
    spacing = slice_spacing_mm(series.instances)
    if spacing is not None and spacing > LARGEST_SPACING_MM * 1.001:
        return "too-thick", f"slices every {spacing:.4g} mm are more than {LARGEST_SPACING_MM:g} mm apart"
    return None


_UNFIT = (_untidy_uid, _localizers_only, _derived, _too_few, _too_thick)


def _unfit_body_part(series: Series, body_parts: Collection[str]) -> Verdict | None:
    found = {text(instance.header, "BodyPartExamined") for instance in series.instances} - {""}
    unfit = sorted(value for value in found if not suits(value, body_parts)) if body_parts else []
    if not unfit:
        return None
    # What is no known term is free text of the sender's, and so is not repeated.
    shown = ", ".join(sorted({known_value(value) or "no known term" for value in unfit})[:_MOST_SHOWN])
    return "body-part", f"its BodyPartExamined ({shown}) matches none of the bundle's ({listed_parts(body_parts)})"


# ------------------------------------------------------------------------------------------------------------- stray


def _name_strays(candidates: Sequence[Candidate]) -> list[Candidate]:
    """A series set aside that continues a chosen one may be its end: nothing else would tell that it was cut short."""
    result = list(candidates)
    for place, few in enumerate(candidates):
        if few.chosen or len(few.series.instances) >= LEAST_SLICES:
            continue
        whose = (
            at for at, one in enumerate(result) if one.chosen and continues(few.series.instances, one.series.instances)
        )
        at = next(whose, None)
        if at is not None:
            result[place], result[at] = _parted(few, result[at])
    return result


def _parted(few: Candidate, rest: Candidate) -> tuple[Candidate, Candidate]:
    """A stray and the series that it may be of; each says so of the other."""
    count = len(few.series.instances)
    slices = "a slice" if count == 1 else f"{count} slices"
    dropped = f"{slices} of series {few.series.digest} may be its own: there its next ones would lie"
    series = replace(rest.series, dropped=(*rest.series.dropped, dropped))
    reason = f"{_STRAY.format(rest.series.digest)}: {few.reason}"
    return replace(few, rule="stray", reason=reason), replace(rest, series=series)


# -------------------------------------------------------------------------------------------------------------- best


def _keep_best(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in candidates:
        key = _study_and_frame(candidate)
        if candidate.chosen and (key not in best or _rank(candidate) < _rank(best[key])):
            best[key] = candidate
    reason = "another series of its study and frame of reference suits better; --pick all runs both"
    return [
        replace(candidate, chosen=False, forced=False, rule="not-best", reason=reason)
        if candidate.chosen and best[_study_and_frame(candidate)] is not candidate
        else candidate
        for candidate in candidates
    ]


def _study_and_frame(candidate: Candidate) -> tuple[str, str]:
    return candidate.series.study_uid, text(candidate.series.instances[0].header, "FrameOfReferenceUID")


def _rank(candidate: Candidate) -> tuple[bool, float, int, int, str]:
    """Lower is better; below 1 mm thinner slices only add noise."""
    spacing = slice_spacing_mm(candidate.series.instances) or LARGEST_SPACING_MM
    series_number = integer(candidate.series.instances[0].header, "SeriesNumber")
    return (
        candidate.forced,
        max(spacing, 1.0),
        -len(candidate.series.instances),
        series_number if series_number is not None else 2**31,
        candidate.series.uid,
    )
