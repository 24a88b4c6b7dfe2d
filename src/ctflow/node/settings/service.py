"""All settings of a site, and how they are read from its file."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from ctflow.node.journal.records import SameUid
from ctflow.node.rules import Rule
from ctflow.node.settings.groups import Destination, Limits, Log, Peer, Queue
from ctflow.node.settings.models import NodeModel, with_options
from ctflow.node.settings.retention import Retention
from ctflow.node.settings.tls import ServerTls
from ctflow.node.settings.values import Address, AeTitle, Device, Port
from ctflow.node.settings.web import Web
from ctflow.node.settings.webhooks import Webhook
from ctflow.settings.document import Given, given_in_file
from ctflow.settings.run import Processing, Settings, add_layers, data_folder_from_environment
from ctflow.settings.schema import FilePath, Key, Refused, Switch, real, whole, wrong_choice


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
    same_uid: Annotated[
        SameUid,
        Key(
            "Other content under a known SOPInstanceUID: `refuse` it (status C001), answer success but `keep_first`, "
            "or let the `newest` replace it."
        ),
    ] = "refuse"
    tls: Annotated[
        ServerTls | None, Key("TLS on the DICOM port; then every peer must use it, unless its `tls` is `optional`.")
    ] = None
    limits: Annotated[Limits, Key("Limits for senders.")] = Limits()
    quiet_period_s: Annotated[
        float, real(0.1, 3600), Key("Seconds without a new instance after which a series is complete.")
    ] = 10.0
    complete_by: Annotated[
        Literal["series", "study"],
        Key("Whether a series is complete by itself, or waits until its whole study is quiet."),
    ] = "series"
    study_quiet_period_s: Annotated[
        float,
        real(0.1, 86_400),
        Key(
            "With `complete_by: study`: seconds without a new instance of a study after which its series are complete."
        ),
    ] = 60.0
    copy_to: Annotated[FilePath | None, Key("Folder that gets a copy of every result.")] = None
    bundle: Annotated[
        FilePath | None,
        Key(
            "The folder of a MONAI bundle, or an nnU-Net model as a folder or zip; the demonstration bundle if omitted."
        ),
    ] = None
    models: Annotated[
        tuple[NodeModel, ...],
        Key(
            "Several models: `name`, `bundle`, and any key from `volume` on, except `cache`, in place of the node's. "
            "Without this key there is one, the `bundle`.",
            most=64,
        ),
    ] = ()
    engines_open: Annotated[
        int | None,
        whole(1, 64),
        Key(
            "Models that each worker keeps open; the least recently used closes.",
            default="2 on a CPU; what its memory holds on a GPU",
        ),
    ] = None
    queue: Annotated[Queue, Key("Which series run first.")] = Queue()
    devices: Annotated[
        tuple[Device, ...],
        Key(
            "`cpu`, or GPUs such as `[cuda:0, cuda:1]`: one worker on each; every GPU, or the CPU, if omitted.", most=64
        ),
    ] = ()
    destinations: Annotated[
        tuple[Destination, ...],
        Key("Where results are sent; each gets all of them, unless `models` or `when` chooses.", most=64),
    ] = ()
    webhooks: Annotated[tuple[Webhook, ...], Key("Who is told of results by HTTP.", most=64)] = ()
    retention: Annotated[Retention, Key("What is removed, and when.")] = Retention()
    web: Annotated[Web, Key("The page and DICOMweb.")] = Web()
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
        told: list[str] = [each.name for each in self.webhooks]
        for key, what, names in (
            ("destinations", "name", [each.name for each in self.destinations]),
            ("webhooks", "name", [*(each.name for each in self.destinations), *told]),
            ("devices", "device", [*self.devices]),
            ("models", "name", [each.name for each in self.models]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise Refused(f"the {what} {min(twice)} is used twice", key)
        for number, peer in enumerate(self.peers):
            for key in ("tls", "fingerprints") if self.tls is None else ():
                if getattr(peer, key):
                    raise Refused("needs the node's own TLS: give the group tls", "peers", number, key)
            if peer.fingerprints and self.tls is not None and self.tls.client == "none":
                raise Refused("no client shows a certificate with tls.client: none", "peers", number, "fingerprints")
        if self.retention.free_disk is not None and self.retention.free_disk <= self.limits.free_disk:
            raise Refused(
                "must be more than limits.free_disk, below which instances are refused", "retention", "free_disk"
            )
        if self.web.enabled and self.web.port == self.port:
            raise Refused(f"port and web.port are both {self.port}", "port", reason="conflict")
        for count, rule in enumerate(self.rules[:-1], start=1):
            if rule.takes_all:
                raise Refused(f"is never reached: rule {count} applies to every series", "rules", count)
        self._check_models()

    def _check_models(self) -> None:
        for count, rule in enumerate(self.rules):
            self._check_names(rule.run, "rules", count, "run")
        for count, destination in enumerate(self.destinations):
            self._check_names(destination.models, "destinations", count, "models")
        self._check_options()

    def _check_names(self, names: tuple[str, ...], *at: str | int) -> None:
        known = [each.name for each in self.models]
        for place, name in enumerate(names):
            if not known:
                raise Refused(f"there is no model {name}: name it and its bundle under models", *at, place)
            if name not in known:
                raise Refused(wrong_choice(name, known), *at, place)

    def _check_options(self) -> None:
        """Find options that do not go together, in a model or with a rule."""
        for number, model in enumerate(self.models):
            try:
                self.run_of(model)
            except Refused as error:
                raise Refused(str(error), "models", number, *error.at, reason=error.reason) from None
        for number, rule in enumerate(self.rules):
            for each in self.models_of(rule) if rule.options is not None else ():
                try:
                    self.run_of(each, rule)
                except Refused as error:
                    at = ("rules", number, "options", *error.at)
                    raise Refused(str(error), *at, reason=error.reason) from None

    @property
    def run(self) -> Settings:
        """How a worker runs each series, without the options of a model or rule."""
        device = self.devices[0] if len(self.devices) == 1 else None
        return Settings(device=device, **{each.name: getattr(self, each.name) for each in fields(Processing)})

    def run_of(self, model: NodeModel | None, rule: Rule | None = None) -> Settings:
        """How a model runs the series of a rule; None is the only model, or no rule.

        Raises:
            SettingsInvalid: Options of them do not go together.
        """
        return with_options(self.run, model, rule.options if rule is not None else None)

    def models_of(self, rule: Rule | None) -> tuple[NodeModel | None, ...]:
        """The models that a rule, or None, runs."""
        if not self.models:
            return (None,)
        named = rule.run if rule is not None else ()
        return tuple(each for each in self.models if each.name in named) if named else self.models[:1]


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


def same_uid_of(settings: ServiceSettings, ae_title: str, address: str) -> SameUid:
    """What becomes of other content under a known UID from this sender; arguments as of `is_peer`."""
    caller = _ip_address(address)
    found = (peer.same_uid for peer in settings.peers if peer.same_uid and _is_it(peer, ae_title, caller))
    return next(found, settings.same_uid)


def is_peer(settings: ServiceSettings, ae_title: str, address: str) -> bool:
    """Whether a caller may connect to the node.

    Args:
        settings: Its peers; none means this machine only.
        ae_title: As given by the caller.
        address: As given by the socket.
    """
    caller = _ip_address(address)
    if not settings.peers:
        return caller is not None and caller.is_loopback
    return any(_is_it(peer, ae_title, caller) for peer in settings.peers)


def is_peer_by_address(settings: ServiceSettings, ae_title: str, address: str) -> bool:
    """Whether a caller's address and AE title suffice: not of a peer that is known by its certificate."""
    caller = _ip_address(address)
    if not settings.peers:
        return is_peer(settings, ae_title, address)
    return any(_is_it(peer, ae_title, caller) and not peer.fingerprints for peer in settings.peers)


def may_be_plain(settings: ServiceSettings, address: str) -> bool:
    """Whether some peer at an address may connect without TLS."""
    caller = _ip_address(address)
    return settings.tls is None or any(
        caller is not None and caller in peer.host and peer.tls == "optional" for peer in settings.peers
    )


def certificate_refusal(settings: ServiceSettings, ae_title: str, address: str, certificate: str | None) -> str:
    """Why a peer may not come with this certificate; empty if it may.

    Args:
        settings: Its peers.
        ae_title: As given by the caller.
        address: As given by the socket.
        certificate: Its fingerprint; empty if it showed none, None if it came without TLS.
    """
    if settings.tls is None:
        return ""
    caller = _ip_address(address)
    peers = [peer for peer in settings.peers if _is_it(peer, ae_title, caller)]
    if certificate is None:
        return "" if any(peer.tls == "optional" for peer in peers) else "it came without TLS"
    if not settings.peers or any(not peer.fingerprints or certificate in peer.fingerprints for peer in peers):
        return ""
    return "its certificate is not the one of this peer (fingerprints)"


def report_target(settings: ServiceSettings, ae_title: str, address: str) -> Peer | None:
    """The peer that gets reports of storage commitment at this address; None if no port is known."""
    caller = _ip_address(address)
    return next((each for each in settings.peers if each.port is not None and _is_it(each, ae_title, caller)), None)


_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def _ip_address(address: str) -> _IpAddress | None:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found


def _is_it(peer: Peer, ae_title: str, caller: _IpAddress | None) -> bool:
    return caller is not None and caller in peer.host and peer.ae_title in (None, ae_title.strip())
