"""Why a series cannot or should not be run: each rule checks one series and gives reason and message. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Hashable, Sequence

from ctflow.core.errors import counted
from ctflow.dicom.attributes import integer, numbers, text, texts
from ctflow.dicom.body_parts import known_value, listed_parts, suits
from ctflow.dicom.read.geometry.agreement import listed, odd_ones
from ctflow.dicom.read.scan import Instance
from ctflow.dicom.read.select.description import MODALITIES, known_term, slice_spacing_mm
from ctflow.dicom.read.select.series import Objection, Series, class_name, image_words, is_localizer
from ctflow.dicom.uids import CT_IMAGE_STORAGE, ENHANCED_CT_STORAGE, malformed_uids

LEAST_SLICES = 16
LARGEST_SPACING_MM = 5.0
_LEAST_LOCALIZERS = 3  # fewer are frontal and lateral views
_MOST_SHOWN = 3
_DERIVED_WORDS = frozenset({"MIP", "MINIP", "REFORMATTED", "PROJECTION"})
_GROUPS = 3  # of a person name: alphabetic, ideographic, phonetic


# ------------------------------------------------------------------------- possibility: --force does not override these
def _no_uid(series: Series) -> Objection | None:
    lacking = [
        keyword
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
        if not all(text(instance.header, keyword) for instance in series.instances)
    ]
    return (
        ("no-uid", f"{', '.join(lacking)} is empty or absent: have the sender repair the series") if lacking else None
    )


def _senseless_uid(series: Series) -> Objection | None:
    invalid, _ = malformed_uids(instance.header for instance in series.instances)
    message = f"{', '.join(invalid)} is not a valid UID, so nothing can refer to it: have the sender repair the series"
    return ("malformed-uid", message) if invalid else None


def _enhanced(series: Series) -> Objection | None:
    if series.flaw:
        return "enhanced", series.flaw
    classes = {text(instance.header, "SOPClassUID") for instance in series.instances}
    if classes <= set(ENHANCED_CT_STORAGE) or not classes & set(ENHANCED_CT_STORAGE):
        return None
    return "enhanced", "Enhanced CT shares the series with other images: have the sender separate them"


def _not_ct(series: Series) -> Objection | None:
    uids = [text(instance.header, "SOPClassUID") for instance in series.instances]
    classes = set(uids)
    if not classes <= {CT_IMAGE_STORAGE, *ENHANCED_CT_STORAGE}:
        kinds = ", ".join(sorted({class_name(uid) for uid in classes - {CT_IMAGE_STORAGE}}))[:120]
        if CT_IMAGE_STORAGE not in classes:
            return "modality", f"not CT images, but {kinds}"
        odd = listed([each.name for each, uid in zip(series.instances, uids, strict=True) if uid != CT_IMAGE_STORAGE])
        return "modality", f"not only CT images (SOPClassUID of {odd} is {kinds}): have the sender repair the series"
    modalities = {text(instance.header, "Modality") for instance in series.instances}
    if "" in modalities:
        return "modality", "Modality is empty or absent instead of CT: have the sender repair the series"
    if modalities != {"CT"}:
        names = sorted({known_term(MODALITIES, name) or "not a DICOM term" for name in modalities - {"CT"}})
        return "modality", f"CT images whose Modality is {', '.join(names)}: have the sender repair the series"
    return None


def _several_patients(series: Series) -> Objection | None:
    odd = differing_patients(series.instances)
    message = f"slices of several patients share this SeriesInstanceUID ({odd}): separate them"
    return ("mixed-patients", message) if odd else None


def _no_frame_of_reference(series: Series) -> Objection | None:
    if all(text(instance.header, "FrameOfReferenceUID") for instance in series.instances):
        return None
    # An invented UID would match no source: viewers would not overlay the SEG on the CT.
    message = "FrameOfReferenceUID is empty or absent, and a SEG needs it: have the sender repair the series"
    return "no-frame-of-reference", message


def _no_image(series: Series) -> Objection | None:
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


def _no_extent(series: Series) -> Objection | None:
    """A single slice, or localizers, each a separate picture, form no volume."""
    count = len(series.instances)
    directions = {numbers(instance.header, "ImageOrientationPatient", 6) for instance in series.instances}
    if is_localizer(series.instances[0]) and (count < _LEAST_LOCALIZERS or len(directions) > 1):
        return "localizer", f"it contains only localizer images ({count}), which form no volume"
    return ("too-few-slices", "one slice forms no volume") if count == 1 else None


IMPOSSIBLE = (
    _no_uid,
    _senseless_uid,
    _enhanced,
    _not_ct,
    _several_patients,
    _no_image,
    _no_frame_of_reference,
    _no_extent,
)


# ------------------------------------------------------------------------------ eligibility: --force may override these


def _untidy_uid(series: Series) -> Objection | None:
    _, untidy = malformed_uids(instance.header for instance in series.instances)
    message = f"a component of its {', '.join(untidy)} is empty or begins with 0, which some readers reject"
    return ("malformed-uid", message) if untidy else None


def _localizers_only(series: Series) -> Objection | None:
    return ("localizer", "it contains only localizer images") if is_localizer(series.instances[0]) else None


def _derived(series: Series) -> Objection | None:
    for instance in series.instances:
        words = image_words(instance)
        if "DERIVED" in words and words & _DERIVED_WORDS:
            return "derived", f"its images are derived ({', '.join(sorted(words & _DERIVED_WORDS))})"
    return None


def _too_few(series: Series) -> Objection | None:
    count = len(series.instances)
    said = f"{counted(count, 'slice is', 'slices are')} fewer than {LEAST_SLICES}"
    return ("too-few-slices", said) if count < LEAST_SLICES else None


def _too_thick(series: Series) -> Objection | None:
    spacing = slice_spacing_mm(series.instances)
    if spacing is not None and spacing > LARGEST_SPACING_MM * 1.001:
        return "too-thick", f"slices are {spacing:.4g} mm apart, more than {LARGEST_SPACING_MM:g} mm"
    return None


OVERRIDABLE = (_untidy_uid, _localizers_only, _derived, _too_few, _too_thick)


def other_body_part(series: Series, body_parts: Collection[str]) -> Objection | None:
    """Whether none of its body parts suits the model."""
    found = {text(instance.header, "BodyPartExamined") for instance in series.instances} - {""}
    others = sorted(value for value in found if not suits(value, body_parts)) if body_parts else []
    if not others:
        return None
    # An unknown term is free text from the sender, so it is not repeated.
    shown = ", ".join(sorted({known_value(value) or "an unknown term" for value in others})[:_MOST_SHOWN])
    return "body-part", f"its BodyPartExamined ({shown}) matches none of the bundle's ({listed_parts(body_parts)})"


def differing_patients(instances: Sequence[Instance]) -> str | None:
    """Find several patients by PatientID and its issuer; where no slice has an ID, by name and date of birth.

    Args:
        instances: The slices of a series.

    Returns:
        The attribute and the names of the deviating slices, never a value; None if all are one patient's. An empty
        value differs from a present one; an issuer is compared only where present, as archives add it.

    Source: DICOM PS3.3 C.2.2 (an ID is unique within its issuer), PS3.5 6.2 and 6.2.1. Names are compared as decoded,
    whatever their character sets: ignoring case, blanks, delimiters, forms and widths of letters; and only by the
    component groups that both have.
    """
    ids = [tuple(filter(None, texts(instance.header, "PatientID"))) for instance in instances]
    if any(ids):
        return _deviation("PatientID", instances, ids) or _differing_issuers(instances)
    names = [_name(texts(instance.header, "PatientName")) for instance in instances]
    births = ["\\".join(texts(instance.header, "PatientBirthDate")).replace(".", "") for instance in instances]
    found = _deviation("PatientName", instances, [any(name) for name in names])
    for group in range(_GROUPS):
        having = [place for place, name in enumerate(names) if name[group]]
        found = found or _deviation(
            "PatientName", [instances[place] for place in having], [names[place][group] for place in having]
        )
    return found or _deviation("PatientBirthDate", instances, births)


def _differing_issuers(instances: Sequence[Instance]) -> str | None:
    """Compare issuers: two hospitals may give two patients the same ID."""
    issuers = [tuple(filter(None, texts(instance.header, "IssuerOfPatientID"))) for instance in instances]
    having = [place for place, issuer in enumerate(issuers) if issuer]
    return _deviation("IssuerOfPatientID", [instances[place] for place in having], [issuers[place] for place in having])


def _name(values: Sequence[str]) -> tuple[str, ...]:
    """A name's groups, each as words."""
    groups = unicodedata.normalize("NFKC", "\\".join(values)).casefold().split("=")
    words = [" ".join(group.replace("^", " ").split()) for group in groups]
    return *words[: _GROUPS - 1], "=".join(words[_GROUPS - 1 :]), *[""] * (_GROUPS - 1 - len(words))


def _deviation(keyword: str, instances: Sequence[Instance], values: Sequence[Hashable]) -> str | None:
    return f"{keyword} of {odd_ones(instances, values)}" if len(set(values)) > 1 else None
