"""Groups of a site's settings: peers, limits, destinations, the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctflow.node.journal.records import SameUid
from ctflow.node.settings.tls import ClientTls, Fingerprint
from ctflow.node.settings.values import (
    AeTitle,
    Host,
    Name,
    Network,
    Port,
    Url,
    address_text,
    is_this_machine,
    read_network,
)
from ctflow.node.settings.when import When
from ctflow.settings.schema import FilePath, Group, Key, Reads, Refused, Text, real, size, whole

MB, GB, TB = 10**6, 10**9, 10**12
# Each takes two descriptors and two threads; see `pending.MOST_WAITING`.
MOST_ASSOCIATIONS = 300
_WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Peer(Group):
    """Who may send."""

    host: Annotated[
        Network, Reads(read_network), Key("Address or network that it sends from, such as `10.1.2.3` or `10.1.0.0/16`.")
    ]
    ae_title: Annotated[AeTitle | None, Key("Its AE title; any if omitted.")] = None
    same_uid: Annotated[
        SameUid | None, Key("As `same_uid` of the node, for this peer.", default="`same_uid` of the node")
    ] = None
    tls: Annotated[
        Literal["required", "optional"] | None,
        Key("Whether it may come without TLS (`optional`).", default="required, with the group `tls`"),
    ] = None
    fingerprints: Annotated[
        tuple[Fingerprint, ...],
        Key("SHA-256 of its certificate, or of several while it is replaced; any valid one if omitted."),
    ] = ()
    port: Annotated[
        Port | None, Key("Port where it takes reports of storage commitment, at the address that it sends from.")
    ] = None


@dataclass(frozen=True)
class Limits(Group):
    """Limits for senders."""

    associations: Annotated[
        int,
        whole(1, MOST_ASSOCIATIONS),
        Key(f"Associations at the same time, {MOST_ASSOCIATIONS} at most; more are rejected."),
    ] = 64
    pdu: Annotated[
        int,
        size(4096, 16 * 2**20),
        Key("Largest P-DATA PDU that the node offers to receive; longer PDUs of any kind are refused."),
    ] = 128 * 2**10
    idle_s: Annotated[float, real(1, 3600), Key("Seconds of silence after which an association is aborted.")] = 60.0
    instances: Annotated[int, whole(1, 1_000_000), Key("Most instances of one series.")] = 20_000
    series: Annotated[int, size(MB, 10 * TB), Key("Most bytes of one series.")] = 20 * GB
    free_disk: Annotated[
        int,
        size(0, 1000 * TB),
        Key("Free disk space below which instances are refused (Out of Resources) until more is free."),
    ] = 5 * GB
    request: Annotated[int, size(MB, 10 * TB), Key("Most bytes of a STOW-RS request.")] = 20 * GB


@dataclass(frozen=True)
class Backoff(Group):
    """Waits before a result is sent again."""

    first_s: Annotated[
        float, real(0.1, 3600), Key("Seconds to wait after the first failure; doubled after each further one.")
    ] = 5.0
    most_s: Annotated[float, real(0.1, 86400), Key("The longest wait.")] = 300.0
    give_up_after_s: Annotated[
        float, real(60, 365 * 86400), Key("Seconds after which it fails until a person retries it.")
    ] = float(_WEEK_S)

    def __post_init__(self) -> None:
        if self.first_s > self.most_s:
            raise ValueError(f"first_s {self.first_s:g} is above most_s {self.most_s:g}")

    def wait_s(self, failures: int) -> float:
        """How long to wait after so many failures in a row."""
        return float(min(self.first_s * 2.0 ** min(failures - 1, 40), self.most_s))


@dataclass(frozen=True)
class Destination(Group):
    """Where results are sent: an AE, or a DICOMweb server."""

    name: Annotated[Name, Key("Its name on the page and in the log.")]
    ae_title: Annotated[AeTitle | None, Key("Its AE title; with `host` and `port`, or `url` instead.")] = None
    host: Annotated[Host | None, Key("Its name or IP address.")] = None
    port: Annotated[Port | None, Key("Its port.")] = None
    backoff: Annotated[Backoff, Key("When to send again.")] = Backoff()
    tls: Annotated[ClientTls | None, Key("TLS to it; `tls: {}` with the system's authorities.")] = None
    when: Annotated[When | None, Key("Only results that meet these conditions.")] = None
    url: Annotated[
        Url | None,
        Key("Base address of a DICOMweb server (STOW-RS), such as `https://pacs.example.org/dicom-web`."),
    ] = None
    user: Annotated[Text | None, Key("Its user for the node, with `url`.")] = None
    password_file: Annotated[FilePath | None, Key("File with the user's password.")] = None
    token_file: Annotated[FilePath | None, Key("File with a bearer token, instead of a user.")] = None
    commitment: Annotated[
        Literal["none", "auto", "required"],
        Key("Whether a result counts as delivered only when it commits to it (storage commitment): if it offers that."),
    ] = "none"
    commitment_timeout_s: Annotated[
        float, real(1, 30 * 86400), Key("Seconds within which it must commit; then it gets the object again.")
    ] = 3600.0
    models: Annotated[tuple[Name, ...], Key("Names of the `models` whose results it gets; all if omitted.")] = ()

    def __post_init__(self) -> None:
        of_ae: dict[str, object] = {"ae_title": self.ae_title, "host": self.host, "port": self.port}
        of_url: dict[str, object] = {
            "user": self.user,
            "password_file": self.password_file,
            "token_file": self.token_file,
        }
        if self.url is None:
            for key, value in of_url.items():
                if value is not None:
                    raise Refused("belongs to a DICOMweb server: give url too", key)
            for key, value in of_ae.items():
                if value is None:
                    raise Refused(f"the key {key} is missing (or url, for a DICOMweb server)", reason="missing-key")
            return
        for key, value in of_ae.items():
            if value is not None:
                raise Refused("is of an AE, and url of a DICOMweb server: give one of both", key, reason="conflict")
        if self.commitment != "none":
            raise Refused("is of an AE: a DICOMweb server has no storage commitment", "commitment", reason="conflict")
        self._check_credentials()

    def _check_credentials(self) -> None:
        if (self.user is None) != (self.password_file is None):
            raise Refused("user and password_file belong together", "user", reason="missing-key")
        if self.user is not None and self.token_file is not None:
            raise Refused("give a user or a token, not both", "token_file", reason="conflict")
        is_secure = (self.url or "").startswith("https:")
        if self.tls is not None and not is_secure:
            raise Refused("needs a url that begins with https://", "tls", reason="conflict")
        if (self.user or self.token_file) and not (is_secure or is_this_machine(self.url or "")):
            raise Refused("the credentials would be sent in the clear: give an https:// address", "url")

    @property
    def where(self) -> str:
        """Its address as a person reads it."""
        if self.url is not None or self.host is None or self.port is None:
            return self.url or self.name
        return f"{self.ae_title} at {address_text(self.host, self.port)}"


@dataclass(frozen=True)
class Log(Group):
    """What is logged, one JSON object per line."""

    file: Annotated[FilePath | None, Key("File that is rotated by size; standard output if omitted.")] = None
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Key("Lowest level that is logged; the audit trail is always logged."),
    ] = "info"
    rotate_at: Annotated[int, size(10_000, TB), Key("Size at which the file is rotated.")] = 100 * MB
    keep: Annotated[int, whole(1, 1000), Key("Number of rotated files to keep.")] = 20


@dataclass(frozen=True)
class Queue(Group):
    """Which series run first."""

    urgent_in_a_row: Annotated[
        int, whole(1, 1000), Key("After so many urgent runs one after another, a routine one that waits is taken.")
    ] = 4
    routine_waits_s: Annotated[
        float,
        real(0, 7 * 86400),
        Key("A routine run that has waited for so many seconds is taken after a single urgent one."),
    ] = 1800.0
