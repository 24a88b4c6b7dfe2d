"""Every configuration from stock MONAI to ctflow's engines, measured on this machine and compared."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ctflow.bench.case import check_shape, draw_case
from ctflow.bench.measurement import TORCH, MeasurementRequest
from ctflow.bench.results import Configuration, DiceOfMasks, compared_results, configurations_for
from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.core.model import Model
from ctflow.core.package import digest_of_package
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.hardware import driver_version
from ctflow.engines.registry import backend_module, batch_range_for, devices_from_setting
from ctflow.settings.run import read_environment

SHAPE: Size3 = (300, 512, 512)
OVERLAPS = (0.0, 0.25)
LIMIT_S = 900.0
_KINDS = ("cpu", "cuda:0")  # of devices: each has configurations of its own
# The code that a configuration's seconds and mask depend on: after a change it is measured again.
_MEASURED = (
    "ctflow",
    "ctflow.core",
    "ctflow.settings",
    "ctflow.pipeline",
    "ctflow.pipeline.overlap",
    "ctflow.transforms",
    "ctflow.transforms.by_monai",
    "ctflow.measurements",
    "ctflow.bench",
    "ctflow.engines",
    "ctflow.engines.store",
    "ctflow.engines.tensorrt",
    "ctflow.kernels",
    "ctflow.kernels.machine_code",
    "ctflow.networks",
    "ctflow.networks.channels_last",
    "ctflow.networks.native",
    "ctflow.window",
)

Heard = Callable[[Mapping[str, Any]], None]


def discard_document(document: Mapping[str, Any]) -> None:
    """A `heard` that does nothing."""


@dataclass(frozen=True)
class Comparison:
    """The parameters of a comparison.

    Attributes:
        model: Folder of the bundle.
        devices: torch devices; configurations with several take the first ones.
        shape: Voxels of the phantom.
        seed: Seed of the phantom.
        overlaps: Overlaps to measure.
        repeats: Timed volumes of each configuration and overlap.
        only: Configurations to measure, in this order; empty means all, from stock to ctflow's.
        pythons: Configuration -> interpreter that has its packages, and ctflow.
        cache: Folder of stored engines.
        limit_s: A configuration that takes longer is ended.
        kept: Folder in which configurations are kept, with their output; one measured before with the same
            request, phantom, interpreter and code is not measured again. None keeps nothing.
        measure: Whether configurations that are not kept are measured and the phantom is drawn; else nothing runs.
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


def compare_configurations(
    comparison: Comparison, progress: Progress = silent, heard: Heard = discard_document
) -> dict[str, Any]:
    """Measure every configuration that this machine can run.

    Args:
        comparison: Its parameters.
        progress: Receives the stages "draw phantom" and "measure configurations".
        heard: Called with the current document after each configuration.

    Returns:
        A JSON document: machine, model, case and configurations; a configuration has a status ("measured", "refused"
        or "crashed") and its results, one for each overlap, or a reason.

    Raises:
        SettingsInvalid: A named configuration does not exist, the phantom cannot have this shape, or nothing
            is to be measured and nothing is kept.
        BundleInvalid: The bundle cannot be read.
    """
    check_comparison(comparison)
    chosen = _chosen_configurations(comparison)
    model = read_bundle(comparison.model)
    with _work_folder(comparison) as folder:
        progress("draw phantom", 0, 1)
        case = draw_case(folder, seed=comparison.seed, shape=comparison.shape, draw=comparison.measure)
        progress("draw phantom", 1, 1)
        document = _head(comparison, model, case)
        answers: dict[str, dict[str, Any]] = {}
        dice = DiceOfMasks(folder)
        progress("measure configurations", 0, len(chosen))
        for done, configuration in enumerate(chosen, 1):
            answers[configuration.id] = _answer(configuration, comparison, model, case["digest"], folder)
            compared = compared_results(chosen[:done], answers, dice)
            document = {**document, "date": _last_date(compared) or document["date"], "configurations": compared}
            progress("measure configurations", done, len(chosen))
            heard(document)
    return document


@contextmanager
def _work_folder(comparison: Comparison) -> Iterator[Path]:
    if comparison.kept is not None:
        if comparison.measure:
            comparison.kept.mkdir(parents=True, exist_ok=True)
        yield comparison.kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="ctflow-comparison-") as folder:
        yield Path(folder)


def _head(comparison: Comparison, model: Model, case: Mapping[str, Any]) -> dict[str, Any]:
    """The facts shared by all configurations."""
    spec = model.spec
    return {
        "comparison": 1,
        "date": time.strftime("%Y-%m-%d"),
        "machine": _machine(comparison.devices),
        "model": {
            "name": spec.name,
            "version": spec.version,
            "network": spec.network.name,
            "arguments": dict(spec.network.arguments),
            "weights_digest": model.weights_digest,
            "window": list(spec.roi),
        },
        "case": dict(case),
        "batch_size": batch_range_for(spec, comparison.devices[0])[1],
        "repeats": comparison.repeats,
        "configurations": [],
    }


def check_comparison(comparison: Comparison) -> None:
    """Check what needs no computation, before anything is made.

    Raises:
        SettingsInvalid: A named configuration does not exist, or the phantom cannot have this shape.
    """
    check_shape(comparison.shape)
    _chosen_configurations(comparison)


def _chosen_configurations(comparison: Comparison) -> list[Configuration]:
    """The configurations to measure, in the order in which they are named; those of another kind of device, too."""
    here = {each.id: each for each in configurations_for(comparison.devices)}
    known = {each.id: each for kind in _KINDS for each in configurations_for((kind,))} | here
    for name in (*comparison.only, *(comparison.pythons or {})):
        if name not in known:
            raise SettingsInvalid(
                f"invalid configuration {name!r} (choose from {', '.join(here)})", reason="invalid-value"
            )
    return [known[name] for name in dict.fromkeys(comparison.only)] or list(here.values())


def _answer(
    configuration: Configuration, comparison: Comparison, model: Model, case: str, folder: Path
) -> dict[str, Any]:
    """The answer of the configuration's process."""
    if configuration not in configurations_for(comparison.devices):
        return _refused("needs a GPU" if comparison.devices[0] == "cpu" else "needs --device cpu")
    if configuration.devices > len(comparison.devices):
        return _refused(f"needs {configuration.devices} GPUs; {len(comparison.devices)} given")
    python = (comparison.pythons or {}).get(configuration.id, sys.executable)
    if configuration.engine != TORCH and python == sys.executable:
        try:
            backend_module(configuration.engine)
        except BackendUnavailable as error:  # spares a process
            return _refused(str(error))
    own = folder / configuration.id
    code = (digest_of_package(name) for name in _MEASURED)
    basis = (model.weights_digest, case, python, *code)
    request = json.dumps(asdict(_request(configuration, comparison, model, basis, folder)))
    known = _known_answer(own, request)
    if known is not None and (_is_whole(known) or not comparison.measure):
        return known
    if not comparison.measure:
        return _refused("it is not stored in this folder")
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    (own / "request.json").write_text(request, encoding="utf-8")
    crash = _crash_of_process(python, own, comparison.limit_s)
    answer = _known_answer(own, request) if crash is None else None
    if answer is None:
        answer = {"status": "crashed", "reason": crash or "its process gave no answer"}
        (own / "result.json").write_text(json.dumps(answer), encoding="utf-8")  # for readers of the kept folder
    return answer


def _refused(reason: str) -> dict[str, Any]:
    return {"status": "refused", "reason": reason}


def _is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether everything was measured: a refused one, for example without a plan, may be possible now."""
    return answer["status"] == "measured" and not any(entry["reason"] for entry in answer["measured"])


def _request(
    configuration: Configuration, comparison: Comparison, model: Model, basis: tuple[str, ...], folder: Path
) -> MeasurementRequest:
    return MeasurementRequest(
        method=configuration.method,
        engine=configuration.engine,
        precision=configuration.precision,
        stitch=configuration.stitch,
        devices=comparison.devices[: configuration.devices],
        model=str(comparison.model.resolve()),
        case=str(folder / "case.npz"),
        overlaps=comparison.overlaps,
        batch_size=batch_range_for(model.spec, comparison.devices[0])[1],
        repeats=comparison.repeats,
        cache=str(comparison.cache.resolve()) if comparison.cache else None,
        result=str(folder / configuration.id),
        basis=basis,
    )


def _known_answer(own: Path, request: str) -> dict[str, Any] | None:
    """The answer to exactly this request, if there is one."""
    try:
        if (own / "request.json").read_text(encoding="utf-8") != request:
            return None
        answer: dict[str, Any] = json.loads((own / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"status": "refused" if answer.get("reason") else "measured", **answer}


def _crash_of_process(python: str, own: Path, limit_s: float) -> str | None:
    """Run the configuration; its output goes to `log.txt` in its folder.

    Returns:
        Why it gave no answer; None if it did.
    """
    environment = dict(read_environment())
    if python != sys.executable:  # this interpreter's paths may be another version's; a script may set its own
        for name in ("PYTHONPATH", "PYTHONHOME"):
            environment.pop(name, None)
    command = (python, "-m", "ctflow.bench.measurement", str(own / "request.json"))
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


def _last_date(configurations: Sequence[Mapping[str, Any]]) -> str | None:
    """Date of the latest measurement of these configurations, which may be long before a document shows it."""
    return max((each["date"] for each in configurations if "date" in each), default=None)


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
        BackendUnavailable: One of them does not exist.
    """
    count = torch.cuda.device_count()
    return devices_from_setting(f"cuda:{','.join(map(str, range(count)))}" if setting is None and count else setting)
