"""Are all slices of a series one patient's?"""

from __future__ import annotations

import unicodedata
from collections.abc import Hashable, Sequence

from ctflow.dicom.attributes import texts
from ctflow.dicom.read.geometry.agreement import odd_ones
from ctflow.dicom.read.scan import Instance

_GROUPS = 3  # of a name: alphabetic, ideographic, phonetic


def differing_patients(instances: Sequence[Instance]) -> str | None:
    """What tells several patients apart: PatientID and its issuer; where no slice has an ID, name and date of birth.

    Args:
        instances: The slices of a series.

    Returns:
        The attribute and the names of the slices that deviate, and never a value; None where all are one patient's. An
        empty value differs from one that is there; an issuer is compared where it is named, as archives add it.

    Source: DICOM PS3.3 C.2.2 (an ID is unique within its issuer), PS3.5 6.2 and 6.2.1. Names are compared as decoded,
    whatever their character sets: without case, blanks, delimiters, forms and widths of letters; and by those of their
    groups that both have.
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
    """Two hospitals may give two patients the same ID."""
    issuers = [tuple(filter(None, texts(instance.header, "IssuerOfPatientID"))) for instance in instances]
    having = [place for place, issuer in enumerate(issuers) if issuer]
    return _deviation("IssuerOfPatientID", [instances[place] for place in having], [issuers[place] for place in having])


def _name(values: Sequence[str]) -> tuple[str, ...]:
    """A name's groups, each as its words."""
    groups = unicodedata.normalize("NFKC", "\\".join(values)).casefold().split("=")
    words = [" ".join(group.replace("^", " ").split()) for group in groups]
    return *words[: _GROUPS - 1], "=".join(words[_GROUPS - 1 :]), *[""] * (_GROUPS - 1 - len(words))


def _deviation(keyword: str, instances: Sequence[Instance], values: Sequence[Hashable]) -> str | None:
    return f"{keyword} of {odd_ones(instances, values)}" if len(set(values)) > 1 else None
