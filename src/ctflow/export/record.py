"""Earlier comparisons, kept in the cache for the machine, the model and all versions, and in this process."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctflow.core.atomic import write_atomically
from ctflow.core.errors import OutputError
from ctflow.core.model import Model
from ctflow.core.processes import usable_cpus
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision
from ctflow.engines.hardware import gpu_identity
from ctflow.engines.onnxfile import software_versions
from ctflow.engines.registry import backend_version
from ctflow.export.figures import Agreement, ParityResult
from ctflow.networks.swin import REWRITE_VERSION

_FORMAT = 1
REFERENCE = "eager fp32"
THIS, EARLIER = "this series", "an earlier series"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Record:
    """The record of an engine: the date on which it failed, or its figures."""

    failed: str | None
    agreement: Agreement | None


class Agreements:
    """Figures of earlier comparisons.

    Args:
        model: The model.
        cache_dir: Where they are kept; None keeps them in this process alone.
    """

    def __init__(self, model: Model, cache_dir: Path | None) -> None:
        self._model, self._cache_dir = model, cache_dir
        self._known: dict[str, Agreement] = {}
        self._failed: dict[str, str] = {}  # when
        self._keys: dict[tuple[object, ...], str] = {}

    def find(self, infos: Sequence[EngineInfo]) -> Agreement | None:
        """Figures of engines that agreed on an earlier CT.

        Args:
            infos: One backend and precision, on one or several devices.

        Returns:
            The figures of the device with the largest error; None if one has not been compared here, or has failed.
        """
        if any(self.failed_on(info.backend, info.precision, info.device, info.roi) for info in infos):
            return None
        found = []
        for key in {self._key(info) for info in infos}:
            agreement = self._known.get(key) or self._read(key).agreement
            if agreement is None:
                return None
            self._known[key] = agreement
            found.append(agreement)
        return replace(max(found, key=lambda one: one.relative_error), series=EARLIER)

    def failed_on(self, backend: str, precision: Precision, device: str, roi: Size3) -> str | None:
        """The date on which an engine, with any batch, did not agree on a CT, as YYYY-MM-DD; None if it always has.

        Args:
            backend: Its name.
            precision: Number format of the heavy arithmetic.
            device: torch device; another one of the same kind computes the same.
            roi: Window size in voxels.
        """
        key = self._key_of_failure(backend, precision, device, roi)
        return self._failed.get(key) or self._read(key).failed

    def keep(self, infos: Sequence[EngineInfo], result: ParityResult, of: int) -> Agreement:
        """Note that engines agreed on a CT.

        An engine that has failed on another CT is compared on each, so none of its figures are kept.

        Args:
            infos: One backend and precision, on one or several devices.
            result: The worst of them.
            of: How many windows were computed of the CT.
        """
        engine = f"{infos[0].backend} {infos[0].precision}"
        figures = (result.windows, of, result.dice, result.relative_error, result.judged)
        agreement = Agreement(*figures, engine, REFERENCE, THIS, today(), kept=True)
        kept = True
        for key, info in {self._key(info): info for info in infos}.items():
            trusted = self.failed_on(info.backend, info.precision, info.device, info.roi) is None
            kept = trusted and self._write(key, _Record(None, agreement)) and kept
            if trusted:
                self._known[key] = replace(agreement, kept=kept)
        return replace(agreement, kept=kept)

    def refuse(self, infos: Sequence[EngineInfo]) -> None:
        """Note that engines did not agree on a CT: they are not chosen; one that is named is compared on every CT."""
        for key in {self._key_of_failure(info.backend, info.precision, info.device, info.roi) for info in infos}:
            self._failed[key] = today()
            self._write(key, _Record(today(), None))

    def _key(self, info: EngineInfo) -> str:
        """Digest of everything that the figures depend on."""
        known = (info.backend, info.precision, info.device, info.batch_range)
        if known not in self._keys:
            self._keys[known] = self._digest({**asdict(info), "device": machine(info.device)})
        return self._keys[known]

    def _key_of_failure(self, backend: str, precision: Precision, device: str, roi: Size3) -> str:
        """Digest under which an engine is rejected: known before one is opened, and valid for every batch."""
        known = ("failure", backend, precision, device, roi)
        if known not in self._keys:
            self._keys[known] = self._digest([*known[:3], machine(device), roi, backend_version(backend)])
        return self._keys[known]

    def _digest(self, engine: object) -> str:
        return digest_of_fields([*what_is_computed(self._model), software_versions(), engine])

    def _path(self, key: str) -> Path | None:
        return None if self._cache_dir is None else self._cache_dir / f"agreement-{key}.json"

    def _read(self, key: str) -> _Record:
        """A stored record; a missing or damaged one is empty, so the engine is compared again."""
        path = self._path(key)
        try:
            document = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                return _Record(None, None)
            failed, figures = document["failed"], document["agreement"]
            if failed is not None:
                return _Record(_text(failed), None)
            return _Record(None, _checked(Agreement(**figures)))
        except (OSError, ValueError, TypeError, KeyError):
            return _Record(None, None)

    def _write(self, key: str, record: _Record) -> bool:
        """Whether a record is in the cache now."""
        path = self._path(key)
        what = "the comparison of an engine, so each process compares again"
        return path is not None and store_record(path, {"format": _FORMAT, **asdict(record)}, what)


def store_record(path: Path, document: Mapping[str, Any], what: str) -> bool:
    """Write a document to the cache; whether it is there now. A warning says that `what` cannot be stored."""
    text = json.dumps(document, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # an engine without a file has not created it
        write_atomically(path, lambda stream: stream.write(text.encode()))
    except (OutputError, OSError) as error:  # the engines' folder may be read-only
        log.warning("cannot store %s: %s", what, error)
        return False
    return True


def digest_of_fields(fields: Sequence[object]) -> str:
    """Name of a record: a digest of everything that it depends on."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("no date")
    return value


def _checked(agreement: Agreement) -> Agreement:
    """Figures as `Agreements` writes them.

    Raises:
        ValueError: They are not: the record was changed.
    """
    numbers = (agreement.relative_error, 0.0 if agreement.dice is None else agreement.dice)
    texts = (agreement.judged, agreement.engine, agreement.reference, agreement.date)
    counts = (agreement.windows, agreement.of)
    if (
        not all(type(count) is int and count >= 1 for count in counts)
        or not all(isinstance(number, (int, float)) and 0 <= number <= 1 for number in numbers)
        or not all(isinstance(text, str) for text in texts)
        or agreement.kept is not True
    ):
        raise ValueError("no figures of an agreement")
    return agreement


def today() -> str:
    """The date, as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d")


def what_is_computed(model: Model) -> list[object]:
    """Everything in a model that determines its logits and their meaning."""
    spec = model.spec
    what = [model.weights_digest, spec.network.name, dict(spec.network.arguments), REWRITE_VERSION]
    return [what, [spec.activation, spec.threshold, spec.out_channels, repr(spec.preprocessing)]]


def machine(device: str) -> list[object]:
    """The properties of this machine that determine how a device computes."""
    where: list[object] = [_processor(), usable_cpus()]
    return [*where, gpu_identity(device)] if device.startswith("cuda") else where


def device_name(device: str) -> str:
    """What a person calls a device: the GPU with its driver, or the processor."""
    if device.startswith("cuda"):
        return gpu_identity(device)
    name = _processor().partition(";")[0].partition(":")[2].strip()
    return f"{name or 'CPU'}, {usable_cpus()} CPUs"


def _processor() -> str:
    """Name and features of the processor: an engine's choice of arithmetic depends on them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return "; ".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))
