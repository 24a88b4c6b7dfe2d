"""The group of a site's settings for a webhook."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from ctflow.node.settings.groups import Backoff
from ctflow.node.settings.values import Name
from ctflow.node.settings.when import When
from ctflow.settings.schema import FilePath, Group, Key, Reads, Refused, Switch, one_line, shown


def _url(value: Any) -> str:
    """An address of HTTP without user and fragment; unencrypted only for this machine."""
    found = one_line(value)
    try:
        parts = urlsplit(found)
        port = parts.port
    except ValueError:
        raise ValueError(f"is no address: {shown(value)}") from None
    if parts.scheme not in ("https", "http") or not parts.hostname or port == 0 or not found.isascii() or " " in found:
        raise ValueError(f"must be an address such as https://host.example.org/path, not {shown(value)}")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError("must have no user, password or fragment: what it is signed with is in secret_file")
    if parts.scheme == "http" and not _is_here(parts.hostname):
        raise ValueError("must begin with https://, unless it is on this machine")
    return found


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Webhook(Group):
    """Who is told of a result by HTTP, signed."""

    name: Annotated[Name, Key("Its name on the page and in the log; no destination has it.")]
    url: Annotated[str, Reads(_url), Key("Gets a POST request for each result; `https`, or on this machine.")]
    secret_file: Annotated[FilePath, Key("File with the secret that requests are signed with, 16 bytes at least.")]
    patient_data: Annotated[Switch, Key("Also send UIDs, and the patient's name, ID and accession number.")] = False
    ca: Annotated[FilePath | None, Key("PEM file of authorities; the system's if omitted.")] = None
    backoff: Annotated[Backoff, Key("When to send again.")] = Backoff()
    when: Annotated[When | None, Key("Only results that meet these conditions.")] = None

    def __post_init__(self) -> None:
        if self.ca is not None and self.url.startswith("http:"):
            raise Refused("needs an address that begins with https://", "ca", reason="conflict")
