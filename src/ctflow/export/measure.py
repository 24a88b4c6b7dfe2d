"""Which engine is the fastest here that computes what the model computes: measured once a machine and model, kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ctflow.core.atomic import write_atomically
from ctflow.core.errors import (
    BackendUnavailable,
    CtflowError,
    DeviceOutOfMemory,
    EngineMismatch,
    ModelError,
    NetworkNotTaken,
    OutputError,
    ParityFailed,
    ResourceError,
)
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.choose import backend_module, backend_names, batches_worth_timing, open_engine
from ctflow.engines.contract import Engine, Precision
from ctflow.engines.onnxfile import software_versions
from ctflow.export.examples import example_windows
from ctflow.export.parity import ParityResult, check_parity, is_reference, reference_logits
from ctflow.export.prepare import is_made_anywhere, is_prepared, prepare_engine
from ctflow.export.record import Agreements, machine, what_is_computed

_STAGE = "measure engines"
_FORMAT = 4  # of the record
_WORTH = 0.98  # of a smaller batch's seconds: a larger one takes more memory
_LONGEST_S = 3.0  # no repetition starts later

# Failures that another day or machine may not have: what was measured under them is not kept.
_PASSING = (ResourceError, EngineMismatch, ImportError, RuntimeError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """One engine on this machine.

    Attributes:
        backend: Its name.
        precision: Number format of the heavy arithmetic.
        window_seconds: Wall time of one window, the best of a few, in batches as large as the engine takes; None if it
            could not be made or run.
        parity: How near it is to PyTorch in fp32 on windows of a phantom; None if it was not compared: it is what the
            others are compared with, or a faster one is good.
        reason: Why it is not used; None if it can be.
        batch: Windows at once that were timed; None if none were.
    """

    backend: str
    precision: Precision
    window_seconds: float | None
    parity: ParityResult | None
    reason: str | None
    batch: int | None = None


@dataclass(frozen=True)
class Choice:
    """What was measured, and which engine and precision that chose, with how many windows at once (None: as asked)."""

    backend: str
    precision: Precision
    measured: tuple[Measured, ...]
    batch: int | None = None


def choose_fastest(
    model: Model,
    *,
    device: str,
    precision: Precision | None,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path,
    make: bool = False,
    logits_only: bool = False,
    agreements: Agreements | None = None,
    measured: Sequence[Measured] = (),
    progress: Progress = silent,
) -> Choice:
    """The fastest engine that agrees with PyTorch in fp32; from the record in the cache, or measured and recorded.

    Args:
        model: The model.
        device: torch device.
        precision: Number format of the heavy arithmetic; None lets each backend try its own.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted.
        cache_dir: Keeps engines and the record.
        make: Whether engines that take minutes to make are made; else only those in the cache take part.
        logits_only: Whether masks do not count, for random weights (`ctflow.export.parity.check_parity`).
        agreements: Which engines have failed on a CT and are not taken; None looks into the cache.
        measured: What was measured before, to choose from again once the engine that was chosen has failed on a CT.
        progress: Told of each engine as stage "measure engines".

    Returns:
        The choice; its engine's file is in the cache.

    Raises:
        BackendUnavailable: No backend computes with this device and precision.
        DeviceOutOfMemory: None can be used, one of them only for want of memory, which may be free another time.
        ModelError: No engine can be made from the model, or none that is left agrees.
        OutputError: The cache cannot be written.
    """
    settings = {"device": device, "roi": roi, "batch_range": batch_range}
    candidates = [
        (name, chosen)
        for name, chosen in _fitting_backends(device, precision)
        if make or is_prepared(name, model, precision=chosen, **settings, cache_dir=cache_dir)  # type: ignore[arg-type]
    ]
    if len(candidates) == 1:  # nothing to compare: no minutes for a measurement
        return Choice(*candidates[0], ())
    path = cache_dir / f"choice-{_key(model, settings, candidates, logits_only=logits_only)}.json"
    agreements = agreements or Agreements(model, cache_dir)
    known = None if measured else _read_choice(path, candidates)
    if known is not None:
        if not agreements.failed_on(known.backend, known.precision, device, roi):
            return known
        measured = known.measured  # it failed on a CT after that, on a device like this one: the next fastest
    gate = _Gate(model, roi, agreements, logits_only=logits_only)
    timed: Sequence[Measured] = measured
    failures: list[Exception] = []
    if not measured:
        timed, failures = _time_all(candidates, model, gate.windows[0], cache_dir, settings, progress)
    choice = _first_exact(timed, gate, cache_dir, settings, failures)
    if not any(isinstance(failure, _PASSING) for failure in failures):
        _write_choice(choice, path)
    return choice


def _time_all(
    candidates: Sequence[tuple[str, Precision]],
    model: Model,
    window: Tensor,
    cache_dir: Path,
    settings: Mapping[str, Any],
    progress: Progress,
) -> tuple[list[Measured], list[Exception]]:
    """Every candidate, timed or set aside, and why those were that a warning tells of."""
    timed: list[Measured] = []
    failures: list[Exception] = []
    progress(_STAGE, 0, len(candidates))
    for done, (name, chosen) in enumerate(candidates, start=1):
        timed.append(_time_engine(name, model, window, cache_dir, {**settings, "precision": chosen}, failures))
        progress(_STAGE, done, len(candidates))
    return timed, failures


def engines_not_made(
    model: Model,
    *,
    device: str,
    precision: Precision | None,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path | None,
) -> tuple[str, ...]:
    """Backends of this machine that take no part in a choice only because nobody has made their files yet.

    Args:
        model: The model.
        device: torch device.
        precision: Number format of the heavy arithmetic; None lets each backend try its own.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted.
        cache_dir: Keeps engines, or None.

    Raises:
        BackendUnavailable: No backend computes with this device and precision.
        EngineMismatch: A stored file is damaged.
    """
    settings: dict[str, Any] = {"device": device, "roi": roi, "batch_range": batch_range, "cache_dir": cache_dir}
    fitting = _fitting_backends(device, precision)
    made = {name for name, chosen in fitting if is_prepared(name, model, precision=chosen, **settings)}
    return tuple(dict.fromkeys(name for name, _ in fitting if name not in made))


def measure_engine(
    name: str,
    model: Model,
    *,
    device: str,
    precision: Precision | None,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path,
    logits_only: bool = False,
    progress: Progress = silent,
) -> Measured:
    """Make one engine if it is not there, time it and compare it with PyTorch in fp32.

    Args:
        name: The backend.
        model: The model.
        device: torch device.
        precision: Number format of the heavy arithmetic; None is the backend's own.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted.
        cache_dir: Where engines are kept.
        logits_only: Whether masks do not count, for random weights (`ctflow.export.parity.check_parity`).
        progress: Told of the making.

    Returns:
        What was measured; only that it was made, and why no more, where a machine makes an engine for another one.

    Raises:
        ParityFailed: It computes something else.
        CtflowError: It cannot be made or run here.
    """
    chosen = precision or backend_module(name).precisions(device)[-1]
    settings = {"device": device, "precision": chosen, "roi": roi, "batch_range": batch_range}
    prepare_engine(name, model, cache_dir=cache_dir, logits_only=logits_only, progress=progress, **settings)  # type: ignore[arg-type]
    gate = _Gate(model, roi, Agreements(model, cache_dir), logits_only=logits_only)
    try:
        seconds, batch = _fastest_batch(name, model, gate.windows[0], cache_dir, settings)
    except BackendUnavailable as error:
        if not is_made_anywhere(name):
            raise
        return Measured(name, chosen, None, None, f"made, not run here: {error}")
    taken = {**settings, "batch_range": (batch_range[0], batch)}
    parity = None if is_reference(name, chosen) else _parity(name, gate, cache_dir, taken)
    return Measured(name, chosen, seconds, parity, None, batch)


def _fitting_backends(device: str, precision: Precision | None) -> list[tuple[str, Precision]]:
    """Backends that this machine has for the device, with the precisions that each would try."""
    fitting: list[tuple[str, Precision]] = []
    reasons = []
    for name in backend_names("auto", device):
        try:
            module = backend_module(name)
            for chosen in (precision,) if precision is not None else module.precisions(device):
                module.check_settings(device, chosen)
                fitting.append((name, chosen))
        except BackendUnavailable as error:
            reasons.append(str(error))
    if not fitting:
        raise BackendUnavailable("; ".join(reasons), reason="no-engine")
    return fitting


def _key(
    model: Model, settings: Mapping[str, Any], candidates: Sequence[tuple[str, Precision]], *, logits_only: bool
) -> str:
    """Digest of everything that the choice depends on."""
    versions = [backend_module(name).is_available()[1] for name, _ in candidates]
    where = [machine(settings["device"]), software_versions(), versions]
    fields = [*what_is_computed(model), *where, settings, candidates, logits_only]
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_choice(path: Path, candidates: Sequence[tuple[str, Precision]]) -> Choice | None:
    """A record of an earlier measurement; a damaged one is measured again."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        measured = tuple(
            Measured(**{**entry, "parity": entry["parity"] and ParityResult(**entry["parity"])})
            for entry in document["measured"]
        )
        choice = Choice(document["backend"], document["precision"], measured, document["batch"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = choice.batch is None or (type(choice.batch) is int and choice.batch >= 1)
    known = document.get("format") == _FORMAT and (choice.backend, choice.precision) in candidates
    return choice if whole and known else None


def _write_choice(choice: Choice, path: Path) -> None:
    document = json.dumps({"format": _FORMAT, **asdict(choice)}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # an engine without a file has left none there
        write_atomically(path, lambda stream: stream.write(document.encode()))
    except (OutputError, OSError) as error:  # the engines may lie in a folder that can only be read
        log.warning("the choice of an engine is not kept: %s", error)


def _time_engine(
    name: str,
    model: Model,
    window: Tensor,
    cache_dir: Path,
    settings: Mapping[str, Any],
    failures: list[Exception],
) -> Measured:
    """Time one of several engines; one that cannot be made or run is set aside with its reason."""
    try:
        prepare_engine(name, model, cache_dir=cache_dir, **settings)
        seconds, batch = _fastest_batch(name, model, window, cache_dir, settings)
        return Measured(name, settings["precision"], seconds, None, None, batch)
    except OutputError:
        raise
    except NetworkNotTaken as error:  # for good: no failure, and nothing to warn of
        log.info("engine %s takes no part: %s", name, error)
        return Measured(name, settings["precision"], None, None, str(error))
    # Libraries that do not load or run raise ImportError and RuntimeError; another engine may do.
    except (CtflowError, ImportError, RuntimeError) as error:
        failures.append(error)
        log.warning("engine %s is set aside: %s", name, error)
        return Measured(name, settings["precision"], None, None, str(error))


def _fastest_batch(
    name: str, model: Model, window: Tensor, cache_dir: Path, settings: Mapping[str, Any]
) -> tuple[float, int]:
    """Seconds a window with the batch that suits this machine best, and that batch."""
    smallest, wanted = settings["batch_range"]
    best, chosen = _seconds_a_window(name, model, window, cache_dir, settings), wanted
    for batch in batches_worth_timing(name, wanted)[1:]:
        try:
            seconds = _seconds_a_window(name, model, window, cache_dir, {**settings, "batch_range": (smallest, batch)})
        except (ModelError, ResourceError) as error:  # too little memory, say: nor is there enough for more
            log.info("engine %s takes no batch of %d: %s", name, batch, error)
            break
        if seconds < _WORTH * best:
            best, chosen = seconds, batch
    return best, chosen


def _seconds_a_window(name: str, model: Model, window: Tensor, cache_dir: Path, settings: Mapping[str, Any]) -> float:
    engine = open_engine(name, model, cache_dir=cache_dir, **settings)
    try:
        count = engine.info.batch_range[1]
        batch = window.to(engine.info.device).expand(count, -1, -1, -1, -1).contiguous()
        engine.predict(batch)  # the first takes memory and compiles
        best, started = math.inf, time.perf_counter()
        while time.perf_counter() - started < _LONGEST_S:  # the best of a few: other programs only ever add time
            start = time.perf_counter()
            engine.predict(batch).cpu()  # a GPU has finished when its result has arrived
            best = min(best, (time.perf_counter() - start) / count)
        return best
    finally:
        engine.close()


class _Gate:
    """What every engine has to pass before it is chosen: windows of a phantom, against PyTorch in strict fp32.

    Args:
        model: The model.
        roi: Window size in voxels.
        agreements: Which engines have failed on a CT.
        logits_only: Whether masks do not count.
    """

    def __init__(self, model: Model, roi: Size3, agreements: Agreements, *, logits_only: bool) -> None:
        self.model, self._agreements, self._logits_only = model, agreements, logits_only
        self.windows = example_windows(model, roi)
        self._expected: list[Tensor] | None = None

    def check(self, engine: Engine) -> ParityResult:
        """How near it is to PyTorch.

        Raises:
            ParityFailed: Not near enough, here or on a CT before.
        """
        info = engine.info
        failed = self._agreements.failed_on(info.backend, info.precision, info.device, info.roi)
        if failed is not None:
            raise ParityFailed(
                f"{info.backend} {info.precision} differed from PyTorch in fp32 on a CT on {failed}",
                reason="differed-on-ct",
            )
        if self._expected is None:
            self._expected = reference_logits(self.model, self.windows, info.device)
        return check_parity(engine, self.model, self.windows, expected=self._expected, logits_only=self._logits_only)


def _parity(name: str, gate: _Gate, cache_dir: Path, settings: Mapping[str, Any]) -> ParityResult:
    engine = open_engine(name, gate.model, cache_dir=cache_dir, **settings)
    try:
        return gate.check(engine)
    finally:
        engine.close()


def _first_exact(
    timed: Sequence[Measured],
    gate: _Gate,
    cache_dir: Path,
    settings: Mapping[str, Any],
    failures: list[Exception],
) -> Choice:
    """The fastest that agrees with PyTorch; PyTorch itself in fp32 is what the others are compared with."""
    runnable = [entry for entry in timed if entry.window_seconds is not None and entry.reason is None]
    final = {(entry.backend, entry.precision): entry for entry in timed}
    for entry in sorted(runnable, key=_seconds):
        name, chosen = entry.backend, entry.precision
        try:
            parity = None
            if not is_reference(name, chosen):
                smallest, wanted = settings["batch_range"]
                taken = {**settings, "precision": chosen, "batch_range": (smallest, entry.batch or wanted)}
                parity = _parity(name, gate, cache_dir, taken)
        except (ModelError, ResourceError) as error:
            failures.append(error)
            log.warning("engine %s %s is set aside: %s", name, chosen, error)
            final[name, chosen] = replace(entry, parity=None, reason=str(error))
            continue
        final[name, chosen] = replace(entry, parity=parity)
        return Choice(name, chosen, tuple(final.values()), entry.batch)
    if failures and all(isinstance(failure, ModelError) for failure in failures):
        raise failures[-1]  # PyTorch's own: the model is at fault, not the machine
    what = "; ".join(f"{entry.backend}: {entry.reason}" for entry in final.values())
    if any(isinstance(failure, DeviceOutOfMemory) for failure in failures):
        raise DeviceOutOfMemory(what)  # memory may be free another time, which a caller that lost an engine must know
    raise BackendUnavailable(what, reason="no-engine")


def _seconds(entry: Measured) -> float:
    return float("inf") if entry.window_seconds is None else entry.window_seconds
