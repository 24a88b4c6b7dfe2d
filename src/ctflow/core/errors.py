"""The errors that ctflow raises on purpose, the exit code of each class and the reasons of each (docs/errors.md).

A message says what happened, to which series or file, and what to do. It never holds patient data: a series is named
by the digest of its UID (`ctflow.core.volume.digest_of_uid`). Scripts match the reason, which is stable; the
sentence may change.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

EXIT_DONE = 0
EXIT_PARTLY = 6  # some series done, some refused or failed, or files unreadable
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130


class CtflowError(Exception):
    """Base of every error that ctflow raises on purpose.

    Args:
        message: The fault, the series, file or key concerned, and what to do.
        reason: One of the class's `REASONS`; a class with one reason uses it by default.
    """

    exit_code: ClassVar[int] = EXIT_UNEXPECTED
    REASONS: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        if reason is None and len(self.REASONS) == 1:
            (reason,) = self.REASONS
        if reason not in self.REASONS:
            raise ValueError(f"unknown reason {reason!r} of {type(self).__name__}; known: {sorted(self.REASONS)}")
        super().__init__(message)
        self.reason: str = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), reason=self.reason), (str(self),)  # processes exchange errors by pickle

    @property
    def described(self) -> str:
        """Class, reason and message, as the terminal, the log and the node's journal show them."""
        return f"{type(self).__name__} [{self.reason}]: {self}"


def counted(count: int, one: str, several: str = "") -> str:
    """A number of things, as in "1 slice" and "3 slices"; `several` is their name where an s alone does not make it."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def first_line(error: BaseException) -> str:
    """Another library's error as one short line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class Unexpected(CtflowError):
    """A bug in ctflow ended one series; the others continue. The message names the error's type, never its text."""

    REASONS = frozenset({"unexpected"})


class SettingsInvalid(CtflowError):
    """A flag, file or environment value is wrong; the message names the flag, file, line or key."""

    exit_code = 64
    REASONS = frozenset(
        {
            "backup-place",
            "cannot-listen",
            "certificate",
            "conflict",
            "duplicate-key",
            "folder-in-use",
            "invalid-value",
            "journal",
            "missing-folder",
            "missing-key",
            "no-application",
            "no-sign-on",
            "nothing-kept",
            "other-model",
            "secret-file",
            "series-not-chosen",
            "settings-file",
            "several-segments",
            "unknown-key",
            "usage",
            "users-file",
            "yaml",
        }
    )


class ManifestInvalid(SettingsInvalid):
    """The manifest of a cohort is wrong; the message names the line and, where it is safe, the id."""

    REASONS = frozenset(
        {
            "double-column",
            "duplicate-id",
            "encoding",
            "manifest-unreadable",
            "missing-column",
            "no-rows",
            "row-length",
            "unknown-column",
            "unsafe-id",
            "wrong-location",
            "wrong-value",
        }
    )


class InputError(CtflowError):
    """The input cannot be segmented."""

    exit_code = 2


class NoUsableSeries(InputError):
    """No series in the input is eligible; the message lists each series and why it was set aside."""

    REASONS = frozenset(
        {
            "folder-unreadable",
            "no-case",
            "no-dicom",
            "no-result",
            "no-row",
            "none-eligible",
            "not-a-folder",
            "several-series",
        }
    )


class BrokenSeries(InputError):
    """A series does not form one regular volume."""

    REASONS = frozenset(
        {
            "doubled",
            "gap",
            "irregular",
            "mixed-orientation",
            "mixed-size",
            "no-geometry",
            "other-content",
            "tilted",
            "unreadable",
        }
    )


class NotFetched(InputError):
    """The files of a cohort's row could not be fetched from where they are."""

    REASONS = frozenset(
        {"location-absent", "location-denied", "location-down", "location-refused", "location-too-large"}
    )


class UnsupportedPixels(InputError):
    """The pixel data cannot be converted to Hounsfield units without guessing."""

    REASONS = frozenset(
        {
            "between-slices",
            "damaged-frame",
            "decoded-size",
            "decoded-zeros",
            "decoder-ended",
            "implausible-spacing",
            "modality-lut",
            "no-pixel-format",
            "no-region",
            "no-rescale",
            "not-decodable",
            "not-encapsulated",
            "not-hu",
            "not-seg",
            "oblique",
            "other-codec",
            "other-grid",
            "other-series",
            "photometric",
            "pixel-format",
            "pixel-values",
            "regions-overlap",
            "scaling",
            "seg-layout",
            "several-regions",
            "transfer-syntax",
        }
    )


class ModelError(CtflowError):
    """The model cannot be used."""

    exit_code = 3


class BundleInvalid(ModelError):
    """The model lacks something, or needs something that ctflow does not support; the message names file and key."""

    REASONS = frozenset(
        {
            "archive",
            "argument",
            "cascade",
            "changed",
            "expression",
            "inputs",
            "json",
            "keys",
            "metadata",
            "missing-file",
            "network",
            "no-bundle",
            "not-comparable",
            "order",
            "output-channels",
            "output-not-finite",
            "override",
            "own-code",
            "reference",
            "several-bundles",
            "target",
            "torchscript",
            "unreadable-file",
            "value",
            "weights",
            "weights-mismatch",
            "weights-not-finite",
            "window-size",
            "workflow",
        }
    )


class ExportFailed(ModelError):
    """An engine could not be built from the model."""

    REASONS = frozenset(
        {
            "graph",
            "not-buildable",
            "not-compilable",
            "not-exportable",
            "not-runnable",
            "nothing-made",
            "too-large",
        }
    )


class EngineMismatch(ModelError):
    """A stored engine belongs to another model, GPU, driver or version."""

    REASONS = frozenset({"other-tensors", "stored-engine"})


class ParityFailed(ModelError):
    """An engine's results differ from the reference by more than its stated tolerance."""

    REASONS = frozenset({"differed-on-ct", "differs"})


class AccuracyFailed(ModelError):
    """A model marks less of a known truth than required."""

    REASONS = frozenset({"dice-too-low", "lesion-missed"})


class ResourceError(CtflowError):
    """This machine lacks something; the case may be retried."""

    exit_code = 4


class BackendUnavailable(ResourceError):
    """The requested engine cannot run on this machine; the message says what to install."""

    REASONS = frozenset(
        {
            "compiler-failed",
            "device-failed",
            "no-cluster",
            "no-engine",
            "no-such-device",
            "not-exported",
            "not-installed",
            "not-loadable",
            "worker-ended",
            "worker-not-started",
            "wrong-device",
            "wrong-gpu",
            "wrong-precision",
        }
    )


class NetworkNotTaken(BackendUnavailable):
    """The engine computes other networks than this one, on any machine."""

    REASONS = frozenset({"network-not-taken"})


class RequirementUnmet(ResourceError):
    """A package that ctflow needs is absent or of another version; the message says what to install."""

    REASONS = frozenset({"requirement-unmet"})


class DeviceOutOfMemory(ResourceError):
    """The device has too little memory for the case."""

    REASONS = frozenset({"out-of-memory"})


class TemporaryFolderFailed(ResourceError):
    """This machine's folder for temporary files cannot take the files of a cohort's row."""

    REASONS = frozenset({"temporary-full", "temporary-too-small", "temporary-unwritable"})


class OutputError(CtflowError):
    """The result could not be written."""

    exit_code = 5


class NotWritten(OutputError):
    """The output folder or a file in it could not be written."""

    REASONS = frozenset(
        {"already-there", "copies-folder", "damaged-marker", "journal-closed", "prune-failed", "unwritable"}
    )


class StorageFull(OutputError):
    """The disk is full."""

    REASONS = frozenset({"disk-full"})


class StoreFailed(OutputError):
    """The object store or DICOMweb server to which a cohort's results go failed; its open rows stay open."""

    REASONS = frozenset({"store-absent", "store-denied", "store-down", "store-refused"})


class DeliveryError(CtflowError):
    """A result could not be sent to a peer."""

    exit_code = 7


class PeerRefused(DeliveryError):
    """The peer rejected the association or the object."""

    REASONS = frozenset(
        {
            "association-rejected",
            "commitment-refused",
            "copy-failed",
            "no-commitment",
            "no-context",
            "not-committed",
            "object-refused",
            "object-unreadable",
            "webhook-refused",
        }
    )


class DestinationDown(DeliveryError):
    """The peer does not answer."""

    REASONS = frozenset(
        {
            "access-denied",
            "association-ended",
            "folder-unmounted",
            "no-answer",
            "no-connection",
            "tls",
            "webhook-secret",
        }
    )
