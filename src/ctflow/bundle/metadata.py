"""metadata.json: the model's name, the meaning of its channels, its intended use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctflow.bundle.config import MISSING, short
from ctflow.bundle.config.documents import document_from_bytes, read_bundle_document
from ctflow.bundle.locate import METADATA, is_of_nnunet
from ctflow.bundle.nnunet.folder import SIDECAR, TrainedFolder
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Code, HuRange, Segment
from ctflow.core.steps import FilterLabels, LabelStep, MapLabels

MOST_CHANNELS = 256
# For a channel without codes in the bundle (both DICOM PS3.16 CID 7150 and 7151 contain it).
TISSUE = Code("85756007", "SCT", "Tissue")
_CHANNEL_DEF = "network_data_format#outputs#pred#channel_def"
_LONGEST = 64  # of a label (LO)
_MOST_HU = 100_000  # far beyond metal
_COLOUR = re.compile(r"#[0-9A-Fa-f]{6}")
_CODE_STRING = re.compile(r"[A-Z0-9 _]{1,16}")  # DICOM PS3.5 section 6.2, VR CS


@dataclass(frozen=True)
class Metadata:
    """The content of metadata.json; see `ModelSpec`."""

    name: str
    version: str
    segments: tuple[Segment, ...]
    intended_use: str
    demonstration: bool
    body_parts: tuple[str, ...]
    notes: tuple[str, ...]


def read_body_parts(path: Path) -> tuple[str, ...]:
    """The BodyPartExamined values that suit a bundle's model, without reading the rest; empty accepts all.

    Args:
        path: The bundle's folder, or a model of nnU-Net, which accepts all unless a metadata.json beside its plans.json
            says more.

    Raises:
        BundleInvalid: metadata.json cannot be read, or its body_parts are not a list of words.
    """
    with _named_by_model(path) as document:
        return _body_parts(document)


def read_demonstration(path: Path) -> bool:
    """Whether a model is for demonstration, as `read_body_parts` reads that.

    Raises:
        BundleInvalid: metadata.json cannot be read, or its `demonstration` is neither true nor false.
    """
    with _named_by_model(path) as document:
        return _demonstration(document)


@contextmanager
def _named_by_model(path: Path) -> Iterator[Mapping[str, Any]]:
    """A model's metadata.json; empty for a model of nnU-Net without one."""
    if not is_of_nnunet(path):
        yield read_bundle_document(path, METADATA)
        return
    folder = TrainedFolder(path)
    with _beside_plans():
        yield document_from_bytes(folder.document(SIDECAR), SIDECAR) if SIDECAR in folder.files else {}


@contextmanager
def _beside_plans() -> Iterator[None]:
    """Errors name the file that stands there."""
    try:
        yield
    except BundleInvalid as error:
        raise BundleInvalid(str(error).replace(METADATA, SIDECAR, 1), reason=error.reason) from None


def metadata_from_document(
    document: Mapping[str, Any],
    folder_name: str,
    out_channels: int,
    *,
    has_background: bool,
    classes: Sequence[int] = (),
) -> Metadata:
    """Read metadata.json.

    Args:
        document: The parsed file.
        folder_name: Name of the bundle's folder, used if the bundle gives no name.
        out_channels: Channels of the network.
        has_background: Whether channel 0 is the background.
        classes: What the document calls the channels behind the background, if not 1, 2 and so on.

    Raises:
        BundleInvalid: A key is missing or invalid.
    """
    names = [0, *classes] if classes else list(range(out_channels))
    segments, notes = _segments(document, names, 1 if has_background else 0, complete=not classes)
    intended_use = ""
    if document.get("intended_use") is not None:
        intended_use = _intended_use(document)
    else:
        notes.append("metadata.json states no intended_use")
    named = document if document.get("name") is not None else {"name": folder_name}
    return Metadata(
        name=_text(named, "name", "name"),
        version=_text(document, "version", "version"),
        segments=segments,
        intended_use=intended_use,
        demonstration=_demonstration(document),
        body_parts=_body_parts(document),
        notes=tuple(notes),
    )


def metadata_of_labels(document: Mapping[str, Any], name: str, version: str, segments: Sequence[Segment]) -> Metadata:
    """What a metadata.json beside a model of nnU-Net says, where it says something; its `channel` is a label.

    Args:
        document: The parsed file; empty if there is none.
        name: The model's name by its plans.
        version: The same.
        segments: By its dataset.json, in the order of their labels.

    Returns:
        All of it; no notes but that on `intended_use`.

    Raises:
        BundleInvalid: A key is invalid.
    """
    with _beside_plans():
        given = _coded(document, [segment.number for segment in segments])
        about = {"name": name, "version": version, **document}
        says = document.get("intended_use") is not None
        return Metadata(
            name=_text(about, "name", "name"),
            version=_text(about, "version", "version"),
            segments=tuple(
                _segment(each.number, each.label, *given[each.number]) if each.number in given else each
                for each in segments
            ),
            intended_use=_intended_use(document) if says else "",
            demonstration=_demonstration(document),
            body_parts=_body_parts(document),
            notes=() if says else (f"nnU-Net states no intended_use; {SIDECAR} beside plans.json may",),
        )


def _segments(
    document: Mapping[str, Any], channels: Sequence[int], first: int, *, complete: bool
) -> tuple[tuple[Segment, ...], list[str]]:
    """The segments of the channels, which the document calls by these numbers; `first` is 1 behind a background."""
    labels = _labels(document, channels, complete=complete)
    coded = _coded(document, channels[first:])
    segments = tuple(
        _segment(number, labels[channel], *coded[channel])
        if channel in coded
        else Segment(number, labels[channel], TISSUE, TISSUE, coded=False)
        for number, channel in enumerate(channels[first:], start=1)
    )
    return segments, notes_on_codes(segments, "metadata.json has no codes for")


def notes_on_codes(segments: Sequence[Segment], lacking: str) -> list[str]:
    """One note on all segments that have only a name, as a model may have a hundred of them; none if there are none."""
    names = [segment.label for segment in segments if not segment.coded]
    listed = f"{', '.join(names[:5])}{f' and {len(names) - 5} others' if len(names) > 5 else ''}"
    return [f"{lacking} {listed}; their segments are coded as tissue"] if names else []


def _segment(number: int, label: str, at: str, value: Mapping[str, Any]) -> Segment:
    label = _text(value, "label", f"{at}#label") if "label" in value else label
    category, kind = _code(value, "category", at), _code(value, "type", at)
    anatomy = value.get("anatomy", [])
    if not isinstance(anatomy, list) or len(anatomy) > 10:
        raise _invalid(f"{at}#anatomy", f"must be a list of at most 10 codes, not {short(anatomy)}")
    regions = tuple(_code({str(i): code}, str(i), f"{at}#anatomy") for i, code in enumerate(anatomy))
    return Segment(number, label, category, kind, regions, colour=_colour(value, at), hu_range=_hu_range(value, at))


def names_background(document: Mapping[str, Any]) -> bool:
    """Whether the document calls channel 0 the background."""
    return "background" in _labels(document, [0], complete=False)[0].lower()


def demand_ct(document: Mapping[str, Any]) -> None:
    """Reject a bundle whose input is said to be another modality than CT.

    Args:
        document: metadata.json, parsed.

    Raises:
        BundleInvalid: It is; the message says what runs the bundle.
    """
    value: Any = document
    for key in ("network_data_format", "inputs", "image", "modality"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, str) and value.strip().upper() not in ("", "CT", "N/A", "NA"):
        raise BundleInvalid(
            f"{METADATA}: network_data_format#inputs#image#modality is {short(value)}: ctflow reads CT; `python -m "
            "monai.bundle run` runs this bundle on files of its modality",
            reason="inputs",
        )


def segments_after(segments: Sequence[Segment], steps: Sequence[LabelStep]) -> tuple[Segment, ...]:
    """The segments of the label values that steps on labels leave; labels that become one share their names."""
    found = {segment.number: segment for segment in segments}
    for step in steps:
        if isinstance(step, FilterLabels):
            found = {number: segment for number, segment in found.items() if number in step.labels}
        elif isinstance(step, MapLabels):
            table = dict(step.pairs)
            moved: dict[int, Segment] = {}
            for number, segment in found.items():
                other = table.get(number, number)
                if other:
                    moved[other] = _joined(moved.get(other), replace(segment, number=other))
            found = moved
    return tuple(found[number] for number in sorted(found))


def _joined(first: Segment | None, segment: Segment) -> Segment:
    label = segment.label if first is None else f"{first.label}, {segment.label}"
    return replace(first or segment, label=label) if first is None or len(label) <= _LONGEST else first


def _labels(document: Mapping[str, Any], channels: Sequence[int], *, complete: bool) -> dict[int, str]:
    value: Any = document
    walked: list[str] = []
    for key in _CHANNEL_DEF.split("#"):
        walked.append(key)
        is_named = isinstance(value, Mapping) and key not in value and key == "channel_def"
        found = "label_def" if is_named else key  # as some bundles of the zoo call it
        value = value.get(found, MISSING) if isinstance(value, Mapping) else MISSING
        if not isinstance(value, Mapping):
            problem = "is missing" if value is MISSING else f"must be an object, not {short(value)}"
            raise _invalid("#".join(walked), f"{problem}; ctflow names the segments from {_CHANNEL_DEF}")
    expected = [str(channel) for channel in channels]
    if complete and sorted(value) != sorted(expected):
        raise _invalid(_CHANNEL_DEF, f"must name the network's {len(channels)} channels, 0 to {len(channels) - 1}")
    return {channel: _text(value, str(channel), f"{_CHANNEL_DEF}#{channel}") for channel in channels}


def _coded(document: Mapping[str, Any], channels: Sequence[int]) -> dict[int, tuple[str, Mapping[str, Any]]]:
    given = document.get("segments", [])
    if not isinstance(given, list):
        raise _invalid("segments", f"must be a list, not {short(given)}")
    found: dict[int, tuple[str, Mapping[str, Any]]] = {}
    for number, entry in enumerate(given):
        at = f"segments#{number}"
        if not isinstance(entry, Mapping):
            raise _invalid(at, f"must be an object, not {short(entry)}")
        channel = entry.get("channel")
        if isinstance(channel, bool) or not isinstance(channel, int) or channel not in channels:
            raise _invalid(f"{at}#channel", f"must be one of the channels {_span(channels)}, not {short(channel)}")
        if channel in found:
            raise _invalid(f"{at}#channel", f"repeats channel {channel}")
        found[channel] = at, entry
    return found


def _span(channels: Sequence[int]) -> str:
    return f"{channels[0]} to {channels[-1]}"


def _code(holder: Mapping[str, Any], key: str, at: str) -> Code:
    at = f"{at}#{key}"
    value = holder.get(key, MISSING)
    if not isinstance(value, Mapping):
        problem = "is missing" if value is MISSING else f"is {short(value)}"
        raise _invalid(at, f"{problem}; a code has value, scheme and meaning")
    return Code(
        _text(value, "value", f"{at}#value", longest=16),
        _text(value, "scheme", f"{at}#scheme", longest=16),
        _text(value, "meaning", f"{at}#meaning"),
    )


def _colour(holder: Mapping[str, Any], at: str) -> tuple[int, int, int] | None:
    """Red, green and blue of "#rrggbb"; None if the bundle gives no colour."""
    value = holder.get("colour")
    if value is None:
        return None
    if not isinstance(value, str) or not _COLOUR.fullmatch(value):
        raise _invalid(f"{at}#colour", f'must be a colour such as "#d62728", not {short(value)}')
    red, green, blue = bytes.fromhex(value[1:])
    return red, green, blue


def _hu_range(holder: Mapping[str, Any], at: str) -> HuRange | None:
    """Lowest and highest mean HU of a finding; None if the bundle gives none."""
    value = holder.get("hu_range")
    if value is None:
        return None
    in_hu = isinstance(value, list) and all(type(each) in (int, float) and abs(each) <= _MOST_HU for each in value)
    if not in_hu or len(value) != 2 or not value[0] < value[1]:
        raise _invalid(f"{at}#hu_range", f"must be two ascending numbers in HU such as [-700, 300], not {short(value)}")
    return float(value[0]), float(value[1])


def _body_parts(document: Mapping[str, Any]) -> tuple[str, ...]:
    given = document.get("body_parts", [])
    if not isinstance(given, list) or len(given) > 1000:
        raise _invalid("body_parts", f"must be a list of words, not {short(given)}")
    for number, part in enumerate(given):
        if not isinstance(part, str) or not _CODE_STRING.fullmatch(part.upper()):
            raise _invalid(f"body_parts#{number}", f"must be a BodyPartExamined value, not {short(part)}")
    return tuple(part.upper() for part in given)


def _intended_use(document: Mapping[str, Any]) -> str:
    return _text(document, "intended_use", "intended_use", longest=10_000, one_line=False)


def _demonstration(document: Mapping[str, Any]) -> bool:
    given = document.get("demonstration", False)
    if not isinstance(given, bool):
        raise _invalid("demonstration", f"must be true or false, not {short(given)}")
    return given


def _text(holder: Mapping[str, Any], key: str, at: str, *, longest: int = 64, one_line: bool = True) -> str:
    """A text that fits its DICOM attribute (LO: 64 characters, no backslash, no control characters)."""
    value = holder.get(key, MISSING)
    if value is MISSING:
        raise _invalid(at, "is missing")
    if not isinstance(value, str) or not value.strip():
        raise _invalid(at, f"must be a text, not {short(value)}")
    if len(value) > longest:
        raise _invalid(at, f"has {len(value)} characters; at most {longest} fit")
    if one_line and ("\\" in value or not value.isprintable()):
        raise _invalid(at, "must be one line without control characters or backslashes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _invalid(at, "contains half a character (a lone surrogate)") from None
    return value.strip()


def _invalid(place: str, reason: str) -> BundleInvalid:
    return BundleInvalid(f"{METADATA}: {place} {reason}", reason="metadata")
