"""The configurations that `ctflow bench compare` measures, from stock MONAI to every engine of ctflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctflow.bench.measurement import DEFAULT, STRICT, TORCH
from ctflow.engines.registry import backends_for

STOCK, STOCK_HALF, ARTICLE = "0a", "0c", "1"  # what other configurations are compared with
_COUNTS = (2, 4)  # devices of the configurations with several


@dataclass(frozen=True)
class Configuration:
    """One way to compute a volume: whose loop, engine, number format and number of devices.

    Attributes:
        id: Its number; what `--python ID=PATH` names.
        text: What it is, for people.
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
)


def configurations_for(devices: Sequence[str]) -> tuple[Configuration, ...]:
    """All of a machine: the article's, and every engine of ctflow for its kind of device and number of them."""
    return (*_FIRST, *_own_configurations(devices))


def _own_configurations(devices: Sequence[str]) -> Iterator[Configuration]:
    for name, precisions in backends_for(devices[0]):
        for precision in precisions:
            for count in (1, *_COUNTS):
                several, times = (f", {count} GPUs", f"x{count}") if count > 1 else ("", "")
                text = f"ctflow, {name} {precision}{several}"
                yield Configuration(f"{name}-{precision}{times}", text, "ctflow", name, precision, devices=count)
