"""The calibration of an engine in eight bits, as a file beside the engine's others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctflow.core.errors import EngineMismatch
from ctflow.engines.store.manifest import read_json_object
from ctflow.networks.eight_bits import exponent_of

KIND = "calibration"  # of the file
_FORMAT = 1


@dataclass(frozen=True)
class Calibration:
    """How large the inputs of a network's convolutions are that are computed in e4m3.

    Attributes:
        channels: Of each share of each such convolution, in the network's order.
        largest: The largest value of each share.
    """

    channels: tuple[tuple[int, ...], ...]
    largest: tuple[tuple[float, ...], ...]

    @property
    def exponents(self) -> list[list[int]]:
        """The power of two that each share is multiplied with."""
        return [[exponent_of(each) for each in shares] for shares in self.largest]


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a calibration.

    Raises:
        OSError: It cannot be written.
    """
    entries = [
        {"channels": list(channels), "largest": list(largest)}
        for channels, largest in zip(calibration.channels, calibration.largest, strict=True)
    ]
    path.write_text(json.dumps({"format": _FORMAT, "convolutions": entries}, indent=1) + "\n", encoding="utf-8")


def read_calibration(path: Path, channels: Sequence[tuple[int, ...]]) -> Calibration:
    """The calibration in a file, whose digest the engine store has checked.

    Args:
        path: The file.
        channels: Of each share of each convolution in e4m3 of the network that is opened.

    Raises:
        EngineMismatch: It is not what `write_calibration` writes, or belongs to another network.
    """
    try:
        document = read_json_object(path)
    except (OSError, ValueError) as error:
        raise _refused(path, f"it cannot be read ({type(error).__name__})") from error
    entries = document.get("convolutions")
    if document.get("format") != _FORMAT or not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise _refused(path, "it is of another kind")
    found = tuple(tuple(entry["channels"]) for entry in entries)
    if found != tuple(channels):
        raise _refused(path, f"it is of another network: {found} channels, not {tuple(channels)}")
    return Calibration(found, tuple(tuple(map(float, entry["largest"])) for entry in entries))


def _is_entry(entry: Any) -> bool:
    """Whether it has as many finite numbers above 0 as shares of channels."""
    if not isinstance(entry, dict) or entry.keys() != {"channels", "largest"}:
        return False
    channels, largest = entry["channels"], entry["largest"]
    return (
        isinstance(channels, list)
        and isinstance(largest, list)
        and len(channels) == len(largest) > 0
        and all(type(count) is int for count in channels)
        and all(type(each) in (int, float) and 0 < each < math.inf for each in largest)
    )


def _refused(path: Path, why: str) -> EngineMismatch:
    return EngineMismatch(
        f"stored calibration {path.parent.name}: {why}; remove that folder and run "
        "`ctflow export --engine fused --precision fp8`",
        reason="stored-engine",
    )
