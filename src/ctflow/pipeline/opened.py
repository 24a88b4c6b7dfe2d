"""A model's engines, one on each device: opened, compared with fp32 on the first CT, replaced where they differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from ctflow.core.errors import (
    DeviceOutOfMemory,
    EngineMismatch,
    NetworkNotTaken,
    OutputError,
    ParityFailed,
    ResourceError,
)
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.engines.contract import COSTS, Engine, EngineInfo, precision_from_name
from ctflow.engines.cudagraph import free_cached_memory
from ctflow.engines.registry import (
    BACKENDS,
    backend_module,
    batch_range_for,
    check_engine,
    devices_from_setting,
    open_engine,
)
from ctflow.engines.request import EngineRequest
from ctflow.export.figures import Agreement, Measured, ParityResult
from ctflow.export.parity import LOWEST_DICE_OF_CT, check_parity, is_reference, reference_logits
from ctflow.export.prepare import prepare_to_open
from ctflow.export.record import Agreements
from ctflow.export.selection import choose_fastest, engines_not_made
from ctflow.settings.run import Settings

log = logging.getLogger(__name__)
_OF_ANY_SIZE = "eager"


class OpenEngines:
    """Engines of one backend, one on each device.

    Args:
        model: The model.
        settings: Engine, precision, device and cache are used.
        logits_only: Whether masks do not count where engines are compared, for random weights.
    """

    def __init__(self, model: Model, settings: Settings, *, logits_only: bool = False) -> None:
        self.model = model
        self.engines: tuple[Engine, ...] = ()
        self.warnings: tuple[str, ...] = ()  # notes on the engine for every result
        self._settings, self._logits_only = settings, logits_only
        self._agreements = Agreements(model, settings.cache)
        self.measured: tuple[Measured, ...] = ()  # the measurements from which "auto" chose
        self._without: set[str] = set()  # engines that "auto" no longer takes, if nothing was measured
        self._failed: EngineInfo | None = None  # closed after a failure on a CT, and not replaced yet

    @property
    def info(self) -> EngineInfo:
        """The first engine's, with every device: the others differ only in the device."""
        return replace(self.engines[0].info, device=_text_of_devices([each.info.device for each in self.engines]))

    def open(self, progress: Progress = silent) -> None:
        """Open the engines; see `ctflow.pipeline.segmenter.Segmenter.open`."""
        devices = devices_from_setting(self._settings.device)
        wanted = self._wanted(self._settings.engine, devices)
        if wanted.backend == "auto":
            wanted = self._fastest(wanted, devices, progress)
        elif wanted.cache is not None:
            for device in devices:  # nothing to do for a second GPU of the same kind
                one = replace(wanted, device=device)
                check_engine(one)  # before making anything that could not run here
                prepare_to_open(one, self.model, logits_only=self._logits_only, progress=progress)
        self._take(self._opened(wanted, devices))
        if self.info.precision in COSTS:  # chosen by name: every result says so
            self.warnings = (*self.warnings, f"{self.info.precision}: {COSTS[self.info.precision]}")

    def close(self) -> None:
        """Close the engines; may be called twice."""
        self._failed = None
        self._take(())

    # ------------------------------------------------------------------------------------------ on the first CT

    @property
    def is_to_be_compared(self) -> bool:
        """Whether these engines have not been compared on a CT yet."""
        info = self.engines[0].info
        return not is_reference(info.backend, info.precision) and self.earlier is None

    @property
    def earlier(self) -> Agreement | None:
        """The result on an earlier CT; None for the reference, PyTorch in fp32."""
        infos = [engine.info for engine in self.engines]
        return None if is_reference(infos[0].backend, infos[0].precision) else self._agreements.find(infos)

    def compare(self, windows: Sequence[Tensor], of: int, batch: int) -> Agreement:
        """Compute windows of a CT in strict fp32 and with every engine, and keep the result.

        Args:
            windows: (1, C_in, *roi) float32 each.
            of: How many windows were computed of that CT.
            batch: Windows per batch.

        Raises:
            ParityFailed: They differ; noted, so that `auto` does not take that engine again.
            DeviceOutOfMemory: There is too little memory for PyTorch.
        """
        infos = [engine.info for engine in self.engines]
        expected = reference_logits(self.model, windows, infos[0].device)
        if torch.device(infos[0].device).type == "cuda":
            free_cached_memory()  # engines such as TensorRT allocate their own
        try:
            found = [
                check_parity(
                    engine,
                    self.model,
                    windows,
                    expected=expected,
                    batch=min(batch, of),
                    lowest_dice=LOWEST_DICE_OF_CT,
                    logits_only=self._logits_only,
                )
                for engine in self.engines
            ]
        except ParityFailed:
            self._agreements.refuse(infos)
            raise
        agreement = self._agreements.keep(infos, _worst(found), of)
        log.info("engine %s agrees with %s on this CT: %s", agreement.engine, agreement.reference, _figures(agreement))
        return agreement

    def take_next(self, error: ParityFailed, progress: Progress) -> str:
        """Open the next engine in place of one that has failed on a CT.

        The device may have memory for only one of them, so the failed one is closed first.

        Args:
            error: How it failed.
            progress: Receives the making of engines.

        Returns:
            A sentence for the result.

        Raises:
            ParityFailed: It was named, or none is left.
            DeviceOutOfMemory: There is too little memory for the next one; `open_missing` tries again.
        """
        failed = self.engines[0].info
        if self._settings.engine != "auto":
            raise error
        self.measured = tuple(_without(entry, failed, error) for entry in self.measured)
        self._without.add(failed.backend)
        self._failed = failed
        self._take(())
        if torch.device(failed.device).type == "cuda":
            free_cached_memory()  # engines such as TensorRT allocate their own
        none_left = self._replace(failed, progress)
        if none_left is not None:
            raise error from none_left
        text = f"{failed.backend} {failed.precision} did not agree with PyTorch on this CT; it was computed again"
        text = f"{text} with {self.info.backend} {self.info.precision} ({error})"
        log.warning(text)
        return text

    def open_missing(self, progress: Progress = silent) -> None:
        """Open the engine for which `take_next` had too little memory; does nothing if engines are open.

        Raises:
            DeviceOutOfMemory: There is still too little.
        """
        if self._failed is not None:
            self._replace(self._failed, progress)

    def _replace(self, failed: EngineInfo, progress: Progress) -> ResourceError | None:
        """Open the next engine; if none is left, say why and reopen the failed one: it is compared on every CT.

        Raises:
            DeviceOutOfMemory: There is too little memory for either.
        """
        none_left: ResourceError | None = None
        devices = devices_from_setting(self._settings.device)
        wanted = self._wanted("auto", devices)
        try:
            chosen = self._fastest(wanted, devices, progress) if self.measured else wanted
            engines = self._opened(chosen, devices)
        except DeviceOutOfMemory:  # other programs may hold it: the series may be tried again
            raise
        except ResourceError as error:
            none_left = error
            back = replace(wanted, backend=failed.backend, precision=failed.precision, batch_range=failed.batch_range)
            engines = self._opened(back, devices)
        self._take(engines)
        return none_left

    # ------------------------------------------------------------------------------------------------ choosing

    def _wanted(self, name: str, devices: Sequence[str]) -> EngineRequest:
        spec, settings = self.model.spec, self._settings
        batches = batch_range_for(spec, devices[0])
        precision = precision_from_name(settings.precision)
        if 0 in spec.roi:
            if name not in ("auto", _OF_ANY_SIZE):
                raise NetworkNotTaken(
                    f"{name} computes windows of one size, and the bundle's windows are as large as the volume: leave "
                    f"--engine out, or set it to {_OF_ANY_SIZE}",
                )
            name = _OF_ANY_SIZE
        return EngineRequest(name, devices[0], precision, spec.roi, batches, settings.cache)

    def _take(self, engines: tuple[Engine, ...]) -> None:
        """Close the open engines and use these instead."""
        before, self.engines = self.engines, engines
        with ExitStack() as all_of_them:
            for engine in before:
                all_of_them.callback(engine.close)
        if engines:
            self._failed = None
            log.info("engine %s %s on %s", self.info.backend, self.info.precision, self.info.device)

    def _opened(self, wanted: EngineRequest, devices: Sequence[str]) -> tuple[Engine, ...]:
        """Engines of one backend, one on each device; all are closed if one cannot be opened."""
        engines: list[Engine] = []
        with ExitStack() as stack:
            for device in devices:
                one = replace(wanted, device=device)
                engines.append(open_engine(one, self.model, without=self._without))
                stack.callback(engines[-1].close)
                wanted = replace(wanted, backend=engines[-1].info.backend)  # "auto" must not pick a different one next
            stack.pop_all()
        return tuple(engines)

    def _fastest(self, wanted: EngineRequest, devices: Sequence[str], progress: Progress) -> EngineRequest:
        """The request with the engine, precision and batch that measurement chose.

        Without a writable cache, "auto" takes an engine without a file.
        """
        if wanted.cache is None:
            self._tell_of_unmade(wanted)
            return wanted
        try:
            choice = choose_fastest(
                wanted,
                self.model,
                logits_only=self._logits_only,
                agreements=self._agreements,
                measured=self.measured,
                progress=progress,
            )
            self.measured = choice.measured
            if backend_module(choice.backend).FILE is None:
                self._tell_of_unmade(wanted, choice.backend)
            for device in devices:
                one = replace(wanted, backend=choice.backend, precision=choice.precision, device=device)
                prepare_to_open(one, self.model, progress=progress)
        except (OutputError, EngineMismatch) as error:
            # A container may have no writable folder, a disk may damage a file: the case matters more than speed.
            self.warnings = (f"no engine from the cache ({error}); PyTorch computes: give a folder with --cache",)
            log.warning(self.warnings[0])
            return replace(wanted, backend="eager")
        return choice.of(wanted)

    def _tell_of_unmade(self, wanted: EngineRequest, chosen: str = "eager") -> None:
        """Warn if a faster engine could be made: a container may run on a GPU for which none was made."""
        faster = list(BACKENDS)[: list(BACKENDS).index(chosen)]
        unmade = [name for name in engines_not_made(wanted, self.model) if name in faster]
        if unmade:
            text = f"no engine made for this device is in the cache: `ctflow export` makes one ({', '.join(unmade)})"
            self.warnings = (*self.warnings, text)
            log.warning(text)


def _without(entry: Measured, failed: EngineInfo, error: ParityFailed) -> Measured:
    """An engine's measurement; the failed engine's says that it is not used."""
    is_it = (entry.backend, entry.precision) == (failed.backend, failed.precision)
    return replace(entry, parity=None, reason=str(error)) if is_it else entry


def _worst(found: Sequence[ParityResult]) -> ParityResult:
    """The figures of several devices as one."""
    dice = [result.dice for result in found if result.dice is not None]
    return replace(
        found[0],
        relative_error=max(result.relative_error for result in found),
        dice=min(dice) if dice else None,
        judged=max(result.judged for result in found),  # "logits" if any
    )


def _figures(agreement: Agreement) -> str:
    dice = "nothing segmented in them" if agreement.dice is None else f"Dice {agreement.dice:.5f}"
    return f"{agreement.windows} of {agreement.of} windows, {dice}, relative error {agreement.relative_error:.1e}"


def _text_of_devices(devices: Sequence[str]) -> str:
    """The devices in the form of `--device` ("cuda:0,1")."""
    first, *others = devices
    return ",".join([first, *(device.partition(":")[2] or device for device in others)])
