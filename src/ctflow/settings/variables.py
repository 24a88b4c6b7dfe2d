"""Environment variables that look like ctflow's and are none: a slip would leave a setting at its default unsaid."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Collection, Iterable
from functools import cache

from ctflow.settings.schema import shown

_PREFIX = "CTFLOW_"
_OF_TESTS = frozenset(
    {"CTFLOW_DATA", "CTFLOW_RECORD", "CTFLOW_MAP_IMAGE", "CTFLOW_MAP_CUDA_IMAGE", "CTFLOW_MAP_OUTPUT"}
)
# What Kubernetes and Docker's links give every container beside a service with the name ctflow or ctflow-...
_OF_SERVICES = re.compile(r"CTFLOW_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")

log = logging.getLogger(__name__)


def warn_of_unknown(names: Iterable[str], known: Collection[str]) -> None:
    """Warn once of each variable whose name begins like an option's and is none.

    Args:
        names: Of the environment's variables.
        known: The options' variables.
    """
    for name in sorted(names):
        if name.startswith(_PREFIX) and name not in _OF_TESTS | set(known) and not _OF_SERVICES.fullmatch(name):
            endings = [each.removeprefix(_PREFIX) for each in known]
            close = difflib.get_close_matches(name.removeprefix(_PREFIX).upper(), endings, n=1, cutoff=0.5)
            _warn(name, f"do you mean {_PREFIX}{close[0]}?" if close else "no option has this name")


@cache
def _warn(name: str, hint: str) -> None:
    log.warning("the environment variable %s is ignored: %s", shown(name), hint)
