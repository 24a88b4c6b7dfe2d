"""`ctflow serve --check`: open everything that the settings name, as the node would, and close it again."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ctflow.compat.python import bare_start
from ctflow.core.atomic import output_error_from_oserror
from ctflow.core.errors import BackendUnavailable, CtflowError, DeliveryError, NotWritten, StorageFull
from ctflow.core.processes import Line
from ctflow.node.access.sign_on import SignOn
from ctflow.node.certificates import said_of_expiry
from ctflow.node.deliver.targets import credentials_of, target_of
from ctflow.node.deliver.webhook import read_secret
from ctflow.node.journal.journal import JOURNAL_FILE, LOCK_FILE
from ctflow.node.journal.schema import schema_version, unopened
from ctflow.node.keeping.locks import REMOVAL_LOCK
from ctflow.node.settings.groups import Destination
from ctflow.node.settings.models import with_options
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.tls import TlsContext, contexts_of
from ctflow.node.work.messages import NotReady, Ready, Setup
from ctflow.node.work.pool import Places
from ctflow.node.work.worker import run_worker
from ctflow.settings.run import Settings
from ctflow.settings.schema import Loc, key_text, size_text

_CLOSE_S = 10.0
_REMEDY = "the user of the node must be able to write there"


def opened(settings: ServiceSettings, run: Settings, place_of: Callable[[Loc], str] = key_text) -> Iterator[str]:
    """Open folders, bundle, engine and devices.

    Makes and keeps only the engine's file in the cache, as at a start. A running node is not interrupted, but the
    check opens a second engine next to each of its own: on a GPU this takes the memory of one more worker meanwhile.

    Args:
        settings: The site's.
        run: How each series is run.
        place_of: How a message names the place of a model, or of a rule's options.

    Yields:
        A line for each item that could be opened.

    Raises:
        CtflowError: One cannot be opened: the error with which the node would end or refuse every instance.
    """
    try:
        yield _data_folder(settings)
    except OSError as error:  # of a folder that may not be entered
        raise output_error_from_oserror(error, "the data folder", _REMEDY) from error
    if settings.copy_to is not None:
        yield _copies(settings.copy_to)
    for webhook in settings.webhooks:
        read_secret(webhook.secret_file)
        yield f"can read the secret of webhook {webhook.name}"
    yield from _secrets(settings)
    yield from (f"{name}: {said_of_expiry(each)}" for name, each in contexts_of(settings).items())
    for model in _models(settings, run):
        devices: list[str | None] = [*settings.devices] or [None]
        while devices:
            device = devices.pop(0)
            setup = Setup(model.bundle, replace(model.run, device=device), settings.rules, logging.WARNING)
            try:
                word, warnings = _first_word(setup)
            except CtflowError as error:
                if model.at:
                    error.args = (f"{place_of(model.at)}: {error}",)
                raise
            if device is None and word.gpus > 1:  # the node uses them all
                devices += [f"cuda:{number}" for number in range(1, word.gpus)]
            where = device or ("cuda:0" if word.gpus else "the CPU")
            yield f"opened {model.named}{word.model} {word.version} on {where}"
            yield from (f"warning: {warning}" for warning in warnings)


@dataclass(frozen=True)
class _Opened:
    """A model to open; `named` begins a line about it, and `at` leads to it in the settings."""

    named: str
    bundle: Path | None
    run: Settings
    at: Loc = ()


def _models(settings: ServiceSettings, run: Settings) -> list[_Opened]:
    """Every model, and each again for the options of a rule with which it is read or opened otherwise."""
    all_ = settings.models or (None,)
    bundles = [(each and each.bundle) or settings.bundle for each in all_]
    found = [
        _Opened(f"{each.name}: " if each else "", bundle, with_options(run, each), ("models", number) if each else ())
        for number, (each, bundle) in enumerate(zip(all_, bundles, strict=True))
    ]
    known = {(each.bundle, *_how(each.run)) for each in found}
    for number, rule in enumerate(settings.rules):
        for each in settings.models_of(rule) if rule.options is not None else ():
            bundle, asked = bundles[all_.index(each)], with_options(run, each, rule.options)
            if (bundle, *_how(asked)) not in known:
                known.add((bundle, *_how(asked)))
                named = f"{each.name}, rule {number + 1}: " if each else f"rule {number + 1}: "
                found.append(_Opened(named, bundle, asked, ("rules", number, "options")))
    return found


def _how(run: Settings) -> tuple[object, ...]:
    """What a model may refuse when it is opened."""
    return run.engine, run.precision, run.config, run.allow_code, run.seg == "fractional"


def answers(settings: ServiceSettings) -> Iterator[str]:
    """Ask each destination whether it answers, as the node would: nothing is sent.

    Yields:
        A line for each destination.

    Raises:
        DeliveryError: One does not; after all were asked, the first of them.
    """
    tls, failed = contexts_of(settings), None
    for number, each in enumerate(settings.destinations, start=1):
        try:
            yield f"{each.name}: {answer_of(settings, each, tls.get(f'destinations[{number}].tls'))}"
        except DeliveryError as error:
            failed = failed or error
            yield f"{each.name}: {error}"
    if failed is not None:
        raise failed


def answer_of(settings: ServiceSettings, destination: Destination, tls: TlsContext | None) -> str:
    """Ask one destination.

    Raises:
        DeliveryError: It cannot be reached, or does not accept the node.
    """
    return target_of(settings.ae_title, destination, tls).ask()


def _secrets(settings: ServiceSettings) -> Iterator[str]:
    """Read the files with users, tokens and passwords."""
    web = settings.web
    if web.enabled and (web.sign_on == "local" or web.token_file is not None):
        SignOn(web, lambda *_args, **_more: None, lambda _title, _address: False)
        yield "can read the files of users and token"
    for each in settings.destinations:
        if credentials_of(each).headers():
            yield f"can read the credentials for {each.name}"


def _data_folder(settings: ServiceSettings) -> str:
    data = settings.data
    place = next(each for each in (data, *data.parents) if os.path.lexists(each))
    _write_in(place, "the data folder")
    places = Places.below(data)
    folders = [each for each in (places.inbox, places.results, places.scratch) if os.path.lexists(each)]
    for part in (*folders, *places.inbox.glob("??")):  # an earlier start by another user may have made some of them
        _write_in(part, f"{part.relative_to(data)} in the data folder")
    for lock in (data / LOCK_FILE, data / REMOVAL_LOCK):  # a backup by another user may have made the second
        if lock.exists():
            _write_to(lock)
    if (data / JOURNAL_FILE).exists():
        _journal(data / JOURNAL_FILE)
    disk = places.inbox if places.inbox.exists() else place  # the inbox may be on a separate disk
    if shutil.disk_usage(disk).free < settings.limits.free_disk:
        wanted = size_text(settings.limits.free_disk)
        raise StorageFull(f"the data folder's disk has less than {wanted} free (limits.free_disk): free some space")
    return "can write to the data folder" if place == data else "can create the data folder"


def _journal(path: Path) -> None:
    """Check the journal's version, and whether SQLite's files can be written."""
    beside = [path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm")]
    for file in (path, *beside):
        if file.exists():
            _write_to(file)
    # Without both no process has it open. Opened as immutable, SQLite makes neither: they would belong to this user
    # and block the node.
    mode = "mode=ro" if all(file.exists() for file in beside) else "immutable=1"
    uri = f"{path.absolute().as_uri()}?{mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=30)) as connection:
            schema_version(connection)
    except sqlite3.Error as error:
        raise unopened(error) from error


def _write_to(file: Path) -> None:
    """Open a file of the node for writing, and write nothing; this releases the locks that this process has on it."""
    try:
        os.close(os.open(file, os.O_RDWR))
    except OSError as error:
        raise output_error_from_oserror(error, f"{file.name} in the data folder", _REMEDY) from error


def _copies(folder: Path) -> str:
    if not os.path.lexists(folder):
        raise NotWritten("the folder for copies (copy_to) does not exist: create or mount it", reason="copies-folder")
    _write_in(folder, "the folder for copies (copy_to)")
    return "can write to the folder for copies"


def _write_in(folder: Path, what: str) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise output_error_from_oserror(error, what, _REMEDY) from error


def _first_word(setup: Setup) -> tuple[Ready, list[str]]:
    """Start a worker, receive what it opened and its warnings, and let it end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, setup))  # not a daemon: it starts processes of cases
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
                raise word.error
            if isinstance(word, Line):
                warnings.append(word.message)
    except (EOFError, OSError) as error:
        raise BackendUnavailable(
            "the worker ended before it had opened the model: see its last lines", reason="worker-ended"
        ) from error
    finally:
        ours.close()  # a waiting worker sees the end and exits
        if process.pid is not None:
            process.join(_CLOSE_S)
            process.kill()
            process.join()
