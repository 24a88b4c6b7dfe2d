"""ctflow: a chest CT series goes in, a DICOM SEG with measurements comes out.

`import ctflow` imports nothing else: each name below is loaded when it is first used (docs/api.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctflow.api import read_model, read_series, run, segment
    from ctflow.core import errors
    from ctflow.core.errors import CtflowError
    from ctflow.core.model import Model
    from ctflow.core.volume import Geometry, Volume
    from ctflow.pipeline.run import RunReport
    from ctflow.pipeline.segmentation import Segmentation
    from ctflow.pipeline.segmenter import Segmenter
    from ctflow.settings.run import Settings

__version__ = "0.1.0"

__all__ = [
    "CtflowError",
    "Geometry",
    "Model",
    "RunReport",
    "Segmentation",
    "Segmenter",
    "Settings",
    "Volume",
    "errors",
    "read_model",
    "read_series",
    "run",
    "segment",
]

_MODULES = {
    "CtflowError": "ctflow.core.errors",
    "Geometry": "ctflow.core.volume",
    "Model": "ctflow.core.model",
    "RunReport": "ctflow.pipeline.run",
    "Segmentation": "ctflow.pipeline.segmentation",
    "Segmenter": "ctflow.pipeline.segmenter",
    "Settings": "ctflow.settings.run",
    "Volume": "ctflow.core.volume",
    "read_model": "ctflow.api",
    "read_series": "ctflow.api",
    "run": "ctflow.api",
    "segment": "ctflow.api",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: torch and MONAI take seconds, which `import ctflow` must not cost."""
    if name == "errors":
        return import_module("ctflow.core.errors")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
