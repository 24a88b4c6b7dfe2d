"""A bundle's configuration files as data: documents, references, expressions, and the objects that they describe."""

from ctflow.bundle.config.component import Component
from ctflow.bundle.config.config import (
    MISSING,
    MOST_REFERENCES,
    Config,
    ConfigValue,
    is_disabled,
    is_number,
    short,
)

__all__ = [
    "MISSING",
    "MOST_REFERENCES",
    "Component",
    "Config",
    "ConfigValue",
    "is_disabled",
    "is_number",
    "short",
]
