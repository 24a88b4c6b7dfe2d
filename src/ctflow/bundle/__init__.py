"""A MONAI bundle's folder, or a model that nnU-Net trained -> a `Model`, read without executing any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctflow.bundle.locate import demonstration_bundle, find_bundle
from ctflow.bundle.metadata import read_body_parts

if TYPE_CHECKING:
    from ctflow.bundle.read import read_bundle, read_spec, spec_from_documents

__all__ = [
    "demonstration_bundle",
    "find_bundle",
    "read_body_parts",
    "read_bundle",
    "read_spec",
    "spec_from_documents",
]


def __getattr__(name: str) -> Any:
    """Import lazily: networks and weights import torch, 150 MB that `ctflow inspect` does not need."""
    if name in __all__:
        from ctflow.bundle import read  # noqa: PLC0415

        return getattr(read, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
