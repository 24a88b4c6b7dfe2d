"""The fastest engine here that agrees with the model: measured once per machine and model, and kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ctflow.core.errors import (
    BackendUnavailable,
    CtflowError,
    DeviceOutOfMemory,
    EngineMismatch,
    ModelError,
    NetworkNotTaken,
    OutputError,
    ResourceError,
)
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.engines.contract import Precision, check_chosen_by_name
from ctflow.engines.onnxfile import software_versions
from ctflow.engines.registry import backend_module, backend_names
from ctflow.engines.request import EngineRequest
from ctflow.export.figures import Measured, ParityResult
from ctflow.export.measure import ParityGate, fastest_batch
from ctflow.export.prepare import is_prepared, prepare_to_open
from ctflow.export.record import Agreements, device_name, digest_of_fields, machine, store_record, what_is_computed

_STAGE = "measure engines"
_FORMAT = 4  # of the record

# Failures that may be gone another day or on another machine: measurements under them are not kept.
_PASSING = (ResourceError, EngineMismatch, ImportError, RuntimeError)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The measurements, the engine and precision chosen by them, and the windows per batch (None: as requested)."""

    backend: str
    precision: Precision
    measured: tuple[Measured, ...]
    batch: int | None = None

    def of(self, request: EngineRequest) -> EngineRequest:
        """The request with the chosen engine, precision and batch."""
        smallest, wanted = request.batch_range
        batches = smallest, self.batch or wanted
        return replace(request, backend=self.backend, precision=self.precision, batch_range=batches)


def choose_fastest(
    request: EngineRequest,
    model: Model,
    *,
    make: bool = False,
    logits_only: bool = False,
    agreements: Agreements | None = None,
    measured: Sequence[Measured] = (),
    progress: Progress = silent,
) -> Choice:
    """The fastest engine that agrees with PyTorch in fp32; from the record in the cache, or measured and recorded.

    Args:
        request: The request; its precision None lets each backend try its own. The cache keeps engines and the record.
        model: The model.
        make: Whether to make engines that take minutes; else only those in the cache take part.
        logits_only: Whether masks do not count, for random weights (`ctflow.export.parity.check_parity`).
        agreements: Which engines have failed on a CT and are not taken; None reads the cache.
        measured: Earlier measurements, to choose from again once the chosen engine has failed on a CT.
        progress: Receives each engine as stage "measure engines".

    Returns:
        The choice; its engine's file is in the cache.

    Raises:
        BackendUnavailable: No backend computes with this device and precision.
        DeviceOutOfMemory: None can be used, one of them only for lack of memory, which may be free another time.
        ModelError: No engine can be made from the model, or none that is left agrees.
        OutputError: The cache cannot be written.
    """
    candidates = [each for each in _fitting(request) if make or is_prepared(each, model)]
    if len(candidates) == 1:  # nothing to compare: no minutes for a measurement
        return Choice(candidates[0].backend, candidates[0].chosen_precision, ())
    path = request.folder / f"choice-{_key(request, model, candidates, logits_only=logits_only)}.json"
    agreements = agreements or Agreements(model, request.cache)
    known = None if measured else _read_choice(path, candidates)
    if known is not None:
        if not agreements.failed_on(known.backend, known.precision, request.device, request.roi):
            return known
        measured = known.measured  # it failed on a CT after that, on a device like this one: the next fastest
    gate = ParityGate(model, request.roi, agreements, logits_only=logits_only)
    timed: Sequence[Measured] = measured
    failures: list[Exception] = []
    if not measured:
        timed, failures = _time_all(candidates, model, gate.windows[0], progress)
    choice = _first_exact(timed, gate, request, failures)
    if not any(isinstance(failure, _PASSING) for failure in failures):
        about = {"model": f"{model.spec.name} {model.spec.version}", "device": device_name(request.device)}
        store_record(path, {"format": _FORMAT, **about, **asdict(choice)}, "which engine was selected")
    return choice


def engines_not_made(request: EngineRequest, model: Model) -> tuple[str, ...]:
    """Backends of this machine that take no part in a choice only because their files have not been made yet.

    Args:
        request: The request; its precision None lets each backend try its own.
        model: The model.

    Raises:
        BackendUnavailable: No backend computes with this device and precision.
        EngineMismatch: A stored file is damaged.
    """
    fitting = _fitting(request)
    made = {each.backend for each in fitting if is_prepared(each, model)}
    return tuple(dict.fromkeys(each.backend for each in fitting if each.backend not in made))


def _fitting(request: EngineRequest) -> list[EngineRequest]:
    """Backends that this machine has for the device, with the precisions that each would try."""
    check_chosen_by_name(request.backend, request.precision)
    fitting: list[EngineRequest] = []
    reasons = []
    for name in backend_names("auto", request.device):
        try:
            module = backend_module(name)
            tried = module.precisions(request.device) if request.precision is None else (request.precision,)
            for chosen in tried:
                module.check_settings(request.device, chosen)
                fitting.append(replace(request, backend=name, precision=chosen))
        except BackendUnavailable as error:
            reasons.append(str(error))
    if not fitting:
        raise BackendUnavailable("; ".join(reasons), reason="no-engine")
    return fitting


def _time_all(
    candidates: Sequence[EngineRequest], model: Model, window: Tensor, progress: Progress
) -> tuple[list[Measured], list[Exception]]:
    """Every candidate, timed or set aside, and the reasons that a warning reports."""
    timed: list[Measured] = []
    failures: list[Exception] = []
    progress(_STAGE, 0, len(candidates))
    for done, candidate in enumerate(candidates, start=1):
        timed.append(_time_engine(candidate, model, window, failures))
        progress(_STAGE, done, len(candidates))
    return timed, failures


def _time_engine(request: EngineRequest, model: Model, window: Tensor, failures: list[Exception]) -> Measured:
    """Time one of several engines; one that cannot be made or run is set aside with its reason."""
    name, precision = request.backend, request.chosen_precision
    try:
        prepare_to_open(request, model)
        seconds, batch = fastest_batch(request, model, window)
        return Measured(name, precision, seconds, None, None, batch)
    except OutputError:
        raise
    except NetworkNotTaken as error:  # permanent: not a failure, so no warning
        log.info("engine %s does not support this network: %s", name, error)
        return Measured(name, precision, None, None, str(error))
    # Libraries that do not load or run raise ImportError and RuntimeError; another engine may work.
    except (CtflowError, ImportError, RuntimeError) as error:
        failures.append(error)
        log.warning("engine %s is set aside: %s", name, error)
        return Measured(name, precision, None, None, str(error))


def _first_exact(
    timed: Sequence[Measured], gate: ParityGate, request: EngineRequest, failures: list[Exception]
) -> Choice:
    """The fastest that agrees with PyTorch; PyTorch itself in fp32 is the reference."""
    runnable = [entry for entry in timed if entry.window_seconds is not None and entry.reason is None]
    final = {(entry.backend, entry.precision): entry for entry in timed}
    for entry in sorted(runnable, key=lambda entry: entry.window_seconds or 0.0):
        name, chosen = entry.backend, entry.precision
        try:
            parity = gate.compare(Choice(name, chosen, (), entry.batch).of(request))
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


def _key(request: EngineRequest, model: Model, candidates: Sequence[EngineRequest], *, logits_only: bool) -> str:
    """Digest of everything that the choice depends on."""
    settings = {"device": request.device, "roi": request.roi, "batch_range": request.batch_range}
    versions = [backend_module(each.backend).is_available()[1] for each in candidates]
    where = [machine(request.device), software_versions(), versions]
    engines = [(each.backend, each.precision) for each in candidates]
    return digest_of_fields([*what_is_computed(model), *where, settings, engines, logits_only])


def _read_choice(path: Path, candidates: Sequence[EngineRequest]) -> Choice | None:
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
    engines = [(each.backend, each.precision) for each in candidates]
    known = document.get("format") == _FORMAT and (choice.backend, choice.precision) in engines
    return choice if whole and known else None
