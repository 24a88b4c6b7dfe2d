"""Files of a bundle that its expressions read: JSON text, and arrays saved by torch, weights only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctflow.bundle.expressions.values import NotUnderstood

LARGEST_BYTES = 4_000_000  # DiNTS' architecture files have 20 kB


class BundleFiles:
    """The files inside a bundle's folder.

    Args:
        folder: The bundle; None if there is only its configuration, so that no file can be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def path(self, text: str) -> Path:
        """The file that an expression names; relative paths start in the bundle.

        Raises:
            NotUnderstood: It is outside the bundle, absent or too large.
        """
        if self._folder is None or "\0" in text:
            raise NotUnderstood(text[:80], "is a file, which cannot be read here")
        try:
            root = self._folder.resolve()
            found = (root / text).resolve()
            if not found.is_relative_to(root):
                raise NotUnderstood(text[:80], "is a file outside the bundle")
            if not found.is_file():
                raise NotUnderstood(text[:80], "is a file that the bundle does not have")
            if found.stat().st_size > LARGEST_BYTES:
                raise NotUnderstood(text[:80], f"is a file of more than {LARGEST_BYTES // 1_000_000} MB")
        except (OSError, RuntimeError):
            raise NotUnderstood(text[:80], "is a file that cannot be read") from None
        return found

    def text(self, path: str) -> str:
        """The text of a file."""
        try:
            return self.path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise NotUnderstood(path[:80], "is a file that cannot be read as text") from None

    def arrays(self, path: str) -> Any:
        """What torch saved in a file, weights only: tensors and NumPy arrays, as NumPy arrays."""
        from ctflow.bundle.saved.plain import LOAD_ERRORS, as_arrays, loaded_plainly  # noqa: PLC0415  # torch

        file = self.path(path)
        try:
            with file.open("rb") as stream:
                return as_arrays(loaded_plainly(stream, file.name))
        except LOAD_ERRORS:
            raise NotUnderstood(file.name, "holds more than weights and arrays") from None
