"""Networks of MONAI as modules of ctflow: the same parameters and results without MONAI's import."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ctflow.networks.native.swin_unetr import SwinUNETR

# Where MONAI has each: a bundle may name a network by it.
MODULES = {"SwinUNETR": "monai.networks.nets.swin_unetr"}
_CLASSES: Mapping[str, type[SwinUNETR]] = {"SwinUNETR": SwinUNETR}


def native_class(name: str, arguments: Mapping[str, Any]) -> type[SwinUNETR] | None:
    """Our class of MONAI's network with these arguments; None where MONAI's own is needed.

    MONAI's also says what is wrong with arguments: whatever is unusual goes to it.
    """
    found = _CLASSES.get(name)
    if found is None:
        return None
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError:
        return None
    return found if found.takes(arguments) else None
