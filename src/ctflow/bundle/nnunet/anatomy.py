"""What a label's name means: SNOMED CT codes of the usual anatomy and findings, from anatomy.csv beside this module."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from ctflow.core.model import Code

SCHEME = "SCT"
# Segmentation property categories, DICOM PS3.16 CID 7150.
_CATEGORIES: Mapping[str, Code] = {
    "structure": Code("91723000", SCHEME, "Anatomical Structure"),
    "tissue": Code("85756007", SCHEME, "Tissue"),
    "abnormal": Code("49755003", SCHEME, "Morphologically Abnormal Structure"),
    "object": Code("260787004", SCHEME, "Physical object"),
}
# Laterality, DICOM PS3.16 CID 244.
_SIDES: Mapping[str, Code] = {"left": Code("7771000", SCHEME, "Left"), "right": Code("24028007", SCHEME, "Right")}
_SHORT_SIDES = {"l": "left", "lt": "left", "r": "right", "rt": "right"}
_SPELLINGS = {
    "tumour": "tumor", "tumours": "tumor", "tumors": "tumor", "nodules": "nodule", "cysts": "cyst", "lesions": "lesion",
    "metastases": "metastasis", "masses": "mass", "lungs": "lung", "kidneys": "kidney", "haemorrhage": "hemorrhage",
    "oedema": "edema", "vertebra": "vertebrae", "renal": "kidney", "hepatic": "liver", "pancreatic": "pancreas",
    "glands": "gland",
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """The codes of a structure.

    Attributes:
        category: Segmented property category.
        type: Segmented property type.
        side: Left or right, where the name says so.
        region: Where a finding is, where the name says so.
    """

    category: Code
    type: Code
    side: Code | None
    region: Code | None


def meaning_of(name: str) -> Meaning | None:
    """The codes for a label's name such as "kidney_left", "Left Kidney" or "lung tumour"; None if it is not known."""
    words = [_SPELLINGS.get(word, word) for word in re.sub(r"[\W_]+", " ", name.lower()).split()]
    sides = [word for word in words if word in _SIDES]
    rest = [word for word in words if word not in _SIDES]
    if not sides:  # a single letter is a side only at either end: "kidney_L", "R lung"
        for position in (0, -1):
            if len(words) > 1 and words[position] in _SHORT_SIDES:
                sides = [_SHORT_SIDES[words[position]]]
                rest = words[1:] if position == 0 else words[:-1]
                break
    table = _table()
    whole = [*rest, *sides]  # "left atrium" and "atrium left" are one name
    for wanted in (words, whole):
        row = table.get(" ".join(wanted)) or table.get(" ".join(wanted).removesuffix("s"))
        if row:
            return _meaning(row, None)
    row = table.get(" ".join(rest)) or table.get(" ".join(rest).removesuffix("s"))
    if row is None or len(sides) > 1:
        return None
    return _meaning(row, _SIDES[sides[0]] if sides else None)


def _meaning(row: Mapping[str, str], side: Code | None) -> Meaning:
    region = Code(row["region"], SCHEME, row["region_meaning"]) if row["region"] else None
    return Meaning(_CATEGORIES[row["category"]], Code(row["type"], SCHEME, row["meaning"]), side, region)


@cache
def _table() -> Mapping[str, Mapping[str, str]]:
    text = files("ctflow.bundle.nnunet").joinpath("anatomy.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    found: dict[str, Mapping[str, str]] = {}
    for row in rows:
        words = [_SPELLINGS.get(word, word) for word in row["name"].split()]
        found[" ".join(words)] = row
    return found
