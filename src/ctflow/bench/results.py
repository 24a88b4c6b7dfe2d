"""What was measured of each configuration, compared with the others: factors and Dice."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.bench.configurations import ARTICLE, STOCK, STOCK_HALF, Configuration
from ctflow.bench.exactness import dice_of


class DiceOfMasks:
    """Dice of kept masks. Each is computed once: at full size it takes a tenth of a second.

    Args:
        folder: Of configurations and truth; a configuration is measured before it is compared, and not again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str, int], float] = {}

    def __call__(self, configuration: str, other: str | None, number: int) -> float:
        """Of a configuration's mask at an overlap to another configuration's, or to the truth (None)."""
        key = (configuration, other or "", number)
        if key not in self._known:
            truth = self._mask("truth.npy") if other is None else self._mask(f"{other}/mask-{number}.npy")
            self._known[key] = round(dice_of(self._mask(f"{configuration}/mask-{number}.npy"), truth), 6)
        return self._known[key]

    def _mask(self, name: str) -> npt.NDArray[np.uint8]:
        return np.unpackbits(np.load(self._folder / name))


def compared_results(
    configurations: Sequence[Configuration], answers: Mapping[str, Mapping[str, Any]], dice: DiceOfMasks
) -> list[dict[str, Any]]:
    """Each configuration with its factors and Dice."""
    document = []
    for configuration in configurations:
        answer = answers[configuration.id]
        entry: dict[str, Any] = {**asdict(configuration), "status": answer["status"], "reason": answer["reason"]}
        if answer["status"] == "measured":
            entry |= {name: answer[name] for name in ("date", "engine_info", "versions")}
            entry["results"] = [
                _result(configuration, number, answers, dice) for number in range(len(answer["measured"]))
            ]
        document.append(entry)
    return document


def _median(answers: Mapping[str, Mapping[str, Any]], name: str, number: int) -> float | None:
    """Median seconds of a configuration at an overlap; None where it was not measured."""
    answer = answers.get(name, {})
    if answer.get("status") != "measured" or answer["measured"][number]["reason"]:
        return None
    seconds: list[float] = answer["measured"][number]["seconds"]
    return statistics.median(seconds)


def _result(
    configuration: Configuration, number: int, answers: Mapping[str, Mapping[str, Any]], dice: DiceOfMasks
) -> dict[str, Any]:
    """One overlap of a configuration: factors say how many times quicker it is than another configuration."""
    measured: dict[str, Any] = answers[configuration.id]["measured"][number]
    own = _median(answers, configuration.id, number)
    if own is None:
        return measured

    def factor(other: str) -> float | None:
        seconds = _median(answers, other, number)
        return None if seconds is None else round(seconds / own, 3)

    def dice_to(other: str) -> float | None:
        return None if _median(answers, other, number) is None else dice(configuration.id, other, number)

    return {
        **measured,
        "median_s": round(own, 4),
        "spread_s": round(max(measured["seconds"]) - min(measured["seconds"]), 4),
        "factor_to_stock": factor(STOCK),
        "factor_to_stock_half": factor(STOCK_HALF),
        "factor_to_article": factor(ARTICLE),
        "dice_to_stock": dice_to(STOCK),
        "dice_to_article": dice_to(ARTICLE),
        "dice_to_truth": dice(configuration.id, None, number),
    }
