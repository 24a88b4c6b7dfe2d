"""dataset.json's labels -> segments: plain labels, or regions that paint over each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.config import short
from ctflow.bundle.metadata import MOST_CHANNELS, TISSUE
from ctflow.bundle.nnunet.anatomy import meaning_of
from ctflow.bundle.nnunet.folder import DATASET
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import Segment

BACKGROUND, IGNORE = "background", "ignore"
_LONGEST = 64  # characters of a segment's label (DICOM VR LO)


@dataclass(frozen=True)
class LabelSet:
    """What a model's channels mean.

    Attributes:
        out_channels: Channels of the network's logits.
        segments: By label value.
        painted: See `ModelSpec.painted`.
        notes: For the log and result.json.
    """

    out_channels: int
    segments: tuple[Segment, ...]
    painted: tuple[int, ...]
    notes: tuple[str, ...]


def labels_from_dataset(dataset: Mapping[str, Any]) -> LabelSet:
    """Read `labels` and `regions_class_order`.

    Args:
        dataset: dataset.json, parsed.

    Raises:
        BundleInvalid: They are missing or mean nothing.

    Source: nnU-Net 2.8.1 `LabelManager`.
    """
    given = dataset.get("labels")
    if not isinstance(given, Mapping) or given.get(BACKGROUND) != 0 or isinstance(given[BACKGROUND], bool):
        raise invalid_dataset("labels", f"must name the labels, background being 0, not {short(given)}")
    values = {name: _values(name, value) for name, value in given.items()}
    ignored = values.pop(IGNORE, None)
    known = {value for each in values.values() for value in each}
    if ignored is not None and ignored != (max(known) + 1,):
        raise invalid_dataset("labels#ignore", "must be the highest label, as in nnU-Net")
    regions = {name: each for name, each in values.items() if set(each) != {0}}
    if not regions:
        raise invalid_dataset("labels", "names nothing but the background")
    is_painted = any(len(each) > 1 for each in values.values())
    if is_painted:
        names, painted, notes = _painted(regions, dataset.get("regions_class_order"))
    else:
        names, painted, notes = _plain(regions), (), ()
    segments = [_segment(number, name, wording) for number, (name, wording) in sorted(names.items())]
    channels = len(regions) + (not is_painted)
    if channels > MOST_CHANNELS:
        raise invalid_dataset(
            "labels", f"names {len(regions)} labels; a label map of bytes has at most {MOST_CHANNELS - 1}"
        )
    return LabelSet(channels, tuple(segments), painted, notes)


def _values(name: str, given: Any) -> tuple[int, ...]:
    values = given if isinstance(given, list) else [given]
    if not values or not all(type(value) is int and 0 <= value < MOST_CHANNELS for value in values):
        raise invalid_dataset(
            f"labels#{name[:80]}", f"must be a label or a list of labels below {MOST_CHANNELS}, not {short(given)}"
        )
    if not 0 < len(name) <= _LONGEST or not name.isprintable() or "\\" in name or not name.strip():
        raise invalid_dataset("labels", f"has a name that is no line of at most {_LONGEST} characters: {short(name)}")
    return tuple(values)


def _plain(labels: Mapping[str, tuple[int, ...]]) -> dict[int, tuple[str, str]]:
    names = {value: (name, name) for name, (value,) in labels.items()}
    if sorted(names) != list(range(1, len(labels) + 1)):
        raise invalid_dataset("labels", f"must be 1 to {len(labels)} without a gap, as the network's channels are")
    return names


def _painted(
    regions: Mapping[str, tuple[int, ...]], order: Any
) -> tuple[dict[int, tuple[str, str]], tuple[int, ...], tuple[str, ...]]:
    """Name and wording of each label that regions paint; what of a region others paint over is not in its segment."""
    is_order = isinstance(order, list) and all(type(value) is int and 0 < value < MOST_CHANNELS for value in order)
    if not is_order or len(order) != len(regions) or len(set(order)) != len(order):
        raise invalid_dataset("regions_class_order", f"must name one label for each of the {len(regions)} regions")
    names, notes = {}, []
    for channel, (name, values) in enumerate(regions.items()):
        over = [other for other, theirs in list(regions.items())[channel + 1 :] if set(theirs) & set(values)]
        wording = f"{name} without {' or '.join(over)}" if over else name
        if over:
            notes.append(f"label {order[channel]} marks {wording}: regions that overlap become one label map")
        names[order[channel]] = name, wording if len(wording) <= _LONGEST else f"{wording[: _LONGEST - 3]}..."
    return names, tuple(order), tuple(notes)


def _segment(number: int, name: str, wording: str) -> Segment:
    meaning = meaning_of(name)
    if meaning is None:
        return Segment(number, wording, TISSUE, TISSUE, coded=False)
    region = () if meaning.region is None else (meaning.region,)
    return Segment(number, wording, meaning.category, meaning.type, region, side=meaning.side)


def invalid_dataset(place: str, problem: str, reason: str = "metadata") -> BundleInvalid:
    """The error for a key of dataset.json."""
    return BundleInvalid(f"{DATASET}: {place} {problem}", reason=reason)
