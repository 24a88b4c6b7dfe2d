"""Groups of a site's settings for TLS: of the node's own ports, and of its connections to destinations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ctflow.settings.schema import FilePath, Group, Key, Reads, Refused, Switch, one_line, shown


def _fingerprint(value: Any) -> str:
    """SHA-256 of a certificate as `openssl x509 -fingerprint -sha256` writes it, or its 64 hexadecimal digits."""
    found = one_line(value).replace(":", "").lower()
    if not re.fullmatch("[0-9a-f]{64}", found):
        raise ValueError(
            f"must be a SHA-256 fingerprint, 64 hexadecimal digits with or without colons, not {shown(value)}"
        )
    return found


def _with_colons(digits: str) -> str:
    return ":".join(re.findall("..", digits.upper()))


Fingerprint = Annotated[str, Reads(_fingerprint, _with_colons)]


@dataclass(frozen=True)
class ServerTls(Group):
    """TLS of a port that the node listens on, with certificates of its clients."""

    certificate: Annotated[
        FilePath, Key("PEM file of the node's certificate, then those of intermediate authorities, if any.")
    ]
    key: Annotated[FilePath | None, Key("PEM file of its private key; the certificate's file if omitted.")] = None
    key_password_file: Annotated[FilePath | None, Key("File with the key's password, if it has one.")] = None
    ca: Annotated[
        FilePath | None,
        Key("PEM file of what clients' certificates must come from: authorities, or self-signed certificates."),
    ] = None
    client: Annotated[
        Literal["required", "optional", "none"],
        Key("Whether a client must have a certificate; one that it shows must be valid, except with `none`."),
    ] = "required"

    def __post_init__(self) -> None:
        if self.client != "none" and self.ca is None:
            raise Refused("needs ca, to know which certificates to accept: give it, or client: none", "client")


@dataclass(frozen=True)
class PageTls(ServerTls):
    """TLS of the page: browsers seldom have a certificate."""

    client: Annotated[
        Literal["required", "optional", "none"],
        Key("Whether a client must have a certificate; one that it shows must be valid, except with `none`."),
    ] = "none"


@dataclass(frozen=True)
class ClientTls(Group):
    """TLS to a destination."""

    ca: Annotated[
        FilePath | None,
        Key("PEM file of what its certificate must come from; the system's authorities if omitted."),
    ] = None
    fingerprints: Annotated[
        tuple[Fingerprint, ...],
        Key("SHA-256 of its certificate, or of several while it is replaced; without `ca` nothing else is asked."),
    ] = ()
    verify_name: Annotated[
        Switch, Key("Whether its certificate must be for `host`; not with `fingerprints` alone.")
    ] = True
    certificate: Annotated[FilePath | None, Key("PEM file of the node's client certificate, if it wants one.")] = None
    key: Annotated[FilePath | None, Key("PEM file of its private key; the certificate's file if omitted.")] = None
    key_password_file: Annotated[FilePath | None, Key("File with the key's password, if it has one.")] = None

    def __post_init__(self) -> None:
        for name in ("key", "key_password_file"):
            if getattr(self, name) is not None and self.certificate is None:
                raise Refused("belongs to a certificate: give that too", name)
