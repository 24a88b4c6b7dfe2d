"""From stock PyTorch to ctflow in steps: the starting article's ladder, each rung measured on this machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctflow.bench.row import DEFAULT, STRICT, TORCH, Request
from ctflow.bundle.read import read_bundle
from ctflow.engines.choose import backends_for, batch_range_for, devices_from_setting
from ctflow.engines.tensorrt import driver_version
from ctflow.errors import SettingsInvalid
from ctflow.model import Model
from ctflow.phantom import phantom_from_seed
from ctflow.progress import Progress, silent
from ctflow.volume import Size3

SHAPE: Size3 = (300, 512, 512)
OVERLAPS = (0.0, 0.25)
TUMOURS = 4
STOCK, STOCK_ON_CPU, STOCK_HALF, ARTICLE = "0a", "0b", "0c", "1"
_COUNTS = (2, 4)  # devices of the rows with several


@dataclass(frozen=True)
class Row:
    """One rung.

    Attributes:
        id: Its number; what `--python ROW=PATH` names.
        text: What it is, for people.
        way: See `ctflow.bench.row.Request`.
        engine: Backend name, or `TORCH`.
        precision: Number format.
        stitch: Where stock MONAI blends.
        devices: How many.
    """

    id: str
    text: str
    way: str
    engine: str = TORCH
    precision: str = "fp16"
    stitch: str = "device"
    devices: int = 1


_FIRST = (
    Row(STOCK, "stock MONAI, strict fp32", "stock", precision=STRICT),
    Row(STOCK_ON_CPU, "stock MONAI, strict fp32, blended on the CPU", "stock", precision=STRICT, stitch="cpu"),
    Row(STOCK_HALF, "stock MONAI, fp16", "stock"),
    Row("0d", "stock MONAI, fp16, blended on the CPU", "stock", stitch="cpu"),
    Row(ARTICLE, "the article's loop, strict fp32", "article", precision=STRICT),
    Row("1b", "the same, torch's default precision", "article", precision=DEFAULT),
    Row("2", "the same, fp16", "article"),
    Row("3", "the same, TensorRT fp16", "article", "tensorrt"),
    Row("4", "the same, one softmaxed channel", "article, one channel", "tensorrt"),
    *(
        Row(f"5x{count}", f"the same, {count} GPUs, a thread each", "article, one channel", "tensorrt", devices=count)
        for count in _COUNTS
    ),
)


@dataclass(frozen=True)
class Plan:
    """What a ladder is measured on.

    Attributes:
        model: Folder of the bundle.
        devices: torch devices; rows with several take the first ones.
        shape: Voxels of the phantom.
        seed: Of the phantom.
        overlaps: Each is measured.
        repeats: Timed volumes of each row and overlap.
        only: Rows to be measured; none names all.
        pythons: Row -> interpreter that has its packages, and ctflow.
        cache: Folder of made engines.
    """

    model: Path
    devices: tuple[str, ...]
    shape: Size3 = SHAPE
    seed: int = 1000
    overlaps: tuple[float, ...] = OVERLAPS
    repeats: int = 3
    only: tuple[str, ...] = ()
    pythons: Mapping[str, str] | None = None
    cache: Path | None = None


def rows_for(devices: Sequence[str]) -> tuple[Row, ...]:
    """All rows of a machine: the article's, and every engine of ctflow for its kind of device and number of them."""
    return (*_FIRST, *_own_rows(devices))


def _own_rows(devices: Sequence[str]) -> Iterator[Row]:
    for name, precisions in backends_for(devices[0]):
        for precision in precisions:
            for count in (1, *(count for count in _COUNTS if count <= len(devices))):
                several, times = (f", {count} GPUs", f"x{count}") if count > 1 else ("", "")
                text = f"ctflow, {name} {precision}{several}"
                yield Row(f"{name}-{precision}{times}", text, "ctflow", name, precision, devices=count)


def run_ladder(plan: Plan, progress: Progress = silent) -> dict[str, Any]:
    """Measure every row that this machine can run.

    Args:
        plan: On what.
        progress: Told of the stages "draw phantom" and "measure rows".

    Returns:
        A JSON document: machine, model, case and rows; a row has a reason or its results, one for each overlap.

    Raises:
        SettingsInvalid: A row is named that does not exist.
        BundleInvalid: The bundle cannot be read.
    """
    rows = rows_for(plan.devices)
    _check_names(plan, rows)
    model = read_bundle(plan.model)
    chosen = [row for row in rows if not plan.only or row.id in plan.only]
    with tempfile.TemporaryDirectory(prefix="ctflow-ladder-") as folder:
        progress("draw phantom", 0, 1)
        case = _draw_case(plan, Path(folder))
        progress("draw phantom", 1, 1)
        answers: dict[str, dict[str, Any]] = {}
        progress("measure rows", 0, len(chosen))
        for done, row in enumerate(chosen, 1):
            answers[row.id] = _answer(row, plan, model, Path(folder))
            progress("measure rows", done, len(chosen))
        compared = _compared(chosen, answers, Path(folder))
    return {
        "ladder": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(plan.devices),
        "model": {
            "name": model.spec.name,
            "version": model.spec.version,
            "network": model.spec.network.name,
            "arguments": dict(model.spec.network.arguments),
            "weights_digest": model.weights_digest,
            "window": list(model.spec.roi),
        },
        "case": case,
        "batch_size": batch_range_for(model.spec, plan.devices[0])[1],
        "repeats": plan.repeats,
        "rows": compared,
    }


def _check_names(plan: Plan, rows: Sequence[Row]) -> None:
    known = [row.id for row in rows]
    for name in (*plan.only, *(plan.pythons or {})):
        if name not in known:
            raise SettingsInvalid(f"row {name!r} is none of {', '.join(known)}")


def _draw_case(plan: Plan, folder: Path) -> dict[str, Any]:
    """The phantom, in the folder for the rows, and what it is."""
    phantom = phantom_from_seed(plan.seed, plan.shape, tumours=TUMOURS)
    np.savez(folder / "case.npz", hu=phantom.volume.array, affine_mm=phantom.volume.geometry.affine_mm)
    np.save(folder / "truth.npy", np.packbits(phantom.labels))
    spacing = [round(mm, 4) for mm in phantom.volume.geometry.spacing_mm]
    return {"seed": plan.seed, "shape": list(plan.shape), "spacing_mm": spacing, "tumours": len(phantom.tumours)}


def _answer(row: Row, plan: Plan, model: Model, folder: Path) -> dict[str, Any]:
    """What the row's process says."""
    if row.devices > len(plan.devices):
        return {"reason": f"needs {row.devices} GPUs; {len(plan.devices)} given"}
    own = folder / row.id
    own.mkdir()
    request = Request(
        way=row.way,
        engine=row.engine,
        precision=row.precision,
        stitch=row.stitch,
        devices=plan.devices[: row.devices],
        model=str(plan.model.resolve()),
        case=str(folder / "case.npz"),
        overlaps=plan.overlaps,
        batch_size=batch_range_for(model.spec, plan.devices[0])[1],
        repeats=plan.repeats,
        cache=str(plan.cache.resolve()) if plan.cache else None,
        result=str(own),
    )
    (own / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
    python = (plan.pythons or {}).get(row.id, sys.executable)
    try:
        done = subprocess.run(
            (python, "-m", "ctflow.bench.row", str(own / "request.json")), capture_output=True, check=False
        )
    except OSError as error:
        return {"reason": f"{python} does not start: {error.strerror}"}
    try:
        answer: dict[str, Any] = json.loads((own / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return {"reason": f"its process ended with {done.returncode}: {last[:200]}"}
    return answer


def _compared(rows: Sequence[Row], answers: Mapping[str, Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Each row with its factors and Dice."""
    truth = np.unpackbits(np.load(folder / "truth.npy"))
    medians = {name: _medians(answer) for name, answer in answers.items()}
    document = []
    for row in rows:
        answer = answers[row.id]
        entry: dict[str, Any] = {**asdict(row), "reason": answer.get("reason")}
        if entry["reason"] is None:
            entry |= {key: answer[key] for key in ("engine", "versions", "memory_bytes")}
            entry["results"] = [
                _result(row, number, measured, medians, folder, truth)
                for number, measured in enumerate(answer["measured"])
            ]
        document.append(entry)
    return document


def _medians(answer: Mapping[str, Any]) -> list[float]:
    return [statistics.median(measured["seconds"]) for measured in answer.get("measured", ())]


def _result(
    row: Row,
    number: int,
    measured: Mapping[str, Any],
    medians: Mapping[str, Sequence[float]],
    folder: Path,
    truth: np.ndarray[Any, Any],
) -> dict[str, Any]:
    """One overlap of a row: factors say how many times quicker it is than another row."""
    own = medians[row.id][number]
    mask = np.unpackbits(np.load(folder / row.id / f"mask-{number}.npy"))

    def factor(other: str) -> float | None:
        return round(medians[other][number] / own, 3) if medians.get(other) else None

    reference = folder / ARTICLE / f"mask-{number}.npy"
    return {
        **measured,
        "median_s": round(own, 4),
        "spread_s": round(max(measured["seconds"]) - min(measured["seconds"]), 4),
        "factor_to_stock": factor(STOCK),
        "factor_to_stock_half": factor(STOCK_HALF),
        "factor_to_article": factor(ARTICLE),
        "dice_to_article": _dice(mask, np.unpackbits(np.load(reference))) if reference.exists() else None,
        "dice_to_truth": _dice(mask, truth),
    }


def _dice(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    both = int(np.count_nonzero(first & second))
    sizes = int(np.count_nonzero(first)) + int(np.count_nonzero(second))
    return round(2 * both / sizes, 6) if sizes else 1.0


def _machine(devices: Sequence[str]) -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(device) for device in devices if device.startswith("cuda")]
    return {
        "gpus": gpus,
        "driver": driver_version() if gpus else None,
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def all_devices(setting: str | None) -> tuple[str, ...]:
    """The devices of a setting; None takes every GPU, or the CPU where there is none.

    Raises:
        BackendUnavailable: One of them is not there.
    """
    count = torch.cuda.device_count()
    return devices_from_setting(f"cuda:{','.join(map(str, range(count)))}" if setting is None and count else setting)
