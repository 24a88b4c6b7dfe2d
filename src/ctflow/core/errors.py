"""The errors that ctflow raises on purpose, and the exit code of each.

A message says what happened, to which series or file, and what to do. It never holds patient data: a series is named
by the digest of its UID (`ctflow.core.volume.digest_of_uid`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

EXIT_DONE = 0
EXIT_PARTLY = 6  # some series done, some refused or failed, or files unreadable
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130


class CtflowError(Exception):
    """Base of every error that ctflow raises on purpose."""

    exit_code = EXIT_UNEXPECTED


class Unexpected(CtflowError):
    """A fault of ctflow that ended one series; the others go on. Its message names the error's type, never its text."""

    reason = "unexpected"


class SettingsInvalid(CtflowError):
    """A flag, file or environment value is wrong; the message names the flag, file, line or key."""

    exit_code = 64


class InputError(CtflowError):
    """The input cannot be segmented."""

    exit_code = 2


class NoUsableSeries(InputError):
    """No series in the input may be run; the message lists what was found and why each was set aside."""


class BrokenSeries(InputError):
    """A series does not form one regular volume.

    Args:
        message: What is wrong, with which series, and what to do.
        reason: A short, stable name of the rule: one of `BrokenSeries.REASONS`.
    """

    REASONS = frozenset(
        {
            "doubled",
            "gap",
            "irregular",
            "mixed-orientation",
            "mixed-size",
            "no-geometry",
            "no-uid",
            "tilted",
            "unreadable",
        }
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), reason=self.reason), (str(self),)  # processes hand errors on by pickle

    def __init__(self, message: str, *, reason: str) -> None:
        if reason not in self.REASONS:
            raise ValueError(f"unknown reason {reason!r}; known: {sorted(self.REASONS)}")
        super().__init__(message)
        self.reason = reason


class UnsupportedPixels(InputError):
    """The pixel data cannot be turned into Hounsfield units without guessing."""


class ModelError(CtflowError):
    """The model cannot be used."""

    exit_code = 3


class BundleInvalid(ModelError):
    """The MONAI bundle lacks something, or needs something that ctflow does not do; the message names the key.

    Args:
        message: What is wrong, in which file at which key, and what to do.
        reason: A short, stable name of the rule: one of `BundleInvalid.REASONS`.
    """

    REASONS = frozenset(
        {
            "argument",  # of a component: missing, or not one that it has
            "bundle",  # a file, the metadata, the weights
            "expression",  # would have to be executed
            "keys",  # a transform's keys: not the image or the prediction
            "order",  # of the transforms
            "override",  # MONAI could not apply it
            "reference",  # leads nowhere, or in a circle
            "target",  # another class
            "value",  # of an argument
            "workflow",  # the evaluator or the dataset uses something else
        }
    )

    def __init__(self, message: str, *, reason: str = "bundle") -> None:
        if reason not in self.REASONS:
            raise ValueError(f"unknown reason {reason!r}; known: {sorted(self.REASONS)}")
        super().__init__(message)
        self.reason = reason


class ExportFailed(ModelError):
    """An engine could not be made from the model."""


class EngineMismatch(ModelError):
    """A stored engine belongs to another model, GPU, driver or version."""


class ParityFailed(ModelError):
    """An engine's results differ from the reference by more than its stated tolerance."""


class AccuracyFailed(ModelError):
    """A model marks less of a known truth than was asked for."""


class ResourceError(CtflowError):
    """This machine lacks something; the case may be retried."""

    exit_code = 4


class BackendUnavailable(ResourceError):
    """The requested engine cannot run on this machine; the message says what to install."""


class NetworkNotTaken(BackendUnavailable):
    """The engine computes other networks than this one, on any machine."""


class RequirementUnmet(ResourceError):
    """A package that ctflow needs is absent or of another version; the message says what to install."""


class DeviceOutOfMemory(ResourceError):
    """The device has too little memory for the case."""


class OutputError(CtflowError):
    """The result could not be written."""

    exit_code = 5


class NotWritten(OutputError):
    """The output folder or a file in it could not be written."""


class StorageFull(OutputError):
    """The disk is full."""


class DeliveryError(CtflowError):
    """A result could not be sent to a peer."""

    exit_code = 7


class PeerRefused(DeliveryError):
    """The peer rejected the association or the object."""


class DestinationDown(DeliveryError):
    """The peer does not answer."""
