"""The configurations and their measurements, compared with each other: factors and Dice."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctflow.bench.exactness import dice_of
from ctflow.bench.measurement import DEFAULT, STRICT, TORCH
from ctflow.engines.contract import ONLY_BY_NAME
from ctflow.engines.registry import backends_for

STOCK, STOCK_HALF, ARTICLE = "0a", "0c", "1"  # the references for other configurations
_COUNTS = (2, 4)  # devices of the configurations with several


class DiceOfMasks:
    """Dice of kept masks. Each is computed once: at full size it takes a tenth of a second.

    Args:
        folder: Of configurations and truth; a configuration is measured before it is compared, and not again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str, int], float] = {}

    def __call__(self, configuration: str, other: str | None, number: int) -> float:
        """Dice of a configuration's mask at an overlap with another configuration's, or with the truth (None)."""
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
    """One overlap of a configuration: factors are its speed-up over another configuration."""
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


@dataclass(frozen=True)
class Configuration:
    """A loop, engine, number format and number of devices that compute a volume.

    Attributes:
        id: Its number, as in `--python ID=PATH`.
        text: Its description, for display.
        method: See `ctflow.bench.measurement.MeasurementRequest`.
        engine: Backend name, or `TORCH`.
        precision: Number format.
        stitch: Where stock MONAI blends.
        devices: How many.
    """

    id: str
    text: str
    method: str
    engine: str = TORCH
    precision: str = "fp16"
    stitch: str = "device"
    devices: int = 1


_ONE_CHANNEL = "the article's one channel, TensorRT fp16"
_COMPILED = "the article's one channel, torch.compile fp16"
_FIRST = (
    Configuration(STOCK, "stock MONAI, strict fp32", "stock", precision=STRICT),
    Configuration("0b", "stock MONAI, strict fp32, blended on the CPU", "stock", precision=STRICT, stitch="cpu"),
    Configuration(STOCK_HALF, "stock MONAI, fp16", "stock"),
    Configuration("0d", "stock MONAI, fp16, blended on the CPU", "stock", stitch="cpu"),
    Configuration(ARTICLE, "the article's loop, strict fp32", "article", precision=STRICT),
    Configuration("1b", "the article's loop, torch's default precision", "article", precision=DEFAULT),
    Configuration("2", "the article's loop, fp16", "article"),
    Configuration("3", "the article's loop, TensorRT fp16", "article", "tensorrt"),
    Configuration("4", _ONE_CHANNEL, "article, one channel", "tensorrt"),
    *(
        Configuration(f"5x{count}", f"{_ONE_CHANNEL}, {count} GPUs", "article, one channel", "tensorrt", devices=count)
        for count in _COUNTS
    ),
    Configuration("6", _COMPILED, "article, one channel", "compile"),
    *(
        Configuration(f"6x{count}", f"{_COMPILED}, {count} GPUs", "article, one channel", "compile", devices=count)
        for count in _COUNTS
    ),
)


def configurations_for(devices: Sequence[str]) -> tuple[Configuration, ...]:
    """All of a machine: the article's, and every engine of ctflow for its kind of device and number of them."""
    return (*_FIRST, *_own_configurations(devices))


def _own_configurations(devices: Sequence[str]) -> Iterator[Configuration]:
    counts = (1,) if devices[0] == "cpu" else (1, *_COUNTS)
    for name, tried in backends_for(devices[0]):
        # `auto` does not try what costs exactness; a comparison shows it.
        for precision in (*tried, *(ONLY_BY_NAME if name == "fused" else ())):
            for count in counts:
                several, times = (f", {count} GPUs", f"x{count}") if count > 1 else ("", "")
                text = f"ctflow, {name} {precision}{several}"
                yield Configuration(f"{name}-{precision}{times}", text, "ctflow", name, precision, devices=count)
