"""Kinds of values in a site's settings: AE titles, addresses, networks, names of hosts."""

from __future__ import annotations

import ipaddress
import re
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlsplit

from ctflow.settings.schema import Reads, one_line, shown, whole

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _ae_title(value: Any) -> str:
    """DICOM PS3.5 6.2, AE: at most 16 characters of the default repertoire, no backslash, not only blanks."""
    found = one_line(value)
    if len(found) > 16 or not found.isascii() or "\\" in found:
        raise ValueError(f"an AE title has 1 to 16 ASCII characters and no backslash, not {shown(value)}")
    return found


def _address(value: Any) -> str:
    try:
        return str(ipaddress.ip_address(one_line(value)))
    except ValueError:
        raise ValueError(
            f"must be an IP address of this machine, such as 127.0.0.1 or 0.0.0.0 (all), not {shown(value)}"
        ) from None


def read_network(value: Any) -> Network:
    """An address or a network; a ValueError if it is neither."""
    try:
        return ipaddress.ip_network(one_line(value), strict=False)
    except ValueError:
        raise ValueError(
            f"must be an address or a network, such as 10.1.2.3 or 10.1.0.0/16, not {shown(value)}"
        ) from None


_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


def _host(value: Any) -> str:
    """An IP address, or a host's name (RFC 1123)."""
    found = one_line(value)
    try:
        return str(ipaddress.ip_address(found))
    except ValueError:
        # Digits and dots alone are a mistyped address.
        if len(found) > 253 or not _NAME.fullmatch(found) or not re.search("[A-Za-z]", found):
            raise ValueError(f"must be a host's name or IP address, without port, not {shown(value)}") from None
    return found


def _url(value: Any) -> str:
    """The base address of a DICOMweb server; credentials have keys of their own."""
    found = one_line(value).rstrip("/")
    try:
        parts = urlsplit(found)
        good = parts.scheme in ("http", "https") and parts.port != 0 and _host(parts.hostname or "?")
    except ValueError:
        good = ""
    if not good or parts.query or parts.fragment or "@" in parts.netloc or not found.isascii() or " " in found:
        raise ValueError(
            f"must be an address such as https://pacs.example.org/dicom-web, without user and query, not {shown(value)}"
        )
    return found


def is_this_machine(url: str) -> bool:
    """Whether an address names this machine by localhost or a loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def matching(pattern: str, meaning: str, value: Any) -> str:
    """Text of a pattern; a ValueError that says what it must be if it is not."""
    found = one_line(value)
    if not re.fullmatch(pattern, found):
        raise ValueError(f"must be {meaning}, not {shown(value)}")
    return found


AeTitle = Annotated[str, Reads(_ae_title)]
Address = Annotated[str, Reads(_address)]
Host = Annotated[str, Reads(_host)]
Url = Annotated[str, Reads(_url)]
Port = Annotated[int, whole(1, 65535)]
Name = Annotated[str, Reads(partial(matching, r"[A-Za-z0-9_-]{1,32}", "1 to 32 letters, digits, - or _"))]
Device = Annotated[str, Reads(partial(matching, r"cpu|cuda:\d{1,3}", "cpu or a GPU, such as cuda:0"))]


def address_text(host: str, port: int) -> str:
    """A socket's address in its usual notation."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
