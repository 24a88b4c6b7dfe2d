"""From stock PyTorch to ctflow in steps: the starting article's ladder, each rung measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctflow.bench.exactness import dice_of
from ctflow.bench.row import DEFAULT, STRICT, TORCH, Request
from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.core.model import Model
from ctflow.core.package import digest_of_package
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.choose import backend_module, backends_for, batch_range_for, devices_from_setting
from ctflow.engines.hardware import driver_version
from ctflow.phantom import phantom_from_seed
from ctflow.settings.run import read_environment

SHAPE: Size3 = (300, 512, 512)
OVERLAPS = (0.0, 0.25)
TUMOURS = 4
LIMIT_S = 900.0
STOCK, STOCK_HALF, ARTICLE = "0a", "0c", "1"  # what other rows are compared with
_COUNTS = (2, 4)  # devices of the rows with several
# What a row's seconds and mask depend on: of other code, it is measured again.
_DRAWING = ("ctflow.phantom", "ctflow.phantom.body", "ctflow.phantom.scene")
_MEASURED = (
    "ctflow",
    "ctflow.core",
    "ctflow.settings",
    "ctflow.pipeline",
    "ctflow.transforms",
    "ctflow.measurements",
    "ctflow.bench",
    "ctflow.engines",
    "ctflow.engines.store",
    "ctflow.kernels",
    "ctflow.networks",
    "ctflow.window",
)

Heard = Callable[[Mapping[str, Any]], None]


def unheard(document: Mapping[str, Any]) -> None:
    """A `heard` that tells nobody."""


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


_ONE_CHANNEL = "the article's one channel, TensorRT fp16"
_FIRST = (
    Row(STOCK, "stock MONAI, strict fp32", "stock", precision=STRICT),
    Row("0b", "stock MONAI, strict fp32, blended on the CPU", "stock", precision=STRICT, stitch="cpu"),
    Row(STOCK_HALF, "stock MONAI, fp16", "stock"),
    Row("0d", "stock MONAI, fp16, blended on the CPU", "stock", stitch="cpu"),
    Row(ARTICLE, "the article's loop, strict fp32", "article", precision=STRICT),
    Row("1b", "the article's loop, torch's default precision", "article", precision=DEFAULT),
    Row("2", "the article's loop, fp16", "article"),
    Row("3", "the article's loop, TensorRT fp16", "article", "tensorrt"),
    Row("4", _ONE_CHANNEL, "article, one channel", "tensorrt"),
    *(
        Row(f"5x{count}", f"{_ONE_CHANNEL}, {count} GPUs", "article, one channel", "tensorrt", devices=count)
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
        only: Rows to be measured, in this order; none names all, from stock to ctflow's.
        pythons: Row -> interpreter that has its packages, and ctflow.
        cache: Folder of made engines.
        limit_s: A row that takes longer is ended.
        kept: Folder in which rows are kept, with what they said; one that was measured before with the same request,
            phantom, interpreter and code is not measured again. None keeps nothing.
        measure: Whether rows that are not kept are measured and the phantom is drawn; else nothing runs.
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
    limit_s: float = LIMIT_S
    kept: Path | None = None
    measure: bool = True


def rows_for(devices: Sequence[str]) -> tuple[Row, ...]:
    """All rows of a machine: the article's, and every engine of ctflow for its kind of device and number of them."""
    return (*_FIRST, *_own_rows(devices))


def _own_rows(devices: Sequence[str]) -> Iterator[Row]:
    for name, precisions in backends_for(devices[0]):
        for precision in precisions:
            for count in (1, *_COUNTS):
                several, times = (f", {count} GPUs", f"x{count}") if count > 1 else ("", "")
                text = f"ctflow, {name} {precision}{several}"
                yield Row(f"{name}-{precision}{times}", text, "ctflow", name, precision, devices=count)


def run_ladder(plan: Plan, progress: Progress = silent, heard: Heard = unheard) -> dict[str, Any]:
    """Measure every row that this machine can run.

    Args:
        plan: On what.
        progress: Told of the stages "draw phantom" and "measure rows".
        heard: Given the document after each row, as it is then.

    Returns:
        A JSON document: machine, model, case and rows; a row has a status ("measured", "refused" or "crashed") and its
        results, one for each overlap, or a reason.

    Raises:
        SettingsInvalid: A row is named that does not exist, the phantom cannot have this shape, or nothing shall be
            measured and nothing is kept.
        BundleInvalid: The bundle cannot be read.
    """
    chosen = _chosen(plan)
    model = read_bundle(plan.model)
    with _work_folder(plan) as folder:
        progress("draw phantom", 0, 1)
        case = _draw_case(plan, folder)
        progress("draw phantom", 1, 1)
        document = _head(plan, model, case)
        answers: dict[str, dict[str, Any]] = {}
        dice = _DiceOfMasks(folder)
        progress("measure rows", 0, len(chosen))
        for done, row in enumerate(chosen, 1):
            answers[row.id] = _answer(row, plan, model, case["digest"], folder)
            compared = _compared(chosen[:done], answers, dice)
            document = {**document, "date": _last_date(compared) or document["date"], "rows": compared}
            progress("measure rows", done, len(chosen))
            heard(document)
    return document


@contextmanager
def _work_folder(plan: Plan) -> Iterator[Path]:
    if plan.kept is not None:
        plan.kept.mkdir(parents=True, exist_ok=True)
        yield plan.kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ctflow-ladder-") as folder:
        yield Path(folder)


def _head(plan: Plan, model: Model, case: Mapping[str, Any]) -> dict[str, Any]:
    """What is the same for all rows."""
    spec = model.spec
    return {
        "ladder": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(plan.devices),
        "model": {
            "name": spec.name,
            "version": spec.version,
            "network": spec.network.name,
            "arguments": dict(spec.network.arguments),
            "weights_digest": model.weights_digest,
            "window": list(spec.roi),
        },
        "case": dict(case),
        "batch_size": batch_range_for(spec, plan.devices[0])[1],
        "repeats": plan.repeats,
        "rows": [],
    }


def _chosen(plan: Plan) -> list[Row]:
    """The rows to be measured, in the order in which they are named."""
    known = {row.id: row for row in rows_for(plan.devices)}
    for name in (*plan.only, *(plan.pythons or {})):
        if name not in known:
            raise SettingsInvalid(f"row {name!r} is none of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(plan.only)] or list(known.values())


def _draw_case(plan: Plan, folder: Path) -> dict[str, Any]:
    """The phantom, in the folder for the rows, and what it is; drawn unless the very same lies there."""
    code = "".join(digest_of_package(name) for name in _DRAWING)
    recipe = {"seed": plan.seed, "shape": list(plan.shape), "tumours": TUMOURS, "code": code}
    kept = _kept_case(folder, recipe)
    if kept is not None:
        return kept
    if not plan.measure:
        raise SettingsInvalid(
            "--only-kept: no ladder of this phantom is kept there; name its folder, --shape and --seed"
        )
    try:
        phantom = phantom_from_seed(plan.seed, plan.shape, tumours=TUMOURS)
    except ValueError as error:
        raise SettingsInvalid(f"--shape: {error}") from error
    (folder / "case.json").unlink(missing_ok=True)
    np.savez(folder / "case.npz", hu=phantom.volume.array, affine_mm=phantom.volume.geometry.affine_mm)
    truth = np.packbits(phantom.labels)
    np.save(folder / "truth.npy", truth)
    case = {
        "digest": _digest_of(phantom.volume.array),
        "seed": plan.seed,
        "shape": list(plan.shape),
        "spacing_mm": [round(mm, 4) for mm in phantom.volume.geometry.spacing_mm],
        "tumours": len(phantom.tumours),
    }
    document = {"recipe": recipe, "case": case, "truth": _digest_of(truth)}
    (folder / "case.json").write_text(json.dumps(document), encoding="utf-8")
    return case


def _kept_case(folder: Path, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an earlier run kept, if it is of this recipe and whole; drawing it anew takes half a minute."""
    try:
        document = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        with (folder / "case.npz").open("rb") as file, np.load(file) as arrays:
            digest = _digest_of(arrays["hu"])
        case: dict[str, Any] = document["case"]
        whole = case["digest"] == digest and document["truth"] == _digest_of(np.load(folder / "truth.npy"))
        return case if whole and document["recipe"] == recipe else None
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile):  # ended while it was written
        return None


def _digest_of(array: npt.NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def _answer(row: Row, plan: Plan, model: Model, case: str, folder: Path) -> dict[str, Any]:
    """What the row's process says."""
    if row.devices > len(plan.devices):
        return _refused(f"needs {row.devices} GPUs; {len(plan.devices)} given")
    python = (plan.pythons or {}).get(row.id, sys.executable)
    if row.engine != TORCH and python == sys.executable:
        try:
            backend_module(row.engine)
        except BackendUnavailable as error:  # spares a process
            return _refused(str(error))
    own = folder / row.id
    code = (digest_of_package(name) for name in _MEASURED)
    request = json.dumps(asdict(_request(row, plan, model, (model.weights_digest, case, python, *code), folder)))
    known = _known_answer(own, request)
    if known is not None and (_is_whole(known) or not plan.measure):
        return known
    if not plan.measure:
        return _refused("it is not kept in this folder")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    (own / "request.json").write_text(request, encoding="utf-8")
    crash = _crash_of_process(python, own, plan.limit_s)
    answer = _known_answer(own, request) if crash is None else None
    if answer is None:
        answer = {"status": "crashed", "reason": crash or "its process gave no answer"}
        (own / "result.json").write_text(json.dumps(answer), encoding="utf-8")  # for who asks what is kept
    return answer


def _refused(reason: str) -> dict[str, Any]:
    return {"status": "refused", "reason": reason}


def _is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether everything was measured: what was refused, for want of a plan perhaps, may be possible now."""
    return answer["status"] == "measured" and not any(entry["reason"] for entry in answer["measured"])


def _request(row: Row, plan: Plan, model: Model, basis: tuple[str, ...], folder: Path) -> Request:
    return Request(
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
        result=str(folder / row.id),
        basis=basis,
    )


def _known_answer(own: Path, request: str) -> dict[str, Any] | None:
    """The answer to this very request, if there is one."""
    try:
        if (own / "request.json").read_text(encoding="utf-8") != request:
            return None
        answer: dict[str, Any] = json.loads((own / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"status": "refused" if answer.get("reason") else "measured", **answer}


def _crash_of_process(python: str, own: Path, limit_s: float) -> str | None:
    """Run the row; its words are kept in `log.txt` beside it.

    Returns:
        Why it gave no answer; None if it did.
    """
    environment = dict(read_environment())
    if python != sys.executable:  # what this interpreter needs may be another version's; a script may set its own
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    command = (python, "-m", "ctflow.bench.row", str(own / "request.json"))
    try:
        with (own / "log.txt").open("wb") as log:
            done = subprocess.run(
                command, cwd=own, env=environment, stdout=log, stderr=log, timeout=limit_s, check=False
            )
    except OSError as error:
        return f"{python} does not start: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"took longer than {limit_s:g} s"
    if done.returncode == 0:
        return None
    said = (own / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"its process ended with {done.returncode}: {(said or ['it said nothing'])[-1][:200]}"


class _DiceOfMasks:
    """Dice of kept masks. Each is computed once: at full size it takes a tenth of a second.

    Args:
        folder: Of rows and truth; a row is measured before it is compared, and not again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str, int], float] = {}

    def __call__(self, row: str, other: str | None, number: int) -> float:
        """Of a row's mask at an overlap to another row's, or to the truth (None)."""
        key = (row, other or "", number)
        if key not in self._known:
            truth = self._mask("truth.npy") if other is None else self._mask(f"{other}/mask-{number}.npy")
            self._known[key] = round(dice_of(self._mask(f"{row}/mask-{number}.npy"), truth), 6)
        return self._known[key]

    def _mask(self, name: str) -> npt.NDArray[np.uint8]:
        return np.unpackbits(np.load(self._folder / name))


def _compared(
    rows: Sequence[Row], answers: Mapping[str, Mapping[str, Any]], dice: _DiceOfMasks
) -> list[dict[str, Any]]:
    """Each row with its factors and Dice."""
    document = []
    for row in rows:
        answer = answers[row.id]
        entry: dict[str, Any] = {**asdict(row), "status": answer["status"], "reason": answer["reason"]}
        if answer["status"] == "measured":
            entry |= {name: answer[name] for name in ("date", "engine_info", "versions")}
            entry["results"] = [_result(row, number, answers, dice) for number in range(len(answer["measured"]))]
        document.append(entry)
    return document


def _last_date(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """When the last of these rows was measured, which may be long before a document shows it."""
    return max((row["date"] for row in rows if "date" in row), default=None)


def _median(answers: Mapping[str, Mapping[str, Any]], name: str, number: int) -> float | None:
    """Median seconds of a row at an overlap; None where it was not measured."""
    answer = answers.get(name, {})
    if answer.get("status") != "measured" or answer["measured"][number]["reason"]:
        return None
    seconds: list[float] = answer["measured"][number]["seconds"]
    return statistics.median(seconds)


def _result(row: Row, number: int, answers: Mapping[str, Mapping[str, Any]], dice: _DiceOfMasks) -> dict[str, Any]:
    """One overlap of a row: factors say how many times quicker it is than another row."""
    measured: dict[str, Any] = answers[row.id]["measured"][number]
    own = _median(answers, row.id, number)
    if own is None:
        return measured

    def factor(other: str) -> float | None:
        seconds = _median(answers, other, number)
        return None if seconds is None else round(seconds / own, 3)

    def dice_to(other: str) -> float | None:
        return None if _median(answers, other, number) is None else dice(row.id, other, number)

    return {
        **measured,
        "median_s": round(own, 4),
        "spread_s": round(max(measured["seconds"]) - min(measured["seconds"]), 4),
        "factor_to_stock": factor(STOCK),
        "factor_to_stock_half": factor(STOCK_HALF),
        "factor_to_article": factor(ARTICLE),
        "dice_to_stock": dice_to(STOCK),
        "dice_to_article": dice_to(ARTICLE),
        "dice_to_truth": dice(row.id, None, number),
    }


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
