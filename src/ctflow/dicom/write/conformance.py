"""Find the values of a header that conform to DICOM: a derived object may take over only these."""

from __future__ import annotations

import datetime
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence

from pydicom.charset import convert_encodings, decode_bytes, default_encoding, encode_string
from pydicom.config import IGNORE, RAISE
from pydicom.datadict import dictionary_VM, dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.valuerep import CUSTOMIZABLE_CHARSET_VR, TEXT_VR_DELIMS, VR, PersonName, validate_value

from ctflow.dicom.attributes import PARSE_ERRORS, texts

# Defined terms without and with code extensions (DICOM PS3.3 C.12.1.1.2).
_STANDS_ALONE = frozenset({"ISO_IR 192", "GB18030", "GBK"}) | {
    f"ISO_IR {number}" for number in (13, 100, 101, 109, 110, 126, 127, 138, 144, 148, 166)
}
_EXTENDS = frozenset(
    f"ISO 2022 IR {number}" for number in (6, 13, 58, 87, 100, 101, 109, 110, 126, 127, 138, 144, 148, 149, 159, 166)
)
_NONE = frozenset({"", "ISO_IR 6", "ISO 2022 IR 6"})  # the default repertoire
_UNCOMMON = frozenset({"GBK"})  # terms that some readers do not know
_UTF_8 = "ISO_IR 192"
_REPLACEMENT = "\ufffd"  # decoders insert it where they cannot decode
_PARAGRAPHS = frozenset({VR.LT, VR.ST, VR.UT})  # in these VRs backslashes and line ends are text
_BREAKS = "\t\n\f\r"
_PN_GROUPS, _PN_COMPONENTS = 3, 5
_SIGNED_32 = range(-(2**31), 2**31)
# Requirements of an attribute's own definition beyond its VR.
_FORMS = {
    "PatientSex": re.compile("[MFO]"),
    "PatientSize": re.compile(r"\d{1,3}(\.\d{1,10})?"),
    "PatientWeight": re.compile(r"\d{1,4}(\.\d{1,10})?"),
    "PatientIdentityRemoved": re.compile("YES|NO"),
    "LongitudinalTemporalInformationModified": re.compile("UNMODIFIED|MODIFIED|REMOVED"),
    "TimezoneOffsetFromUTC": re.compile(r"[+-](0\d|1[0-3])[0-5]\d|[+]1400"),
    "LossyImageCompressionRatio": re.compile(r"\d{1,8}(\.\d{1,7})?"),
}


def conforming_values(header: Dataset, keyword: str, encodings: Sequence[str] = ()) -> tuple[str, ...] | None:
    """The values of an attribute of a string VR, if it conforms.

    Args:
        header: As read; its other attributes may be anything.
        keyword: Of an attribute whose VR in PS3.6 holds text.
        encodings: Python's names of its character set; by default the header's own.

    Returns:
        Its values without insignificant blanks; () if it is absent or empty; None if its number of values (VM), a
        value's form (VR) or an enumerated value violates DICOM, or its text cannot be decoded.

    Source: DICOM PS3.5 6.1, 6.2 (value representations) and 6.4 (multiplicity), PS3.6 chapter 6.
    """
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"no attribute is called {keyword}")
    if tag not in header:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote values
        try:
            values = _as_texts(header[tag].value)
        except PARSE_ERRORS:
            return None
    if values is None or not any(values):
        return values and ()
    vr, form = dictionary_VR(tag), _FORMS.get(keyword)
    conforms = (
        _is_multiplicity(len(values), dictionary_VM(tag))
        and all(_is_form(vr, each) and (form is None or form.fullmatch(each)) for each in values)
        and (keyword != "SpecificCharacterSet" or _is_character_set(values))
        and _is_decoded(vr, values, encodings or encodings_of_header(header))
    )
    return values if conforms else None


def element_of_values(keyword: str, values: Sequence[str]) -> DataElement:
    """An element of conforming values; empty if there are none."""
    value: object = list(values) if len(values) > 1 else "".join(values)
    return DataElement(tag_for_keyword(keyword) or 0, dictionary_VR(keyword), value, validation_mode=IGNORE)


def conforming_code(item: Dataset, encodings: Sequence[str]) -> Dataset | None:
    """A conforming code with its basic attributes, or None.

    Args:
        item: Of a code sequence.
        encodings: Python's names of its texts' character set.

    Source: DICOM PS3.3 8.8 (Code Sequence Macro), only its basic attributes.
    """
    code = Dataset()
    for keyword in ("CodeValue", "CodingSchemeDesignator", "CodingSchemeVersion", "CodeMeaning"):
        values = conforming_values(item, keyword, encodings)
        if values is None or (not values and keyword != "CodingSchemeVersion"):
            return None
        if values:
            code.add(element_of_values(keyword, values))
    return code


def encodings_of_header(header: Dataset) -> list[str]:
    """Python's names of a header's character set; the default repertoire's if it is unknown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_encodings(list(texts(header, "SpecificCharacterSet")))


def conforming_character_set(header: Dataset, taken: Dataset) -> list[str]:
    """The header's character set, if it is valid and holds every value taken over; otherwise UTF-8.

    Args:
        header: The source.
        taken: The values taken over, decoded.
    """
    names = list(texts(header, "SpecificCharacterSet"))
    if not set(names) - _NONE:
        return ["ISO_IR 100"]  # every text is then in the default repertoire
    if not _is_character_set(names) or _UNCOMMON & set(names) or not _holds(names, taken):
        return [_UTF_8]
    return names


def is_date(value: str) -> bool:
    """Whether a text is an existing date (VR DA)."""
    if not re.fullmatch(r"[12]\d{7}", value):
        return False
    try:
        datetime.date(int(value[:4]), int(value[4:6]), int(value[6:]))
    except ValueError:
        return False
    return True


def holds_text(encodings: list[str], value: str) -> bool:
    """Whether a text survives encoding in a character set, even with readers that look at single bytes.

    Args:
        encodings: Python's names of the character set.
        value: The text.
    """
    if value.isascii():
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the set lacks
        encoded = encode_string(value, encodings)
        kept = decode_bytes(encoded, encodings, TEXT_VR_DELIMS) == value
    # pydicom reads the default repertoire as Latin-1, other readers as ASCII. A backslash may be the second byte of
    # a letter (GB18030, GBK); most readers take it for the end of a value.
    return kept and b"\\" not in encoded and not (encodings[0] == default_encoding and b"\x1b" not in encoded)


def _as_texts(value: object) -> tuple[str, ...] | None:
    """Each value as text; None if one is bytes or a sequence item."""
    if value is None:
        return ()
    is_one = isinstance(value, (str, bytes, PersonName)) or not isinstance(value, Sequence)
    values = [value] if is_one else list(value)  # type: ignore[call-overload]  # a sequence then
    if any(isinstance(each, (bytes, Dataset)) for each in values):
        return None
    return tuple(str(each).strip(" \0") for each in values)


def _is_multiplicity(count: int, multiplicity: str) -> bool:
    """Whether this number of values is allowed; PS3.6 writes "1", "1-3", "1-n" or "2-2n"."""
    least, _, most = multiplicity.partition("-")
    if not most:
        return count == int(least)
    step = int(most[:-1] or 1) if most.endswith("n") else 1
    return count >= int(least) and count % step == 0 and (most.endswith("n") or count <= int(most))


def _is_form(vr: str, value: str) -> bool:
    """Whether a non-empty value has its VR's form."""
    if not value:
        return True
    allowed = _BREAKS if vr in _PARAGRAPHS else ""
    if any(unicodedata.category(letter) in {"Cc", "Cs"} and letter not in allowed for letter in value):
        return False
    if "\\" in value and vr not in _PARAGRAPHS:
        return False
    try:
        validate_value(vr, value, RAISE)  # lengths and patterns
    except (ValueError, TypeError):
        return False
    return _is_sense(vr, value)


def _is_sense(vr: str, value: str) -> bool:
    """Check what pydicom does not: components of names, existing dates, finite numbers, no ranges."""
    if vr == VR.PN:
        groups = value.split("=")
        return len(groups) <= _PN_GROUPS and all(group.count("^") < _PN_COMPONENTS for group in groups)
    if vr == VR.DA:
        return is_date(value)
    if vr == VR.TM:  # no range; no leap second either: some readers reject it, and it means a wrong clock
        return "-" not in value and value[4:6] != "60"
    if vr == VR.DS:
        return math.isfinite(float(value))
    return vr != VR.IS or int(value) in _SIGNED_32


def _is_decoded(vr: str, values: Sequence[str], encodings: Sequence[str]) -> bool:
    """Whether these are the sender's characters: non-ASCII ones need a SpecificCharacterSet."""
    if all(map(str.isascii, values)):
        return True
    if vr not in CUSTOMIZABLE_CHARSET_VR or any(_REPLACEMENT in each for each in values):
        return False
    # pydicom reads bytes outside the default repertoire as Latin-1; only code extensions may also name Latin-1.
    told = encodings[0] != default_encoding or "latin_1" in encodings
    return told or not any("\x80" <= letter <= "\xff" for each in values for letter in each)


def _is_character_set(names: Sequence[str]) -> bool:
    if not set(names) - _NONE:
        return True
    if len(names) == 1:
        return names[0] in _STANDS_ALONE
    first, *others = names
    return first in {"", *_EXTENDS} and set(others) <= _EXTENDS and len(set(names)) == len(names)


def _holds(names: list[str], taken: Dataset) -> bool:
    """Whether a character set holds every text taken over."""
    encodings = convert_encodings(names)
    for element in taken:
        if element.VR == VR.SQ:
            if not all(_holds(names, item) for item in element.value):
                return False
        elif element.VR in CUSTOMIZABLE_CHARSET_VR and element.value:
            values = map(str, element.value if element.VM > 1 else [element.value])
            parts = [part for value in values for part in (value.split("=") if element.VR == VR.PN else [value])]
            if not all(holds_text(encodings, part) for part in parts):
                return False
    return True
