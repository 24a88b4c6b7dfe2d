"""Torch-TensorRT tells how it divides a network, and hands out the configuration of each build.

Read for Torch-TensorRT 2.11 to 2.14: `dynamo.compile` is silent for minutes. What it can show (`dynamo.Debugger`) goes
to standard output, at debug level, with a log configuration of its own. No issue is known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def observed_build(package: Any, divided: Callable[[Any], None], configured: Callable[[Any], None]) -> Iterator[None]:
    """Observe `dynamo.compile` in this block; other threads of the process must not call it meanwhile.

    Args:
        package: The module torch_tensorrt.
        divided: Receives the network as a module whose children are the parts, before the first is built.
        configured: Receives the configuration of each part's build, before it begins.
    """
    with ExitStack() as stack:
        try:
            interpreter = package.dynamo.conversion._TRTInterpreter.TRTInterpreter
            partitioning = package.dynamo.partitioning
            for name in ("fast_partition", "global_partition"):
                _observe(stack, partitioning, name, lambda found: divided(found[0]))
            _observe(stack, interpreter, "_populate_trt_builder_config", configured)
        except AttributeError as error:
            log.warning("this version of torch-tensorrt shows no progress: %s", error)
        yield


def _observe(stack: ExitStack, owner: Any, name: str, told: Callable[[Any], None]) -> None:
    """Until the stack is closed, tell what a function returns."""
    before = getattr(owner, name)

    @wraps(before)
    def observed(*given: Any, **named: Any) -> Any:
        found = before(*given, **named)
        told(found)
        return found

    setattr(owner, name, observed)
    stack.callback(partial(setattr, owner, name, before))
