"""Measures how fast and how exact one engine is on this machine."""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable, ModelError, ParityFailed, ResourceError
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.contract import Engine
from ctflow.engines.registry import batches_worth_timing, open_engine, with_precision
from ctflow.engines.request import EngineRequest
from ctflow.export.examples import example_windows
from ctflow.export.figures import Measured, ParityResult
from ctflow.export.parity import check_parity, is_reference, reference_logits
from ctflow.export.prepare import is_made_anywhere, prepare_engine, target_of_file
from ctflow.export.record import Agreements

_WORTH = 0.98  # of a smaller batch's seconds: a larger one takes more memory
_LONGEST_S = 3.0  # no repetition starts later
_ENOUGH_S, _ENOUGH = 1.0, 3  # nor after this time where there were so many
_MOST = 20  # a GPU's times differ by less than 2 % after so many

log = logging.getLogger(__name__)


def measure_engine(
    request: EngineRequest, model: Model, *, logits_only: bool = False, progress: Progress = silent
) -> Measured:
    """Make one engine if it does not exist, time it and compare it with PyTorch in fp32.

    Args:
        request: A backend, and for what, with a cache.
        model: The model.
        logits_only: Whether masks do not count, for random weights (`ctflow.export.parity.check_parity`).
        progress: Receives the progress of making it.

    Returns:
        The measurement; where the engine is for another machine, only that it was made, and why nothing more.

    Raises:
        ParityFailed: Its results differ.
        CtflowError: It cannot be made or run here.
    """
    request = with_precision(request)
    name, chosen = request.backend, request.chosen_precision
    prepare_engine(request, model, logits_only=logits_only, progress=progress)
    gate = ParityGate(model, request.roi, Agreements(model, request.cache), logits_only=logits_only)
    try:
        seconds, batch = fastest_batch(request, model, gate.windows[0])
    except BackendUnavailable as error:
        if not is_made_anywhere(name):
            raise
        return Measured(name, chosen, None, None, _made_elsewhere(request, model, error))
    taken = replace(request, batch_range=(request.batch_range[0], batch))
    return Measured(name, chosen, seconds, gate.compare(taken), None, batch)


def _made_elsewhere(request: EngineRequest, model: Model, error: BackendUnavailable) -> str:
    if torch.cuda.is_available():
        return f"made, not run here: {error}"
    target = target_of_file(request, model)
    return f"made for {target}, not run here: copy the folder into the cache there, or name it with --cache"


def fastest_batch(request: EngineRequest, model: Model, window: Tensor) -> tuple[float, int]:
    """Seconds per window with the best batch for this machine, and that batch.

    Args:
        request: The engine; its file exists.
        model: The model.
        window: (1, C_in, *roi) float32, from which batches are made.

    Raises:
        CtflowError: It does not run with the requested batch.
    """
    smallest, wanted = request.batch_range
    best, chosen = _seconds_a_window(request, model, window), wanted
    for batch in batches_worth_timing(request.backend, wanted)[1:]:
        try:
            seconds = _seconds_a_window(replace(request, batch_range=(smallest, batch)), model, window)
        except (ModelError, ResourceError) as error:  # for example too little memory, which a larger batch also lacks
            log.info("engine %s cannot run a batch of %d: %s", request.backend, batch, error)
            break
        if seconds < _WORTH * best:
            best, chosen = seconds, batch
    return best, chosen


def _seconds_a_window(request: EngineRequest, model: Model, window: Tensor) -> float:
    with closing(open_engine(request, model)) as engine:
        count = engine.info.batch_range[1]
        batch = window.to(engine.info.device).expand(count, -1, -1, -1, -1).contiguous()
        engine.predict(batch)  # the first takes memory and compiles
        best, started = math.inf, time.perf_counter()
        for done in range(_MOST):  # the best of a few: other programs can only add time
            start = time.perf_counter()
            if start - started >= (_LONGEST_S if done < _ENOUGH else _ENOUGH_S):
                break
            engine.predict(batch).cpu()  # a GPU has finished when its result has arrived
            best = min(best, (time.perf_counter() - start) / count)
        return best


class ParityGate:
    """The check that every engine passes before it is chosen: windows of a phantom, against PyTorch in strict fp32.

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
        """How close it is to PyTorch.

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

    def compare(self, request: EngineRequest) -> ParityResult | None:
        """How close an engine is to PyTorch in fp32; None for the reference itself.

        Raises:
            ParityFailed: Not near enough, here or on a CT before.
            CtflowError: It does not run.
        """
        return None if is_reference(request.backend, request.chosen_precision) else self._parity(request)

    def _parity(self, request: EngineRequest) -> ParityResult:
        with closing(open_engine(request, self.model)) as engine:
            return self.check(engine)
