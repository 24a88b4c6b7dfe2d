"""Kinds of values in a site's settings: AE titles, addresses, networks, names of hosts."""

from __future__ import annotations

import ipaddress
import re
from functools import partial
from typing import Annotated, Any

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


def _matching(pattern: str, meaning: str, value: Any) -> str:
    found = one_line(value)
    if not re.fullmatch(pattern, found):
        raise ValueError(f"must be {meaning}, not {shown(value)}")
    return found


AeTitle = Annotated[str, Reads(_ae_title)]
Address = Annotated[str, Reads(_address)]
Host = Annotated[str, Reads(_host)]
Port = Annotated[int, whole(1, 65535)]
Name = Annotated[str, Reads(partial(_matching, r"[A-Za-z0-9_-]{1,32}", "1 to 32 letters, digits, - or _"))]
Device = Annotated[str, Reads(partial(_matching, r"cpu|cuda:\d{1,3}", "cpu or a GPU, such as cuda:0"))]


def address_text(host: str, port: int) -> str:
    """A socket's address in its usual notation."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
