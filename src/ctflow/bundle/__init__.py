"""A MONAI bundle's folder -> a `Model`, read without executing any of it."""

from __future__ import annotations

from ctflow.bundle.locate import demonstration_bundle, find_bundle
from ctflow.bundle.read import read_bundle, read_spec, spec_from_documents

__all__ = ["demonstration_bundle", "find_bundle", "read_bundle", "read_spec", "spec_from_documents"]
