"""A site's settings for its node: from one YAML file, or none, to `ServiceSettings`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ctflow.node.rules import Rule
from ctflow.settings.document import Given, given_in_file
from ctflow.settings.run import Processing, Settings, add_layers, data_folder_from_environment
from ctflow.settings.schema import (
    FilePath,
    Group,
    Key,
    Reads,
    Refused,
    Switch,
    effective,
    key_text,
    one_line,
    real,
    shown,
    size,
    whole,
)

MB, GB, TB = 10**6, 10**9, 10**12
# Each takes two descriptors and two threads; see `pending.MOST_WAITING`.
MOST_ASSOCIATIONS = 300
_WEEK_S = 7 * 24 * 3600
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# ------------------------------------------------------------------------------------------------- kinds of values


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


def _network(value: Any) -> Network:
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


# ---------------------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Peer(Group):
    """Who may send."""

    host: Annotated[
        Network, Reads(_network), Key("Address or network that it sends from, such as `10.1.2.3` or `10.1.0.0/16`.")
    ]
    ae_title: Annotated[AeTitle | None, Key("Its AE title; any if omitted.")] = None


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


@dataclass(frozen=True, kw_only=True)
class ServiceSettings(Processing):
    """All settings of a site; made by `read_settings`."""

    # Settings of `ctflow run` that a node handles differently.
    MEANT: ClassVar[Mapping[str, str]] = {"device": "devices", "series": "rules", "pick": "rules", "force": "rules"}

    data: Annotated[
        FilePath, Key("Folder of received instances, journal and results.", default="the user's data folder")
    ]
    ae_title: Annotated[AeTitle, Key("AE title of the node, as called and calling AE.")] = "CTFLOW"
    bind: Annotated[Address, Key("Address that it listens on.")] = "127.0.0.1"
    port: Annotated[Port, Key("Port that it listens on.")] = 11112
    peers: Annotated[tuple[Peer, ...], Key("Who may send and use C-ECHO; only this machine if omitted.")] = ()
    limits: Annotated[Limits, Key("Limits for senders.")] = Limits()
    quiet_period_s: Annotated[
        float, real(0.1, 3600), Key("Seconds without a new instance after which a series is complete.")
    ] = 10.0
    copy_to: Annotated[FilePath | None, Key("Folder that gets a copy of every result.")] = None
    bundle: Annotated[
        FilePath | None,
        Key(
            "The folder of a MONAI bundle, or an nnU-Net model as a folder or zip; the demonstration bundle if omitted."
        ),
    ] = None
    devices: Annotated[
        tuple[Device, ...],
        Key(
            "`cpu`, or GPUs such as `[cuda:0, cuda:1]`: one worker on each; every GPU, or the CPU, if omitted.", most=64
        ),
    ] = ()
    destinations: Annotated[
        tuple[Destination, ...], Key("Where results are sent; each gets all of them.", most=64)
    ] = ()
    web: Annotated[Web, Key("The page.")] = Web()
    log: Annotated[Log, Key("The log.")] = Log()
    allow_demonstration: Annotated[Switch, Key("Also send results of a demonstration model.")] = False
    rules: Annotated[
        tuple[Rule, ...],
        Key("Which series run; the first rule that applies decides. Without rules, every eligible series runs."),
    ] = ()

    def __post_init__(self) -> None:
        """Reject settings that conflict.

        Raises:
            SettingsInvalid: A duplicate name, one port for two servers, or a rule that no series can reach.
        """
        super().__post_init__()
        for key, what, names in (
            ("destinations", "name", [each.name for each in self.destinations]),
            ("devices", "device", [*self.devices]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise Refused(f"the {what} {min(twice)} is used twice", key)
        if self.web.enabled and self.web.port == self.port:
            raise Refused(f"port and web.port are both {self.port}", "port", reason="conflict")
        for count, rule in enumerate(self.rules[:-1], start=1):
            if rule.takes_all:
                raise Refused(f"is never reached: rule {count} applies to every series", "rules", count)

    @property
    def run(self) -> Settings:
        """How a worker runs each series."""
        device = self.devices[0] if len(self.devices) == 1 else None
        return Settings(device=device, **{each.name: getattr(self, each.name) for each in fields(Processing)})


# --------------------------------------------------------------------------------------------------------- reading


def given_settings(file: Path | None, environment: Mapping[str, str], typed: Mapping[str, Any] | None = None) -> Given:
    """Gather a site's settings: from the command line, else the file, else the environment.

    Args:
        file: The YAML file; None takes the defaults.
        environment: Environment variables; they also give the default data folder.
        typed: Fields of `ServiceSettings` from the command line; None and False mean "not given".

    Raises:
        SettingsInvalid: The file cannot be read, or is not a YAML file of settings.
    """
    found = add_layers(given_in_file(file) if file else Given(), ServiceSettings, typed or {}, environment)
    if "data" not in found.data:
        found.data["data"] = data_folder_from_environment(environment)
    return found


def read_settings(file: Path | None, environment: Mapping[str, str]) -> ServiceSettings:
    """Read a site's settings.

    Args:
        file: The YAML file; None takes the defaults.
        environment: Environment variables.

    Returns:
        The settings; their paths are absolute.

    Raises:
        SettingsInvalid: The file cannot be read or holds an invalid value; names the file, the line and the key.
    """
    return given_settings(file, environment).read(ServiceSettings)


def is_peer(settings: ServiceSettings, ae_title: str, address: str) -> bool:
    """Whether a caller may connect to the node.

    Args:
        settings: Its peers; none means this machine only.
        ae_title: As given by the caller.
        address: As given by the socket.
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


# ------------------------------------------------------------------------------------------------------- explaining


def values_and_origins(settings: ServiceSettings, found: Given) -> list[str]:
    """Every key with its value and origin, one per line (`ctflow serve --check`)."""
    return [f"{key_text(loc)} = {value}  ({found.origin(loc)})" for loc, value in effective(settings)]


def explain_settings(settings: ServiceSettings) -> str:
    """The meaning of a site's settings, in readable lines (`ctflow serve --check`)."""
    lines = [
        f"listens as {settings.ae_title} on {address_text(settings.bind, settings.port)}",
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


def address_text(host: str, port: int) -> str:
    """A socket's address in its usual notation."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _explain_peers(settings: ServiceSettings) -> list[str]:
    if settings.peers:
        return [f"accepts series from {peer.ae_title or 'any AE title'} at {peer.host}" for peer in settings.peers]
    beyond = not ipaddress.ip_address(settings.bind).is_loopback
    return [
        "accepts series from this machine only" + (": give peers, or nobody on the network can send" if beyond else "")
    ]


def _explain_rules(rules: tuple[Rule, ...]) -> list[str]:
    lines = [f"rule {count}: {_explain_rule(rule)}" for count, rule in enumerate(rules, start=1)]
    if rules and rules[-1].takes_all:
        return lines
    return [*lines, "every other series runs if it is eligible" if rules else "every eligible series runs"]


def _explain_rule(rule: Rule) -> str:
    wanted = [
        f"{name} {' or '.join(values)}"
        for name in ("modality", "body_part", "description", "calling_ae")
        if (values := getattr(rule, name))
    ]
    if rule.thickness_mm:
        wanted.append(f"thickness_mm {rule.thickness_mm.min:g} to {rule.thickness_mm.max:g}")
    decision = "run" if rule.decision == "run" else "ignore"
    forced = ", even if it is not eligible" if rule.force else ", if it is eligible" if decision == "run" else ""
    return f"{decision} {' and '.join(wanted) or 'every series'}{forced}" + (f" ({rule.name})" if rule.name else "")


def _explain_destinations(settings: ServiceSettings) -> list[str]:
    lines = [
        f"sends results to {each.name}: {each.ae_title} at {address_text(each.host, each.port)}, again after "
        f"{each.backoff.first_s:g} to {each.backoff.most_s:g} s, for {each.backoff.give_up_after_s / 3600:g} h"
        for each in settings.destinations
    ] or ["sends results nowhere"]
    if settings.destinations:
        verb = "are also sent" if settings.allow_demonstration else "are not sent (allow_demonstration)"
        lines.append(f"results of a demonstration model {verb}")
    return [*lines, *([f"copies results to {settings.copy_to}"] if settings.copy_to else [])]


def _explain_web(web: Web) -> str:
    if not web.enabled:
        return "has no page"
    open_to = "" if ipaddress.ip_address(web.bind).is_loopback else ", without a password, to anyone who can reach it"
    shown = "with patient data" if web.patient_data else "without patient data"
    return f"shows its page on http://{address_text(web.bind, web.port)}/ {shown}{open_to}"
