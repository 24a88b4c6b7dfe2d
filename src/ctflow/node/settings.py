"""What a site chooses about its node: one YAML file, or none, to `ServiceSettings`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from ctflow.node.rules import Rule, rules_from_place
from ctflow.settings.document import (
    Place,
    key,
    list_of,
    one_of,
    path,
    place_of_file,
    real,
    section,
    size,
    size_text,
    switch,
    text,
    whole,
)
from ctflow.settings.run import data_folder_from_environment

MB, GB, TB = 10**6, 10**9, 10**12
# Each has two descriptors and two threads; see `waiting.MOST_WAITING`.
MOST_ASSOCIATIONS = 300
_WEEK_S = 7 * 24 * 3600
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# ------------------------------------------------------------------------------------------------- kinds of values


def _ae_title(place: Place) -> str:
    """DICOM PS3.5 6.2, AE: at most 16 characters of the default repertoire, no backslash, not blanks alone."""
    value = text(place)
    if len(value) > 16 or not value.isascii() or "\\" in value:
        place.refuse(f"an AE title has 1 to 16 ASCII characters and no backslash, not {place.shown}")
    return value


def _address(place: Place) -> str:
    try:
        return str(ipaddress.ip_address(text(place)))
    except ValueError:
        place.refuse(f"must be an IP address of this machine, as 127.0.0.1 or 0.0.0.0 (all), not {place.shown}")


def _network(place: Place) -> Network:
    try:
        return ipaddress.ip_network(text(place), strict=False)
    except ValueError:
        place.refuse(f"must be an address or a network, as 10.1.2.3 or 10.1.0.0/16, not {place.shown}")


_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*\.?")


def _host(place: Place) -> str:
    """An IP address, or a host's name (RFC 1123)."""
    value = text(place)
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        # Digits and dots alone are an address that went wrong.
        if len(value) > 253 or not _NAME.fullmatch(value) or not re.search("[A-Za-z]", value):
            place.refuse(f"must be a host's name or IP address, without port, not {place.shown}")
    return value


def _destination_name(place: Place) -> str:
    value = text(place)
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value):
        place.refuse(f"must be 1 to 32 letters, digits, - or _, not {place.shown}")
    return value


def _device(place: Place) -> str:
    value = text(place)
    if not re.fullmatch(r"cpu|cuda:\d{1,3}", value):
        place.refuse(f"must be cpu or a GPU, as cuda:0, not {place.shown}")
    return value


_port = whole(1, 65535)


# ---------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Peer:
    """Who may send."""

    host: Network = key(_network, "Address or network that it sends from, as `10.1.2.3` or `10.1.0.0/16`.")
    ae_title: str | None = key(_ae_title, "Its AE title; any if left out.", default=None)


@dataclass(frozen=True)
class Limits:
    """What senders may use up."""

    associations: int = key(
        whole(1, MOST_ASSOCIATIONS),
        f"Associations at the same time, {MOST_ASSOCIATIONS} at most; more are rejected.",
        default=64,
    )
    pdu: int = key(
        size(4096, 16 * 2**20),
        "The largest P-DATA PDU that is offered, and the most bytes of any PDU that are read before it is refused.",
        default=128 * 2**10,
    )
    idle_s: float = key(real(1, 3600), "Seconds without a word after which an association is ended.", default=60.0)
    instances: int = key(whole(1, 1_000_000), "Instances of one series.", default=20_000)
    series: int = key(size(MB, 10 * TB), "Bytes of one series.", default=20 * GB)
    free_disk: int = key(
        size(0, 1000 * TB),
        "Free space below which instances are refused (Out of Resources), until there is more again.",
        default=5 * GB,
    )


@dataclass(frozen=True)
class Backoff:
    """How long to wait before a result is sent again."""

    first_s: float = key(real(0.1, 3600), "Seconds after the first failure; twice as long after each.", default=5.0)
    most_s: float = key(real(0.1, 86400), "The longest wait.", default=300.0)
    give_up_after_s: float = key(
        real(60, 365 * 86400), "After this it is set aside until a person retries it.", default=float(_WEEK_S)
    )

    def __post_init__(self) -> None:
        if self.first_s > self.most_s:
            raise ValueError(f"first_s {self.first_s:g} is above most_s {self.most_s:g}")


@dataclass(frozen=True)
class Destination:
    """Where results are sent."""

    name: str = key(_destination_name, "What the page and the log call it.")
    ae_title: str = key(_ae_title, "Its AE title.")
    host: str = key(_host, "Its name or IP address.")
    port: int = key(_port, "Its port.")
    backoff: Backoff = key(section(Backoff), "When to send again.", default=Backoff(), may_be_empty=True)


@dataclass(frozen=True)
class Web:
    """The page."""

    enabled: bool = key(switch, "Whether there is a page, `/healthz`, `/readyz` and `/metrics`.", default=True)
    bind: str = key(_address, "Address that it listens on. It asks for no password.", default="127.0.0.1")
    port: int = key(_port, "Its port.", default=8113)
    hosts: tuple[str, ...] = key(
        list_of(_host),
        "Names under which browsers reach it, beside localhost and IP addresses; others are refused.",
        default=(),
        may_be_empty=True,
    )
    patient_data: bool = key(
        switch,
        "Keep in the journal and show: the patient's name, ID and birth date, accession number, UIDs.",
        default=False,
    )


@dataclass(frozen=True)
class Log:
    """What is written down, one JSON object a line."""

    file: Path | None = key(path, "A file that is turned over by size; standard output if left out.", default=None)
    level: str = key(
        one_of("debug", "info", "warning", "error"),
        "The least that is written; the audit trail always is.",
        default="info",
    )
    rotate_at: int = key(size(10_000, TB), "Size at which the file is turned over.", default=100 * MB)
    keep: int = key(whole(1, 1000), "How many old files are kept.", default=20)


@dataclass(frozen=True)
class ServiceSettings:
    """Everything that a site chooses; made by `read_settings`."""

    data: Path = key(path, "Folder of what was received, the journal and the results.")
    ae_title: str = key(_ae_title, "AE title of the node, as which it is called and calls.", default="CTFLOW")
    bind: str = key(_address, "Address that it listens on.", default="127.0.0.1")
    port: int = key(_port, "Port that it listens on.", default=11112)
    peers: tuple[Peer, ...] = key(
        list_of(section(Peer)),
        "Who may send and ask for C-ECHO. If left out: this machine only.",
        default=(),
        may_be_empty=True,
    )
    limits: Limits = key(section(Limits), "What senders may use up.", default=Limits(), may_be_empty=True)
    quiet_period_s: float = key(
        real(0.1, 3600), "Seconds without a new instance after which a series is complete.", default=10.0
    )
    copy_to: Path | None = key(path, "Folder that gets a copy of every result.", default=None)
    bundle: Path | None = key(path, "MONAI bundle; the demonstration if left out.", default=None)
    engine: str = key(text, "Backend that computes (`ctflow engines`).", default="auto")
    roi: str | None = key(
        one_of("none", "body"),
        "`body`: windows and marks only where the body is (performance.md). If left out: the whole volume, or what "
        "`CTFLOW_ROI` says.",
        default=None,
    )
    devices: tuple[str, ...] = key(
        list_of(_device, most=64),
        "`cpu`, or GPUs as `[cuda:0, cuda:1]`: a worker on each. If left out: every GPU, or the CPU.",
        default=(),
        may_be_empty=True,
    )
    destinations: tuple[Destination, ...] = key(
        list_of(section(Destination), most=64),
        "Where results are sent; each gets all of them.",
        default=(),
        may_be_empty=True,
    )
    web: Web = key(section(Web), "The page.", default=Web(), may_be_empty=True)
    log: Log = key(section(Log), "What is written down.", default=Log(), may_be_empty=True)
    allow_demonstration: bool = key(
        switch, "Send results of a demonstration model to destinations, too.", default=False
    )
    rules: tuple[Rule, ...] = key(
        rules_from_place,
        "Which series are run; the first rule that fits decides. Without one, what is fit is run.",
        default=(),
        may_be_empty=True,
    )

    def __post_init__(self) -> None:
        for what, names in (
            ("destinations: the name", [each.name for each in self.destinations]),
            ("devices: the device", list(self.devices)),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what} {min(twice)} stands twice")
        if self.web.enabled and self.web.port == self.port:
            raise ValueError(f"port and web.port are both {self.port}")


# --------------------------------------------------------------------------------------------------------- reading


def read_settings(file: Path | None, environment: Mapping[str, str]) -> ServiceSettings:
    """Read a site's settings.

    Args:
        file: The YAML file; None takes the defaults.
        environment: Environment variables; they say where data lies by default.

    Returns:
        The settings; their paths are absolute.

    Raises:
        SettingsInvalid: The file cannot be read or holds what cannot be meant; names the file, the line and the key.
    """
    default = data_folder_from_environment(environment)
    place = None if file is None else place_of_file(file)
    return ServiceSettings(data=default) if place is None else section(ServiceSettings, data=default)(place)


def is_peer(settings: ServiceSettings, ae_title: str, address: str) -> bool:
    """Whether a caller may speak with the node.

    Args:
        settings: Its peers; none means this machine only.
        ae_title: As the caller says it.
        address: As the socket says it.
    """
    try:
        caller = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(caller, ipaddress.IPv6Address) and caller.ipv4_mapped:
        caller = caller.ipv4_mapped
    if not settings.peers:
        return caller.is_loopback
    return any(caller in peer.host and peer.ae_title in (None, ae_title.strip()) for peer in settings.peers)


@dataclass(frozen=True)
class Key:
    """One key for the documentation: its way, what holds without it, and what it means."""

    name: str
    default: str
    meaning: str


def documented_keys(kind: type = ServiceSettings, above: str = "") -> Iterator[Key]:
    """Every key of the file, in its order."""
    for each in fields(kind):
        name = f"{above}{each.name}"
        if is_dataclass(each.default) and not isinstance(each.default, type):
            yield from documented_keys(type(each.default), f"{name}.")
            continue
        yield Key(name, _default_text(each.name, each.default), each.metadata["meaning"])
        if each.name in _LISTS:
            yield from documented_keys(_LISTS[each.name], f"{name}[].")


_LISTS: dict[str, type] = {"peers": Peer, "destinations": Destination, "rules": Rule}
_SIZES = {"pdu", "series", "free_disk", "rotate_at"}


def _default_text(name: str, default: Any) -> str:
    if default is MISSING:
        return "the user's data folder" if name == "data" else "must be given"
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    return size_text(default) if name in _SIZES else f"{default:g}" if isinstance(default, float) else str(default)


# ------------------------------------------------------------------------------------------------------- explaining


def explain_settings(settings: ServiceSettings) -> str:
    """What a site's settings mean, in lines for a person (`ctflow serve --check`)."""
    lines = [
        f"listens as {settings.ae_title} on {_at(settings.bind, settings.port)}",
        *_explain_peers(settings),
        f"a series is complete after {settings.quiet_period_s:g} s without a new instance",
        *_explain_rules(settings.rules),
        f"model: {settings.bundle or 'the demonstration bundle (research only)'}; engine {settings.engine}, on "
        f"{', '.join(settings.devices) or 'every GPU, or the CPU'}",
        *(["computes and marks only where the body is"] if settings.roi == "body" else []),
        *_explain_destinations(settings),
        f"keeps its data in {settings.data}",
        _explain_web(settings.web),
        f"writes its log to {settings.log.file or 'standard output'}",
    ]
    return "\n".join(lines)


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _explain_peers(settings: ServiceSettings) -> list[str]:
    if settings.peers:
        return [f"takes from {peer.ae_title or 'any AE title'} at {peer.host}" for peer in settings.peers]
    beyond = not ipaddress.ip_address(settings.bind).is_loopback
    return ["takes from this machine only" + (": give peers, or nobody on the network can send" if beyond else "")]


def _explain_rules(rules: tuple[Rule, ...]) -> list[str]:
    lines = [f"rule {count}: {_explain_rule(rule)}" for count, rule in enumerate(rules, start=1)]
    if rules and rules[-1].takes_all:
        return lines
    return [*lines, "every other series is run if it is fit" if rules else "every series that is fit is run"]


def _explain_rule(rule: Rule) -> str:
    wanted = [
        f"{name} {' or '.join(values)}"
        for name in ("modality", "body_part", "description", "calling_ae")
        if (values := getattr(rule, name))
    ]
    if rule.thickness_mm:
        wanted.append(f"thickness_mm {rule.thickness_mm.min:g} to {rule.thickness_mm.max:g}")
    decision = "run" if rule.decision == "run" else "ignore"
    forced = ", even if it is not fit" if rule.force else ", if it is fit" if decision == "run" else ""
    return f"{decision} {' and '.join(wanted) or 'every series'}{forced}" + (f" ({rule.name})" if rule.name else "")


def _explain_destinations(settings: ServiceSettings) -> list[str]:
    lines = [
        f"sends results to {each.name}: {each.ae_title} at {_at(each.host, each.port)}, again after "
        f"{each.backoff.first_s:g} to {each.backoff.most_s:g} s, for {each.backoff.give_up_after_s / 3600:g} h"
        for each in settings.destinations
    ] or ["sends results nowhere"]
    if settings.destinations:
        verb = "are sent, too" if settings.allow_demonstration else "are not sent (allow_demonstration)"
        lines.append(f"results of a demonstration model {verb}")
    return [*lines, *([f"copies results to {settings.copy_to}"] if settings.copy_to else [])]


def _explain_web(web: Web) -> str:
    if not web.enabled:
        return "has no page"
    open_to = "" if ipaddress.ip_address(web.bind).is_loopback else ", without a password, to all who reach it"
    shown = "with patient data" if web.patient_data else "without patient data"
    return f"shows its page on http://{_at(web.bind, web.port)}/ {shown}{open_to}"
