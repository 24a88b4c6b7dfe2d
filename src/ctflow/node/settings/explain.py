"""What a site's settings mean, for `ctflow serve --check`: each value with its origin, and all of them in sentences."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence

from ctflow.node.rules import Rule
from ctflow.node.settings.groups import Destination, Peer
from ctflow.node.settings.retention import Retention
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.tls import ServerTls
from ctflow.node.settings.values import address_text
from ctflow.node.settings.web import Web
from ctflow.node.settings.when import When
from ctflow.settings.document import Given
from ctflow.settings.run import Processing, Settings
from ctflow.settings.schema import Loc, effective, key_text, keys_of, shown_as_set, size_text
from ctflow.settings.viewers import VIEWERS


def values_and_origins(settings: ServiceSettings, found: Given) -> list[str]:
    """Every key with its value and origin, one per line (`ctflow serve --check`), and options of models and rules."""
    lines = [f"{key_text(loc)} = {value}  ({found.origin(loc)})" for loc, value in effective(settings)]
    return [*lines, *_options_and_origins(settings, found)]


def _options_and_origins(settings: ServiceSettings, found: Given) -> Iterator[str]:
    """The run options of each model, and of each model of a rule that has some."""
    places = {model.name: ("models", number) for number, model in enumerate(settings.models)}
    for model in settings.models:
        yield from _options(f"model {model.name}", settings.run_of(model), found, [places[model.name]])
    for number, rule in enumerate(settings.rules):
        for each in settings.models_of(rule) if rule.options is not None else ():
            here = [*([places[each.name]] if each else []), ("rules", number, "options")]
            what = f"rule {number + 1}{f', model {each.name}' if each else ''}"
            yield from _options(what, settings.run_of(each, rule), found, here)


def _options(what: str, run: Settings, found: Given, places: Sequence[Loc]) -> Iterator[str]:
    """Each option of a model or rule: where it was given last, in the rule, the model or for the node."""
    for name, (annotation, key) in keys_of(Processing).items():
        if name == "viewer":  # what it chose is shown
            continue
        value = getattr(run, name)
        text = (value is None and key.default) or shown_as_set(annotation, value)
        written = [(*place, each) for place in reversed(places) for each in (name, "viewer") if _is_of(name, each)]
        origins = [f"{found.origin(loc)}{_by_viewer(loc)}" for loc in written if found.origin(loc) != "default"]
        yield f"{what}: {name} = {text}  ({[*origins, found.origin((name,))][0]})"


def _is_of(name: str, key: str) -> bool:
    return key == name or name in VIEWERS["pacs"]


def _by_viewer(loc: Loc) -> str:
    return ", viewer" if loc[-1] == "viewer" else ""


def explain_settings(settings: ServiceSettings) -> str:
    """The meaning of a site's settings, in readable lines (`ctflow serve --check`)."""
    lines = [
        f"listens as {settings.ae_title} on {address_text(settings.bind, settings.port)}",
        *_explain_tls(settings.tls),
        *_explain_peers(settings),
        _explain_completion(settings),
        *_explain_rules(settings.rules),
        *_explain_models(settings),
        *(["computes and marks only where the body is"] if settings.roi == "body" else []),
        *_explain_destinations(settings),
        f"keeps its data in {settings.data}",
        *_explain_retention(settings.retention),
        _explain_web(settings.web),
        f"writes its log to {settings.log.file or 'standard output'}",
    ]
    return "\n".join(lines)


def _explain_completion(settings: ServiceSettings) -> str:
    if settings.complete_by == "study":
        return f"a series is complete after {settings.study_quiet_period_s:g} s without a new instance of its study"
    return f"a series is complete after {settings.quiet_period_s:g} s without a new instance"


def _explain_peers(settings: ServiceSettings) -> list[str]:
    if settings.peers:
        return [
            f"accepts series from {peer.ae_title or 'any AE title'} at {peer.host}{_explain_security(peer)}"
            for peer in settings.peers
        ]
    beyond = not ipaddress.ip_address(settings.bind).is_loopback
    return [
        "accepts series from this machine only" + (": give peers, or nobody on the network can send" if beyond else "")
    ]


def _explain_tls(tls: ServerTls | None) -> list[str]:
    if tls is None:
        return ["receives without TLS"]
    wanted = {
        "required": "clients must have a certificate",
        "optional": "clients may have a certificate",
        "none": "clients need no certificate",
    }
    return [f"receives with TLS; {wanted[tls.client]}"]


def _explain_security(peer: Peer) -> str:
    named = "s " if len(peer.fingerprints) > 1 else " "
    known = f", with the certificate{named}of `fingerprints`" if peer.fingerprints else ""
    return known + (", also without TLS" if peer.tls == "optional" else "")


def _explain_models(settings: ServiceSettings) -> list[str]:
    where = ", ".join(settings.devices) or "every GPU, or the CPU"
    return [
        f"model{f' {each.name}' if each else ''}: "
        f"{(each and each.bundle) or settings.bundle or 'the demonstration bundle (research only)'}; "
        f"engine {settings.run_of(each).engine}, on {where}"
        for each in settings.models or (None,)
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
    by = f" with {' and '.join(rule.run)}" if rule.run else ""
    urgent = ", before routine series" if rule.priority == "urgent" else ""
    told = f"{decision} {' and '.join(wanted) or 'every series'}{by}{forced}{urgent}"
    return told + (f" ({rule.name})" if rule.name else "")


def _explain_destinations(settings: ServiceSettings) -> list[str]:
    lines = [
        f"sends results{f' of {chr(32).join(each.models)}' if each.models else ''}{_explain_when(each.when)} to "
        f"{each.name}: {each.where}"
        f"{'' if each.tls is None else ' with TLS'}{_explain_commitment(each)}, again after "
        f"{each.backoff.first_s:g} to {each.backoff.most_s:g} s, for {each.backoff.give_up_after_s / 3600:g} h"
        for each in settings.destinations
    ] or ["sends results nowhere"]
    if settings.destinations:
        verb = "are also sent" if settings.allow_demonstration else "are not sent (allow_demonstration)"
        lines.append(f"results of a demonstration model {verb}")
    lines += [f"tells {each.name} of results{_explain_when(each.when)}: {each.url}" for each in settings.webhooks]
    return [*lines, *([f"copies results to {settings.copy_to}"] if settings.copy_to else [])]


def _explain_when(when: When | None) -> str:
    if when is None:
        return ""
    of = f" of {' or '.join(when.segments)}" if when.segments else ""
    wanted = [
        *([f"model {' or '.join(when.model)}"] if when.model else []),
        *([f"{when.volume_ml.min:g} to {when.volume_ml.max:g} ml{of}"] if when.volume_ml else []),
        *([f"{when.findings.min} to {when.findings.max} findings{of}"] if when.findings else []),
    ]
    marked = [f"a mark{of}"] if when.segments and not (when.volume_ml or when.findings) else []
    return f" with {' and '.join([*wanted, *marked])}" if wanted or marked else ""


def _explain_retention(retention: Retention) -> list[str]:
    days = [
        f"{what} after {value:g} days"
        for what, value in (("instances", retention.instances_days), ("results", retention.results_days))
        if value is not None
    ]
    if retention.free_disk is not None:
        days.append(f"the oldest below {size_text(retention.free_disk)} free")
    if not days:
        return ["removes nothing"]
    of = "delivered or discarded" if retention.only_delivered else "finished"
    return [f"removes files of {of} series: {', '.join(days)}"]


def _explain_commitment(destination: Destination) -> str:
    meant = {"none": "", "auto": ", which commits to them if it offers to", "required": ", which must commit to them"}
    return meant[destination.commitment]


def _explain_web(web: Web) -> str:
    if not web.enabled:
        return "has no page"
    users = {
        "none": "to anyone on this machine",
        "local": f"to the users of {web.users_file}",
        "proxy": f"to users whom a proxy at {', '.join(map(str, web.proxy.addresses))} names",
    }[web.sign_on]
    if web.sign_on == "none" and not ipaddress.ip_address(web.bind).is_loopback:
        users = "without a password, to anyone who can reach it"
    shown = "with patient data" if web.patient_data else "without patient data"
    stow = f"; receives by STOW-RS there, as {web.stow_ae_title} or a user" if web.stow else ""
    scheme = "http" if web.tls is None else "https"
    return f"shows its page on {scheme}://{address_text(web.bind, web.port)}/ {shown}, {users}{stow}"
