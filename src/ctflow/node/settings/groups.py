"""Groups of a site's settings: peers, limits, destinations, the page, the log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ctflow.node.journal.records import SameUid
from ctflow.node.settings.tls import ClientTls, Fingerprint
from ctflow.node.settings.values import Address, AeTitle, Host, Name, Network, Port, read_network
from ctflow.node.settings.when import When
from ctflow.settings.schema import FilePath, Group, Key, Reads, Switch, real, size, whole

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
    """Where results are sent."""

    name: Annotated[Name, Key("Its name on the page and in the log.")]
    ae_title: Annotated[AeTitle, Key("Its AE title.")]
    host: Annotated[Host, Key("Its name or IP address.")]
    port: Annotated[Port, Key("Its port.")]
    backoff: Annotated[Backoff, Key("When to send again.")] = Backoff()
    tls: Annotated[ClientTls | None, Key("TLS to it; `tls: {}` with the system's authorities.")] = None
    when: Annotated[When | None, Key("Only results that meet these conditions.")] = None


@dataclass(frozen=True)
class Web(Group):
    """The page."""

    enabled: Annotated[Switch, Key("Whether to serve the page, `/healthz`, `/readyz` and `/metrics`.")] = True
    bind: Annotated[Address, Key("Address that it listens on. There is no password.")] = "127.0.0.1"
    port: Annotated[Port, Key("Its port.")] = 8113
    hosts: Annotated[
        tuple[Host, ...],
        Key("Names under which browsers may reach it, in addition to localhost and IP addresses."),
    ] = ()
    patient_data: Annotated[
        Switch, Key("Whether journal and page have the patient's name, ID and birth date, accession number, UIDs.")
    ] = False


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
