"""pydicom 3 without its validation of values read, and without its own and its decoders' log.

ctflow itself checks the values that it needs and names them. pydicom's own warnings and errors quote values, which may
be patient data, and stop at values that ctflow does not need. pydicom keeps the switch for the whole process: issue
2220 of pydicom/pydicom. Read for 3.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pydicom import config

from ctflow.compat.scope import SharedChange, Undo

_SILENT = logging.CRITICAL + 1
# pydicom sets the level of its logger at import, and these quote values at any level.
_LOGGERS = ("pydicom", "highdicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls")


def _without_validation() -> Undo:
    settings = config.settings
    before = settings._reading_validation_mode  # its property lacks None, which follows `enforce_valid_values`
    settings._reading_validation_mode = config.IGNORE

    def undo() -> None:
        if settings._reading_validation_mode == config.IGNORE:  # else other code has set it meanwhile
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
    """Let pydicom convert values without checks; for the conversion of one value, as it takes a microsecond."""
    with _VALIDATION.held():
        yield


@contextmanager
def lenient() -> Iterator[None]:
    """Let pydicom read and make data sets without validation, and log none of their contents.

    Wraps each of ctflow's own functions that uses pydicom, highdicom or a decoder; also a decorator.
    """
    with _VALIDATION.held(), _LOGGING.held():
        yield
