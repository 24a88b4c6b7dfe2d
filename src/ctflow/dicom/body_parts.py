"""BodyPartExamined: the parts of the body that a value names, whoever wrote it.

DICOM PS3.16 Annex L defines terms, and scanners write others: CHEST_TO_PELVIS, CH_AB_PEL, THORAX, C/A/P. A value is
known if it is a defined term or consists only of words of the table below; any other may be anything, even a name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache

# From head to feet: "X to Y" includes the parts between them.
_TRUNK = ("HEAD", "NECK", "CHEST", "ABDOMEN", "PELVIS")
# Words of scanners, archives (Imaging Data Commons, TCIA, MIDRC) and languages, each with its parts.
_WORDS = {
    "HEAD": "HEAD BRAIN SKULL CRANIUM SCHAEDEL TETE CABEZA",
    "NECK": "NECK HALS COU CUELLO COLLO",
    "CHEST": "CHEST CHST CHES CST CH THORAX THORACIC THX THOR TORAX TORACE TORSE LUNG LUNGS PULMONARY HRCT CTPA",
    "ABDOMEN": "ABDOMEN ABDOMINAL ABDOM ABDO ABD AB ADDOME ADDOMEN",
    "PELVIS": "PELVIS PELVIC PELVI PELV PEL BECKEN BASSIN",
}
_WHOLE = {
    "CAP": ("CHEST", "ABDOMEN", "PELVIS"),
    "TAP": ("CHEST", "ABDOMEN", "PELVIS"),  # French, Spanish and Italian for the same
    "TORSO": ("CHEST", "ABDOMEN", "PELVIS"),
    "TRUNK": ("CHEST", "ABDOMEN", "PELVIS"),
    "WHOLEBODY": _TRUNK,
    "TOTALBODY": _TRUNK,
    "GANZKOERPER": _TRUNK,
}
# Words that accompany a part and name none.
_IDLE_WORDS = "CT CTA AND WITH WITHOUT W WO CON CONTRAST NATIVE ROUTINE LOW DOSE PE THIN STANDARD"
# Defined terms of DICOM PS3.16 Annex L that are not made of the words above; each is a part of its own.
_TERMS = (
    "ADRENAL ANKLE ANTECUBITALV ANUS AORTA AORTICARCH APPENDIX ARM ARTERY ASCAORTA ATRIUM AXILLA AXILLARYA BACK"
    " BILEDUCT BLADDER BONE BRACHIALA BREAST BRONCHUS BUTTOCK CALCANEUS CALF CAROTID CEREBELLUM CEREBRALA CERVIX"
    " CHEEK CHOROIDPLEXUS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA CORONARYARTERY CSPINE CTSPINE DESCAORTA"
    " DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMORALA FEMUR FIBULA FINGER FOOT FOREARM GALLBLADDER"
    " HAND HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM JOINT KIDNEY KNEE LARGEINTESTINE LARYNX LEG LIVER LSPINE"
    " LSSPINE MASTOID MAXILLA MEDIASTINUM MOUTH NASOPHARYNX NOSE OPTICCANAL ORBIT OVARY PANCREAS PANCREATICDUCT"
    " PANCBILEDUCT PARASTERNAL PAROTID PATELLA PENIS PHARYNX PLACENTA PROSTATE RADIUS RADIUSULNA RECTUM RIB SACRUM"
    " SCALP SCAPULA SCLERA SCROTUM SELLA SESAMOID SHOULDER SIJOINT SINUS SMALLINTESTINE SPINE SPLEEN SSPINE"
    " STERNUM STOMACH SUBMANDIBULAR TEMPLE TESTIS THIGH THUMB THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE"
    " TONGUE TRACHEA TSPINE ULNA UPPERARM URETER URETHRA UTERUS VAGINA VULVA WRIST ZYGOMA"
)
_PART_OF_WORD = {word: part for part, words in _WORDS.items() for word in words.split()}
_IDLE, _OTHER_TERMS = frozenset(_IDLE_WORDS.split()), frozenset(_TERMS.split())
_MOST_LISTED = 12


@lru_cache(2**10)
def parts_of_value(value: str) -> frozenset[str]:
    """The parts that a BodyPartExamined value names.

    Args:
        value: As in the header, upper or lower case.

    Returns:
        HEAD, NECK, CHEST, ABDOMEN and PELVIS, or one other defined term; empty if the value is not known.

    Source: DICOM PS3.16 Annex L.
    """
    words = [word for word in re.split(r"[^A-Z0-9]+", value.upper()) if word]
    joined = "".join(words)
    if joined in _OTHER_TERMS:
        return frozenset([joined])
    if joined in _WHOLE:
        return frozenset(_WHOLE[joined])
    if len(words) == 3 and words[1] == "TO" and {words[0], words[2]} <= set(_PART_OF_WORD):
        ends = sorted(_TRUNK.index(_PART_OF_WORD[word]) for word in (words[0], words[2]))
        return frozenset(_TRUNK[ends[0] : ends[1] + 1])
    found: set[str] = set()
    for word in words:
        parts = () if word in _IDLE else _WHOLE.get(word) or _split(word)
        if parts is None:
            return frozenset()
        found.update(parts)
    return frozenset(found)


def _split(word: str) -> tuple[str, ...] | None:
    """The parts of words joined into one, such as CHESTABDPELVIS; None if anything is left over."""
    if not word:
        return ()
    for length in range(len(word), 1, -1):
        part = _PART_OF_WORD.get(word[:length])
        rest = None if part is None else _split(word[length:])
        if part is not None and rest is not None:
            return (part, *rest)
    return None


def known_value(value: str) -> str | None:
    """A value as messages may show it; None if it is not known, since it may be a name or an ID."""
    return " ".join(value.upper().split()) if parts_of_value(value) else None


def suits(value: str, wanted: Collection[str]) -> bool:
    """Whether a series with this BodyPartExamined suits a model.

    Args:
        value: The series' value.
        wanted: The model's: one of them must be the same word, or name only parts that the value also names.
    """
    if value.upper() in {one.upper() for one in wanted}:
        return True
    parts = parts_of_value(value)
    return any(needed and needed <= parts for needed in map(parts_of_value, wanted))


def holds_no_other(value: str, listed: Collection[str]) -> bool:
    """Whether a series with this BodyPartExamined holds only what a list names.

    Args:
        value: The series' value.
        listed: One of them must be the same word, or the value's parts must all be among theirs.
    """
    if value.upper() in {one.upper() for one in listed}:
        return True
    parts = parts_of_value(value)
    return bool(parts) and parts <= frozenset().union(*map(parts_of_value, listed))


def listed_parts(wanted: Iterable[str]) -> str:
    """A model's list as messages show it."""
    words = list(wanted)
    more = len(words) - _MOST_LISTED
    return ", ".join(words[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
