"""Settings of the page and of DICOMweb: where they listen, and who may look, act and send."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from ctflow.node.settings.tls import PageTls
from ctflow.node.settings.values import Address, AeTitle, Host, Network, Port, matching, read_network
from ctflow.settings.schema import FilePath, Group, Key, Reads, Refused, Switch, real

HeaderName = Annotated[str, Reads(partial(matching, r"[A-Za-z][A-Za-z0-9-]{0,63}", "the name of an HTTP header"))]


@dataclass(frozen=True)
class Proxy(Group):
    """A reverse proxy in front of the page."""

    addresses: Annotated[
        tuple[Annotated[Network, Reads(read_network)], ...],
        Key("Addresses or networks of the proxies whose headers are trusted, also X-Forwarded-For and -Proto."),
    ] = ()
    header: Annotated[HeaderName, Key("Header with the name of the user that the proxy signed on.")] = (
        "X-Forwarded-User"
    )
    roles_header: Annotated[
        HeaderName | None, Key("Header with the user's roles, separated by commas; other words in it are ignored.")
    ] = None
    role: Annotated[
        Literal["none", "view", "operate", "admin"],
        Key("Role of a user for whom the proxy names none; `none` refuses such a user."),
    ] = "view"


@dataclass(frozen=True)
class Web(Group):
    """The page and DICOMweb."""

    enabled: Annotated[Switch, Key("Whether to serve the page, STOW-RS, `/healthz`, `/readyz` and `/metrics`.")] = True
    bind: Annotated[Address, Key("Address that it listens on; other than loopback needs `sign_on`, or `open`.")] = (
        "127.0.0.1"
    )
    port: Annotated[Port, Key("Its port.")] = 8113
    hosts: Annotated[
        tuple[Host, ...],
        Key("Names under which browsers and senders may reach it, in addition to localhost and IP addresses."),
    ] = ()
    patient_data: Annotated[
        Switch, Key("Whether journal and page have the patient's name, ID and birth date, accession number, UIDs.")
    ] = False
    sign_on: Annotated[
        Literal["none", "local", "proxy"],
        Key("Who may use the page: anyone who reaches it, the users of `users_file`, or those that a proxy names."),
    ] = "none"
    users_file: Annotated[FilePath | None, Key("File of the users, made with `ctflow node user add`.")] = None
    session_idle_s: Annotated[float, real(60, 86400), Key("Seconds without a request after which a session ends.")] = (
        1800.0
    )
    session_most_s: Annotated[
        float, real(60, 30 * 86400), Key("Seconds after which a user must sign in again in any case.")
    ] = 43200.0
    proxy: Annotated[Proxy, Key("A reverse proxy in front of the page.")] = Proxy()
    token_file: Annotated[
        FilePath | None, Key("File with the bearer token that `/metrics` asks for, except of this machine.")
    ] = None
    open: Annotated[
        Switch, Key("Listen on other addresses although there is no sign-on, or passwords would be sent in the clear.")
    ] = False
    stow: Annotated[Switch, Key("Whether to receive instances by STOW-RS at `/dicom-web/studies`.")] = False
    stow_ae_title: Annotated[
        AeTitle, Key("AE title that stands for a STOW-RS sender without a user's name, in `peers` and `rules`.")
    ] = "STOW"

    tls: Annotated[PageTls | None, Key("TLS of the page and of DICOMweb.")] = None

    def __post_init__(self) -> None:
        if not self.enabled:
            return
        if self.sign_on == "local" and self.users_file is None:
            raise Refused("sign_on: local needs users_file", "sign_on", reason="missing-key")
        if self.sign_on == "proxy" and not self.proxy.addresses:
            raise Refused("sign_on: proxy needs proxy.addresses", "sign_on", reason="missing-key")
        if ipaddress.ip_address(self.bind).is_loopback or self.open:
            return
        if self.sign_on == "none":
            raise Refused(
                "anyone who reaches it could use the page: give sign_on, or say open: true", "bind", reason="no-sign-on"
            )
        if self.sign_on == "local" and not (self.tls or self.proxy.addresses):
            raise Refused(
                "passwords would be sent in the clear: give tls, or a proxy with TLS (proxy.addresses), or say open: "
                "true",
                "bind",
                reason="no-sign-on",
            )
