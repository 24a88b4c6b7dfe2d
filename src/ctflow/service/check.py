"""`ctflow serve --check`: open what the settings name, as the node would, and close it again."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ctflow.atomic import output_error_from_oserror
from ctflow.config import Settings
from ctflow.errors import BackendUnavailable, NotWritten, StorageFull
from ctflow.processes import bare_start
from ctflow.service.document import size_text
from ctflow.service.settings import ServiceSettings
from ctflow.service.worker import Line, NotReady, Ready, Setup, error_of, run_worker

_CLOSE_S = 10.0


def opened(settings: ServiceSettings, run: Settings) -> Iterator[str]:
    """Open folders, bundle, engine and devices.

    Nothing is made or kept but the engine's file in the cache, as at a start. A running node is not disturbed.

    Args:
        settings: The site's.
        run: How each series is run.

    Yields:
        A line for each thing that could be opened.

    Raises:
        CtflowError: One cannot be opened: the error that the node would end with.
    """
    yield _data_folder(settings)
    if settings.copy_to is not None:
        yield _copies(settings.copy_to)
    devices: list[str | None] = [*settings.devices] or [None]
    while devices:
        device = devices.pop(0)
        word, warnings = _first_word(
            Setup(settings.bundle, replace(run, device=device), settings.rules, logging.WARNING)
        )
        if device is None and word.gpus > 1:  # the node takes them all
            devices += [f"cuda:{number}" for number in range(1, word.gpus)]
        yield f"opened {word.model} {word.version} on {device or ('cuda:0' if word.gpus else 'the CPU')}"
        yield from (f"warning: {warning}" for warning in warnings)


def _data_folder(settings: ServiceSettings) -> str:
    place = next(each for each in (settings.data, *settings.data.parents) if each.exists())
    _write_in(place, "the data folder")
    if shutil.disk_usage(place).free < settings.limits.free_disk:
        wanted = size_text(settings.limits.free_disk)
        raise StorageFull(f"the data folder's disk has less than {wanted} free (limits.free_disk): free some")
    return "can write to the data folder" if place == settings.data else "can make the data folder"


def _copies(folder: Path) -> str:
    if not folder.is_dir():
        raise NotWritten("the folder for copies (copy_to) is not there: make or mount it")
    _write_in(folder, "the folder for copies (copy_to)")
    return "can write to the folder for copies"


def _write_in(folder: Path, what: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise output_error_from_oserror(error, what) from error


def _first_word(setup: Setup) -> tuple[Ready, list[str]]:
    """Start a worker, hear what it opened and what it warned of, and let it end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, setup), daemon=True)
    warnings: list[str] = []
    try:
        with bare_start():
            process.start()
        theirs.close()
        while True:
            word = ours.recv()
            if isinstance(word, Ready):
                return word, warnings
            if isinstance(word, NotReady):
                raise error_of(word)
            if isinstance(word, Line):
                warnings.append(word.message)
    except (EOFError, OSError) as error:
        raise BackendUnavailable("the worker ended before it had opened the model: see its last lines") from error
    finally:
        ours.close()  # a worker that waits sees the end and leaves
        if process.pid is not None:
            process.join(_CLOSE_S)
            process.kill()
            process.join()
