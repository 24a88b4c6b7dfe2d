"""A connection to Ray: to a cluster that is there, or to a Ray of this machine alone that ends with this process."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ctflow.core.entry_point import interrupted_by_signals
from ctflow.core.errors import BackendUnavailable, RequirementUnmet, first_line
from ctflow.core.requirements import check_requirements

_PREFIX = "ctflow-ray-"
_LONGEST = 40  # of the folder for temporary files: Ray adds 66 letters to it, and the name of a socket has 107 at most
_STARTS = 3  # Ray gives up after 30 s, which a busy machine may need
_STORE_BYTES = 80_000_000  # the least that Ray takes: only rows and outcomes pass, which are smaller than its pages
# Ray reads these when it is imported, and its processes when they start.
_QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # else it prints to standard output whenever a worker ends
_LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # "no other machines", on any system: all listens on 127.0.0.1 only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # 15 otherwise: a worker would wait for whatever else this machine does
    "RAY_health_check_failure_threshold": "100",  # its only machine is there; when busy, it answers late
    "RAY_health_check_timeout_ms": "60000",
    "AUTOSCALER_METRIC_PORT": "0",  # any, so that two runs on one machine do not meet
    "RAY_AUTH_MODE": "token",  # a token of this run only: another user of this machine cannot connect
}

log = logging.getLogger(__name__)


def check_ray() -> None:
    """Stop if Ray is not installed.

    Raises:
        RequirementUnmet: Says what to install, and how to do without.
    """
    try:
        check_requirements("cohort")
    except RequirementUnmet as error:
        without = "without it, this process computes with --device cuda:0 or cpu, or several do with --part"
        raise RequirementUnmet(f"a cluster, or several GPUs, need Ray: {error}; {without}") from error


@contextmanager
def connected(address: str | None, gpus: int | None) -> Iterator[Any]:
    """Ray, connected; Ctrl-C and SIGTERM interrupt what is done with it.

    Args:
        address: Of a cluster, as `ray.init` takes it. None starts a Ray on this machine, which ends with this context,
            or with this process if that is killed.
        gpus: How many GPUs the latter has; None means all.

    Yields:
        The package.

    Raises:
        BackendUnavailable: No cluster is there, or Ray does not start.
        RequirementUnmet: Ray is not installed.
    """
    check_ray()
    with ExitStack() as stack:
        stack.enter_context(_environment(_QUIET))
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
        if address is None:
            stack.enter_context(_environment({**_LOCAL, "RAY_AUTH_TOKEN": secrets.token_hex(32)}))
            options |= {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "num_gpus": gpus,
                "_temp_dir": str(stack.enter_context(_temporary_folder())),
            }
        else:
            options["address"] = address
        import ray  # noqa: PLC0415  # an optional package, and a second

        stack.callback(ray.shutdown)
        _initialize(ray, options, 1 if address else _STARTS)
        stack.enter_context(interrupted_by_signals())  # again: Ray has its own handler
        yield ray


def _initialize(ray: Any, options: Mapping[str, Any], attempts: int) -> None:
    what = "Ray does not start here" if options["address"] == "local" else "--address: no Ray cluster answers"
    for left in reversed(range(attempts)):
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises plain ones, too
            if not left:
                raise BackendUnavailable(f"{what}: {first_line(error)}", reason="no-cluster") from error
            log.warning("%s: %s", what, first_line(error))
            ray.shutdown()
        else:
            return


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs; those that killed processes left are removed, too."""
    place = tempfile.gettempdir()
    place = place if len(place) <= _LONGEST else "/tmp"  # noqa: S108  # mkdtemp makes the folder there
    for left in Path(place).glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=place))  # another run must not find it without its lock
    folder = new.with_name(new.name.removeprefix("."))
    (new / "lock").touch()
    with _locked(new):
        try:
            new.rename(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A lock that ends with this process; an OSError if another one has it."""
    handle = os.open(folder / "lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
