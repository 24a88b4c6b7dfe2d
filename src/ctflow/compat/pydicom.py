"""pydicom 3 without its validation of values that are read, and without what it and its decoders log.

ctflow checks what it needs by itself and names it. pydicom's own warnings and errors quote values, which may be patient
data, and stop at values that ctflow does not need. pydicom keeps the switch for the whole process: issue 2220 of
pydicom/pydicom. Read for 3.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom import config

from ctflow.compat.scope import SharedChange, Undo

_SILENT = logging.CRITICAL + 1
# pydicom sets the level of its logger when it is imported, and these quote values at any level.
_LOGGERS = ("pydicom", "highdicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls")


def _without_validation() -> Undo:
    settings = config.settings
    before = settings._reading_validation_mode  # its property has no None, which follows `enforce_valid_values`
    settings._reading_validation_mode = config.IGNORE

    def undo() -> None:
        if settings._reading_validation_mode == config.IGNORE:  # else somebody has chosen meanwhile
            settings._reading_validation_mode = before

    return undo


def _without_logging() -> Undo:
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(_SILENT)

    def undo() -> None:
        for name, level in before.items():
            if logging.getLogger(name).level == _SILENT:
                logging.getLogger(name).setLevel(level)

    return undo


_VALIDATION, _LOGGING = SharedChange(_without_validation), SharedChange(_without_logging)


@contextmanager
def values_unchecked() -> Iterator[None]:
    """Pydicom converts values as they are; for the conversion of one value, as it takes a microsecond."""
    with _VALIDATION.held():
        yield


@contextmanager
def lenient() -> Iterator[None]:
    """Pydicom reads and makes data sets without validation, and nothing that they hold is logged.

    Around each of ctflow's own functions that uses pydicom, highdicom or a decoder; also a decorator.
    """
    with _VALIDATION.held(), _LOGGING.held():
        yield
