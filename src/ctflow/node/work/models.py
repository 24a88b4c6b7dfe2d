"""The models of a worker: opened when a series needs them, the least recently used closed when there is no room."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ctflow.core.errors import BundleInvalid, CtflowError, DeviceOutOfMemory
from ctflow.core.model import Model
from ctflow.node.work.messages import HeldModels, ModelChoice, Setup

if TYPE_CHECKING:
    from ctflow.pipeline.segmenter import Segmenter
    from ctflow.settings.run import Settings

_MOST_ON_CPU = 2  # open models; their weights are in the memory that the series also need
_FREE_PART = 0.5  # of a GPU's memory that another model needs, for its engine and for the series

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Source:
    """What decides the model that is read from a bundle."""

    name: str
    config: str | None
    allow_code: bool


@dataclass(frozen=True)
class _Opening:
    """What decides an open engine; everything else may differ from series to series."""

    source: _Source
    engine: str
    precision: str | None


class OpenModels:
    """A worker's models.

    Args:
        setup: The worker's.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._open: dict[_Opening, Segmenter] = {}  # the most recently used last
        self._facts: dict[_Source, Model] = {}
        self._read: tuple[_Source, Model] | None = None  # the last one read, which may be opened next
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()  # a thread asks for facts while another one segments

    def __enter__(self) -> OpenModels:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._close(next(iter(self._open)))

    def open_first(self) -> Model:
        """Open the first model that can be opened; the others are read, so that a wrong one is known.

        Raises:
            CtflowError: None can be opened: of the first.
        """
        errors: list[CtflowError] = []
        opened: Model | None = None
        for choice in self._setup.choices:
            try:
                if opened is None:
                    opened = self.segmenter(choice, choice.settings).model
                else:
                    self.facts(choice, choice.settings)
            except CtflowError as error:
                errors.append(error)
                log.error("%s%s", choice.name and f"{choice.name}: ", error.described)  # noqa: TRY400  # named
        self._read = None  # its weights
        if opened is None:
            raise errors[0]
        return opened

    @property
    def held(self) -> HeldModels:
        """The models that are open, and those that could not be read or opened the last time."""
        with self._lock:
            names = dict.fromkeys(each.source.name for each in [*self._open])
            return HeldModels(tuple(names), dict(self._failed))

    @property
    def demonstrations(self) -> tuple[str, ...]:
        """The models of which it is known that they are for demonstration only."""
        with self._lock:
            return tuple(dict.fromkeys(each.name for each, model in self._facts.items() if model.spec.demonstration))

    def facts(self, choice: ModelChoice, settings: Settings) -> Model:
        """A model without its weights; its bundle is read if it was not yet.

        Raises:
            CtflowError: It cannot be read.
        """
        with self._lock:
            source = _source(choice, settings)
            if source not in self._facts:
                self._read_bundle(source, choice)
            return self._facts[source]

    def body_parts(self, choice: ModelChoice) -> tuple[str, ...]:
        """BodyPartExamined values that suit a model; none if its bundle cannot be read, which its opening then says."""
        try:
            return tuple(self.facts(choice, choice.settings).spec.body_parts)
        except CtflowError:
            return ()

    def segmenter(self, choice: ModelChoice, settings: Settings) -> Segmenter:
        """A model's open segmenter, for these settings; for one thread. Another model may be closed for it.

        Raises:
            CtflowError: It cannot be opened.
        """
        opening = _Opening(_source(choice, settings), settings.engine, settings.precision)
        found = self._open.get(opening)
        if found is None:
            found = self._opened(opening, choice, settings)
        with self._lock:
            self._open.pop(opening, None)
            self._open[opening] = found
        return found.with_settings(settings)

    def close_others(self, choice: ModelChoice) -> bool:
        """Close all other models, after one had too little memory; return whether there were any."""
        others = [each for each in self._open if each.source.name != choice.name]
        for each in others:
            self._close(each)
        return bool(others)

    def _read_bundle(self, source: _Source, choice: ModelChoice) -> Model:
        """Read a model with its weights, and keep what is known of it."""
        from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415  # torch: seconds

        if self._read is not None and self._read[0] == source:
            return self._read[1]
        try:
            bundle = find_bundle(choice.bundle) if choice.bundle else demonstration_bundle()
            model = read_bundle(bundle, source.config, allow_code=source.allow_code)
        except CtflowError as error:
            self._failed[choice.name] = error.described
            raise
        known = self._facts.setdefault(source, Model(model.spec, {}, model.weights_digest))
        if known.weights_digest != model.weights_digest or repr(known.spec) != repr(model.spec):
            raise BundleInvalid(
                f"the bundle of {choice.name or 'the model'} was changed while the node runs: start the node again",
                reason="changed",
            )
        self._failed.pop(choice.name, None)
        self._read = (source, model)
        return model

    def _opened(self, opening: _Opening, choice: ModelChoice, settings: Settings) -> Segmenter:
        from ctflow.pipeline.run import announce  # noqa: PLC0415
        from ctflow.pipeline.segmenter import Segmenter  # noqa: PLC0415

        with self._lock:
            model = self._read_bundle(opening.source, choice)
            self._read = None
        announce(model)
        self._make_room(settings)
        segmenter = Segmenter(model, settings)
        try:
            try:
                segmenter.open()
            except DeviceOutOfMemory:
                if not self.close_others(choice):
                    raise
                segmenter.open()
        except CtflowError as error:
            with self._lock:
                self._failed[choice.name] = error.described
            raise
        with self._lock:
            self._failed.pop(choice.name, None)
        return segmenter

    def _make_room(self, settings: Settings) -> None:
        """Close the least recently used models until another one may be opened."""
        while self._open and not self._has_room(settings):
            self._close(next(iter(self._open)))

    def _has_room(self, settings: Settings) -> bool:
        if self._setup.engines_open is not None:
            return len(self._open) < self._setup.engines_open
        free = None if settings.device == "cpu" else _free_part(settings.device)
        return len(self._open) < _MOST_ON_CPU if free is None else free >= _FREE_PART

    def _close(self, opening: _Opening) -> None:
        with self._lock:
            segmenter = self._open.pop(opening)
        segmenter.close()
        if self._setup.models:
            log.info("model %s is closed", opening.source.name)


def _source(choice: ModelChoice, settings: Settings) -> _Source:
    return _Source(choice.name, settings.config, settings.allow_code)


def _free_part(device: str | None) -> float | None:
    """The free part of a GPU's memory; None without a GPU."""
    import torch  # noqa: PLC0415  # it is loaded by now

    from ctflow.engines.cudagraph import free_cached_memory  # noqa: PLC0415

    if not torch.cuda.is_available():
        return None
    free_cached_memory()
    free, total = torch.cuda.mem_get_info((device or "cuda:0").partition(",")[0])
    return float(free / total)
