"""How each destination of the settings is reached."""

from __future__ import annotations

from ctflow.node.deliver.storage import StorageTarget, TakeReport
from ctflow.node.deliver.stow import Credentials, StowTarget
from ctflow.node.settings.groups import Destination
from ctflow.node.tls import TlsContext


def target_of(
    ae_title: str, destination: Destination, tls: TlsContext | None, report: TakeReport | None = None
) -> StorageTarget | StowTarget:
    """A destination's target.

    Args:
        ae_title: The node's own.
        destination: Of the settings.
        tls: Of its group `tls`, if it has one.
        report: Takes its reports of storage commitment.
    """
    if destination.url is not None:
        return StowTarget(destination.url, credentials_of(destination), tls)
    return StorageTarget(
        ae_title,
        destination.ae_title or "",
        destination.host or "",
        destination.port or 0,
        tls,
        destination.commitment,
        report,
    )


def credentials_of(destination: Destination) -> Credentials:
    """How the node shows a destination who it is."""
    return Credentials(destination.user or "", destination.password_file, destination.token_file)
