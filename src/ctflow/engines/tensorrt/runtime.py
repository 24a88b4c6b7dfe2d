"""The Python module of TensorRT or TensorRT-RTX: whether it loads, what its version can do, and its messages."""

from __future__ import annotations

import importlib
import logging
import re
from importlib.util import find_spec
from typing import Any

from ctflow.core.errors import BackendUnavailable, first_line

log = logging.getLogger(__name__)


_OLDEST = (10,)  # the first version whose networks follow the types of their graph
# TensorRT's own words, for example "Error Code 2: OutOfMemory (Requested size was 2833252352 bytes.)".
_NO_MEMORY = re.compile(r"OutOfMemory|out of memory|could not be allocated", re.IGNORECASE)
_LOGGERS: dict[str, tuple[Messages, Any]] = {}


def runtime_state(name: str) -> tuple[bool, str]:
    """Whether TensorRT or TensorRT-RTX is installed and loads.

    Args:
        name: Backend name.

    Returns:
        True and the version, or False and what to do.
    """
    if find_spec(_module_name(name)) is None:
        return False, f"the package {name} is not installed: pip install 'ctflow[{name}]'"
    try:
        runtime = load_runtime(name)
    except BackendUnavailable as error:
        return False, str(error)
    if not is_new_enough(runtime):
        return False, f"{name} {runtime.__version__} is older than 10: pip install --upgrade 'ctflow[{name}]'"
    return True, f"{name} {runtime.__version__}"


def is_new_enough(runtime: Any) -> bool:
    """Whether networks follow the types of their graph; TensorRT-RTX's, whose versions count from 1, always do."""
    return is_rtx(runtime) or runtime_version(runtime)[:1] >= _OLDEST


def is_rtx(runtime: Any) -> bool:
    """Whether this is TensorRT-RTX."""
    return str(runtime.__name__).startswith("tensorrt_rtx")


def runtime_version(runtime: Any) -> tuple[int, ...]:
    """The version as numbers."""
    return tuple(int(part) for part in str(runtime.__version__).split(".") if part.isdecimal())


def load_runtime(name: str) -> Any:
    """The Python module of TensorRT or TensorRT-RTX.

    Raises:
        BackendUnavailable: It does not load; gives the system's reason.
    """
    try:
        return importlib.import_module(_module_name(name))
    except (ImportError, OSError, RuntimeError) as error:  # a stub without libraries, or a library that is missing
        raise BackendUnavailable(f"{name} does not load: {first_line(error)}", reason="not-loadable") from error


def _module_name(name: str) -> str:
    return name.replace("-", "_")


class Messages:
    """TensorRT's messages: its errors are kept for ctflow's own, the rest goes to the debug log."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def logger(self, runtime: Any) -> Any:
        """An object of the runtime's logger class that writes here."""
        kept, worst = self.errors, (runtime.ILogger.Severity.INTERNAL_ERROR, runtime.ILogger.Severity.ERROR)

        class Listener(runtime.ILogger):  # type: ignore[misc]  # the class is known at run time only
            def __init__(self) -> None:
                runtime.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in worst:
                    kept.append(message.strip())
                log.debug("%s: %s", runtime.__name__, message)

        return Listener()

    @property
    def tell_of_memory(self) -> bool:
        """Whether an error says that memory did not suffice."""
        return any(_NO_MEMORY.search(text) for text in self.errors)

    @property
    def last(self) -> str:
        """The last error, as one short line."""
        text = self.errors[-1] if self.errors else "it gave no reason"
        return text.splitlines()[0][:300]


def messages_of(runtime: Any) -> tuple[Messages, Any]:
    """A runtime's messages, from now on, and its logger: TensorRT takes one logger per process and keeps the first."""
    if runtime.__name__ not in _LOGGERS:
        messages = Messages()
        _LOGGERS[runtime.__name__] = (messages, messages.logger(runtime))
    messages, logger = _LOGGERS[runtime.__name__]
    messages.errors.clear()
    return messages, logger
