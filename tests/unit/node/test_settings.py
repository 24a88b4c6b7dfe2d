from __future__ import annotations

import dataclasses
import ipaddress
import re
from pathlib import Path

import pytest

from ctflow.core.errors import SettingsInvalid
from ctflow.node.rules import Range, Rule
from ctflow.node.settings.explain import explain_settings, values_and_origins
from ctflow.node.settings.groups import GB, MB, Backoff, Destination, Limits, Log, Peer, Queue
from ctflow.node.settings.models import NodeModel, RunOptions
from ctflow.node.settings.retention import Retention
from ctflow.node.settings.service import ServiceSettings, given_settings, is_peer, read_settings
from ctflow.node.settings.tls import ClientTls, PageTls, ServerTls
from ctflow.node.settings.web import Proxy, Web
from ctflow.node.settings.webhooks import Webhook
from ctflow.settings.run import OPTIONS, Settings
from ctflow.settings.schema import documented
from reasons import raises_reason

HOME = {"HOME": "/home/node"}


def read(tmp_path, content) -> ServiceSettings:
    file = tmp_path / "node.yaml"
    file.write_text(content, encoding="utf-8")
    return read_settings(file, HOME)


def test_everything_works_without_a_file():
    found = read_settings(None, HOME)
    home = Path("/home/node")
    assert found == ServiceSettings(data=home / ".local/share/ctflow", cache=home / ".cache/ctflow")
    assert (found.ae_title, found.bind, found.port) == ("CTFLOW", "127.0.0.1", 11112)
    assert (found.web.bind, found.web.patient_data) == ("127.0.0.1", False)
    assert found.peers == found.destinations == found.rules == ()


def test_data_lies_where_the_environment_says():
    assert read_settings(None, {"XDG_DATA_HOME": "/d", **HOME}).data == Path("/d/ctflow")
    with raises_reason(SettingsInvalid, "missing-folder", names="data"):
        read_settings(None, {})


def test_a_file_of_comments_is_as_none(tmp_path):
    assert read(tmp_path, "# all as it is\n") == read_settings(None, HOME)


EVERYTHING = """
data: /var/lib/ctflow
ae_title: NODE 1
bind: 0.0.0.0
port: 104
peers:
  - {ae_title: ORTHANC, host: 10.1.2.3}
  - host: 10.2.0.0/16
    tls: optional
    port: 4000
    fingerprints: "AB:CD:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00:00"
tls: {certificate: a.crt, key: a.key, key_password_file: password, ca: /etc/ca.pem, client: optional}
same_uid: newest
complete_by: study
study_quiet_period_s: 90
webhooks: [{name: hook, url: "https://hook.example.org/a", secret_file: /etc/hook, ca: /etc/ca.pem, patient_data: true}]
retention: {instances_days: 7, results_days: 30, only_delivered: false, free_disk: 50 GB, events_days: 365}
limits: {associations: 5, pdu: 64 KiB, idle_s: 10, instances: 100, series: 1 GB, free_disk: 20 GB}
quiet_period_s: 2.5
copy_to: out
bundle: bundles/lung
models:
  - {name: lung, seg: binary, overlap: 0.25}
  - {name: body, bundle: bundles/body}
engines_open: 3
queue: {urgent_in_a_row: 2, routine_waits_s: 60}
engine: openvino
config: inference_swinunetr.yaml
allow_code: true
mirror: none
roi: body
precision: bf16
overlap: 0.5
constant_windows: compute
cases_in_flight: 3
volume: phase=50
allow_gaps: true
cache: engines
report: none
secondary_capture: true
pdf: true
seg: labelmap
seg_grid: resampled
segments: finding
omit_empty_frames: false
rtstruct: true
rtstruct_holes: separate
nifti: true
devices: [cuda:0, cuda:1]
destinations:
  - {name: pacs, ae_title: PACS, host: pacs.example.org, port: 11112, models: body}
  - {name: second, ae_title: B, host: "::1", port: 4242, commitment: auto, commitment_timeout_s: 60,
     backoff: {first_s: 1, most_s: 2, give_up_after_s: 60},
     tls: {ca: ca.pem, fingerprints: [0101010101010101010101010101010101010101010101010101010101010101],
      verify_name: false, certificate: b.pem, key: b.key, key_password_file: c}}
web:
  {enabled: true, bind: 10.0.0.1, port: 80, hosts: [node.example.org], patient_data: true, sign_on: proxy,
   users_file: users, session_idle_s: 60, session_most_s: 600, token_file: token, open: true, stow: true,
   stow_ae_title: WEB, proxy: {addresses: [10.0.0.2], header: X-User, roles_header: X-Roles, role: none},
   tls: {certificate: a.pem, key: a.key, key_password_file: c, ca: ca.pem, client: optional}}
log: {file: /var/log/ctflow/node.jsonl, level: debug, rotate_at: 1 MB, keep: 3}
allow_demonstration: true
rules:
  - {run: [lung, body], body_part: CHEST, thickness_mm: {max: 3}, priority: urgent, options: {viewer: ohif}}
  - decision: ignore
"""


def test_every_key_is_read(tmp_path):
    here = tmp_path.absolute()
    expected = ServiceSettings(
        data=Path("/var/lib/ctflow"),
        ae_title="NODE 1",
        bind="0.0.0.0",
        port=104,
        peers=(
            Peer(ipaddress.ip_network("10.1.2.3/32"), "ORTHANC"),
            Peer(ipaddress.ip_network("10.2.0.0/16"), tls="optional", fingerprints=(f"abcd{'0' * 60}",), port=4000),
        ),
        tls=ServerTls(here / "a.crt", here / "a.key", here / "password", Path("/etc/ca.pem"), "optional"),
        limits=Limits(5, 65536, 10.0, 100, GB, 20 * GB),
        same_uid="newest",
        complete_by="study",
        study_quiet_period_s=90.0,
        webhooks=(Webhook("hook", "https://hook.example.org/a", Path("/etc/hook"), True, Path("/etc/ca.pem")),),
        retention=Retention(7.0, 30.0, False, 50 * GB, 365.0),
        quiet_period_s=2.5,
        copy_to=here / "out",
        bundle=here / "bundles/lung",
        models=(
            NodeModel(name="lung", seg="binary", overlap=0.25),
            NodeModel(name="body", bundle=here / "bundles/body"),
        ),
        engines_open=3,
        queue=Queue(2, 60.0),
        engine="openvino",
        config="inference_swinunetr.yaml",
        allow_code=True,
        mirror="none",
        roi="body",
        precision="bf16",
        overlap=0.5,
        constant_windows="compute",
        cases_in_flight=3,
        volume="phase=50",
        allow_gaps=True,
        cache=here / "engines",
        report="none",
        secondary_capture=True,
        pdf=True,
        seg="labelmap",
        seg_grid="resampled",
        segments="finding",
        omit_empty_frames=False,
        rtstruct=True,
        rtstruct_holes="separate",
        nifti=True,
        devices=("cuda:0", "cuda:1"),
        destinations=(
            Destination("pacs", "PACS", "pacs.example.org", 11112, models=("body",)),
            Destination(
                "second",
                "B",
                "::1",
                4242,
                Backoff(1.0, 2.0, 60.0),
                ClientTls(here / "ca.pem", ("01" * 32,), False, here / "b.pem", here / "b.key", here / "c"),
                commitment="auto",
                commitment_timeout_s=60.0,
            ),
        ),
        web=Web(
            True,
            "10.0.0.1",
            80,
            ("node.example.org",),
            True,
            "proxy",
            here / "users",
            60.0,
            600.0,
            Proxy((ipaddress.ip_network("10.0.0.2/32"),), "X-User", "X-Roles", "none"),
            here / "token",
            True,
            True,
            "WEB",
            PageTls(here / "a.pem", here / "a.key", here / "c", here / "ca.pem", "optional"),
        ),
        log=Log(Path("/var/log/ctflow/node.jsonl"), "debug", MB, 3),
        allow_demonstration=True,
        rules=(
            Rule(
                "run",
                body_part=("CHEST",),
                thickness_mm=Range(max=3.0),
                run=("lung", "body"),
                priority="urgent",
                options=RunOptions(viewer="ohif"),
            ),
            Rule("ignore"),
        ),
    )
    found = read(tmp_path, EVERYTHING)
    for each in dataclasses.fields(ServiceSettings):
        assert getattr(found, each.name) == getattr(expected, each.name), each.name
        if each.name != "viewer":  # stands for others
            default = getattr(ServiceSettings(data=Path()), each.name)
            assert getattr(found, each.name) != default, f"{each.name} is not tried"


@pytest.mark.parametrize(
    ("content", "typed", "seg", "origin"),
    [
        ("port: 1\nviewer: ohif", {}, "labelmap", "line 2"),
        ("viewer: ohif\nseg: fractional", {}, "fractional", "line 2"),
        ("seg: fractional\nport: 1", {"viewer": "ohif"}, "labelmap", "--for"),
        ("viewer: ohif", {"seg": "binary"}, "binary", "--seg"),
    ],
)
def test_a_viewer_chooses_what_the_file_or_a_flag_does_not(tmp_path, content, typed, seg, origin):
    file = tmp_path / "node.yaml"
    file.write_text(content, encoding="utf-8")
    found = given_settings(file, {**HOME, "CTFLOW_SEG": "binary"}, typed)
    settings = found.read(ServiceSettings)
    assert settings.run.seg == seg
    assert f"seg = {seg}  ({origin})" in values_and_origins(settings, found)


@pytest.mark.parametrize(
    ("content", "reason", "names"),
    [
        ("ae_titel: X", "unknown-key", ("ae_titel:", "ae_title")),
        ("ae_title: SEVENTEEN LETTERS", "invalid-value", "an AE title has 1 to 16 ASCII characters and no backslash"),
        ("ae_title: a\\b", "invalid-value", "ae_title"),
        ("ae_title: RÖNTGEN", "invalid-value", "ae_title"),
        ("bind: localhost", "invalid-value", "bind: must be an IP address of this machine, such as 127.0.0.1"),
        ("port: 0", "invalid-value", ("port:", "from 1 to 65535", "'0'")),
        ("port: 65536", "invalid-value", ("port:", "from 1 to 65535", "'65536'")),
        ("port: 8113", "conflict", ("web.port", "8113")),
        ("peers: [{ae_title: X}]", "missing-key", "peers[1]: the key host is missing"),
        ("peers: [{host: pacs.example.org}]", "invalid-value", "peers[1].host: must be an address or a network"),
        (
            "destinations: [{name: a, ae_title: X, host: 10.1.2, port: 1}]",
            "invalid-value",
            "destinations[1].host: must be a host's name",
        ),
        ("destinations: [{name: a, ae_title: X, host: 'h:104', port: 1}]", "invalid-value", "without port"),
        (
            "destinations: [{name: ../a, ae_title: X, host: h, port: 1}]",
            "invalid-value",
            "destinations[1].name: must be 1 to 32",
        ),
        (
            "destinations:\n- {name: a, ae_title: X, host: h, port: 1}\n- {name: a, ae_title: Y, host: h, port: 1}",
            "invalid-value",
            "destinations: the name a is used twice",
        ),
        (
            "destinations: [{name: a, ae_title: X, host: h, port: 1, backoff: {first_s: 9, most_s: 1}}]",
            "invalid-value",
            "destinations[1].backoff: first_s 9 is above most_s 1",
        ),
        ("tls: {key: a}", "missing-key", "tls: the key certificate is missing"),
        ("tls: {certificate: a}", "invalid-value", "tls: needs ca"),
        ("tls:", "invalid-value", "tls: has no value"),
        ("peers: [{host: 10.1.2.3, tls: optional}]", "invalid-value", "peers[1].tls: needs the node's own TLS"),
        (
            f"tls: {{certificate: a, client: none}}\npeers: {{host: 10.1.2.3, fingerprints: {'0' * 64}}}",
            "invalid-value",
            "fingerprints: no client shows a certificate",
        ),
        (
            "destinations: [{name: a, ae_title: X, host: h, port: 1, tls: {fingerprints: AB}}]",
            "invalid-value",
            "destinations[1].tls.fingerprints: must be a SHA-256 fingerprint, 64 hexadecimal digits",
        ),
        (
            "destinations: [{name: a, ae_title: X, host: h, port: 1, tls: {key: k}}]",
            "invalid-value",
            "destinations[1].tls.key: belongs to a certificate",
        ),
        ("devices: [gpu]", "invalid-value", ("devices[1]:", "'gpu'")),
        ("devices: [cuda:0, cuda:0]", "invalid-value", "devices: the device cuda:0 is used twice"),
        ("limits: {pdu: 100}", "invalid-value", "limits.pdu: must be from 4 KiB to 16 MiB"),
        ("log: {level: loud}", "invalid-value", ("log.level:", "'loud'", "(choose from debug, info, warning, error)")),
        (
            "rules:\n  - {decision: go}",
            "invalid-value",
            ("line 2: rules[1].decision:", "'go'", "(choose from run, ignore)"),
        ),
        (
            "rules:\n  - {decision: ignore}\n  - {decision: run}",
            "invalid-value",
            "line 3: rules[2]: is never reached: rule 1",
        ),
        ("rules:\n  - {modality: CT}", "missing-key", "line 2: rules[1]: the key decision is missing"),
        ("rules: [{run: lung}]", "invalid-value", "rules[1].run: there is no model lung: name it and its bundle"),
        ("models: [{name: lung}]\nrules: [{run: lunk}]", "invalid-value", ("line 2: rules[1].run", "mean lung?")),
        ("models: [{name: lung}]\nrules: [{run: [lung, lung]}]", "invalid-value", "the model lung is named twice"),
        ("models: [{name: a}, {name: a}]", "invalid-value", "models: the name a is used twice"),
        ("models: [{name: ../a}]", "invalid-value", "models[1].name: must be 1 to 32"),
        ("models: [{name: a, sag: binary}]", "unknown-key", "models[1].sag: unknown key: do you mean seg?"),
        ("models: [{name: a, cache: b}]", "unknown-key", "models[1].cache"),
        ("models:\n- name: a\n  seg: binry", "invalid-value", "line 3: models[1].seg"),
        (
            "segments: finding\nmodels:\n- name: a\n- name: b\n  seg: fractional",
            "conflict",
            "line 4: models[2]: finding: a fractional SEG",
        ),
        (
            "rules:\n- decision: run\n  options:\n    seg: fractional\n    segments: finding",
            "conflict",
            "line 5: rules[1].options.segments: finding",
        ),
        ("rules: [{decision: ignore, options: {seg: binary}}]", "invalid-value", "options needs the decision run"),
        (
            "destinations: [{name: a, ae_title: X, host: h, port: 1, models: lung}]",
            "invalid-value",
            "destinations[1].models: there is no model lung",
        ),
        ("rules: [{decision: ignore, force: true}]", "invalid-value", "rules[1]: force needs the decision run"),
        (
            "rules: [{decision: run, thickness_mm: {min: 2, max: 1}}]",
            "invalid-value",
            "thickness_mm: min 2 is above max 1",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path, content, reason, names):
    with raises_reason(SettingsInvalid, reason, names=names) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith("node.yaml")


@pytest.mark.parametrize(
    ("peers", "ae_title", "address", "expected"),
    [
        ("", "ANY", "127.0.0.1", True),
        ("", "ANY", "127.8.8.8", True),
        ("", "ANY", "::1", True),
        ("", "ANY", "::ffff:127.0.0.1", True),
        ("", "ANY", "10.1.2.3", False),
        ("", "ANY", "not an address", False),
        ("{host: 10.1.2.3, ae_title: A}", "A", "10.1.2.3", True),
        ("{host: 10.1.2.3, ae_title: A}", "A   ", "10.1.2.3", True),
        ("{host: 10.1.2.3, ae_title: A}", "A", "::ffff:10.1.2.3", True),
        ("{host: 10.1.2.3, ae_title: A}", "B", "10.1.2.3", False),
        ("{host: 10.1.2.3, ae_title: A}", "A", "10.1.2.4", False),
        ("{host: 10.1.2.3, ae_title: A}", "A", "127.0.0.1", False),
        ("{host: 10.1.0.0/16}", "B", "10.1.255.255", True),
        ("{host: 10.1.0.0/16}", "B", "10.2.0.0", False),
        ("{host: 'fe80::/10'}", "B", "fe80::1%eth0", True),
    ],
)
def test_only_peers_may_speak_with_the_node(tmp_path, peers, ae_title, address, expected):
    assert is_peer(read(tmp_path, f"peers: [{peers}]" if peers else ""), ae_title, address) is expected


def test_what_a_file_means_is_told_in_lines(tmp_path):
    told = explain_settings(read(tmp_path, EVERYTHING)).splitlines()
    for line in (
        "listens as NODE 1 on 0.0.0.0:104",
        "accepts series from ORTHANC at 10.1.2.3/32",
        "receives with TLS; clients may have a certificate",
        "accepts series from any AE title at 10.2.0.0/16, with the certificate of `fingerprints`, also without TLS",
        "rule 1: run body_part CHEST and thickness_mm 0 to 3 with lung and body, if it is eligible, before routine "
        "series",
        "rule 2: ignore every series",
        "sends results to second: B at [::1]:4242 with TLS, which commits to them if it offers to, again after 1 "
        "to 2 s, for 0.0166667 h",
        "results of a demonstration model are also sent",
        "shows its page on https://10.0.0.1:80/ with patient data, to users whom a proxy at 10.0.0.2/32 names; "
        "receives by STOW-RS there, as WEB or a user",
        "writes its log to /var/log/ctflow/node.jsonl",
    ):
        assert line in told
    assert "every other series runs if it is eligible" not in told


SEVERAL = """
seg: labelmap
overlap: 0.5
models:
  - name: lung
    report: none
  - name: body
    bundle: body
    viewer: pacs
rules:
  - run: [lung, body]
    modality: CT
    options:
      rtstruct: true
      overlap: 0.25
  - run: body
"""


def test_options_of_a_rule_win_over_those_of_its_model_and_these_over_the_nodes(tmp_path):
    settings = read(tmp_path, SEVERAL)
    (lung, body), (rule, other) = settings.models, settings.rules
    found = settings.run_of(lung, rule)
    assert (found.seg, found.overlap, found.report, found.rtstruct) == ("labelmap", 0.25, "none", True)
    found = settings.run_of(body, other)
    assert (found.seg, found.overlap, found.report, found.rtstruct) == ("binary", 0.5, "html", False)
    assert settings.models_of(rule) == (lung, body)
    assert settings.models_of(other) == (body,)
    assert settings.models_of(None) == (lung,)


def test_every_option_of_a_model_and_of_a_rule_is_told_with_where_it_comes_from(tmp_path):
    file = tmp_path / "node.yaml"
    file.write_text(SEVERAL, encoding="utf-8")
    found = given_settings(file, {**HOME, "CTFLOW_PDF": "1"}, {})
    told = values_and_origins(found.read(ServiceSettings), found)
    for line in (
        "models[2].name = body  (line 7)",
        "model lung: seg = labelmap  (line 2)",
        "model lung: report = none  (line 6)",
        "model lung: pdf = true  (CTFLOW_PDF)",
        "model lung: engine = auto  (default)",
        "model body: seg = binary  (line 9, viewer)",
        "rule 1, model lung: overlap = 0.25  (line 15)",
        "rule 1, model body: rtstruct = true  (line 14)",
        "rule 1, model body: seg = binary  (line 9, viewer)",
        "rule 1, model lung: report = none  (line 6)",
    ):
        assert line in told
    assert not any(line.startswith("rule 2") for line in told)


def test_what_is_seldom_meant_is_told(tmp_path):
    told = explain_settings(read(tmp_path, "bind: 0.0.0.0\nrules: [{decision: ignore, modality: MR}]"))
    assert "accepts series from this machine only: give peers, or nobody on the network can send" in told
    assert "every other series runs if it is eligible" in told
    assert "sends results nowhere" in told
    told = explain_settings(
        read(tmp_path, "web: {enabled: false}\ndestinations: [{name: a, ae_title: B, host: c, port: 1}]")
    )
    assert "has no page" in told
    assert "results of a demonstration model are not sent" in told


def test_every_value_is_told_with_where_it_comes_from(tmp_path):
    file = tmp_path / "node.yaml"
    file.write_text("seg: labelmap\nweb:\n  port: 80\npeers: [{host: 10.1.2.3}]\nport: 1", encoding="utf-8")
    found = given_settings(file, {**HOME, "CTFLOW_OVERLAP": "0.5", "CTFLOW_SEG": "binary"}, {"port": 2, "data": None})
    told = values_and_origins(found.read(ServiceSettings), found)
    for line in (
        "data = /home/node/.local/share/ctflow  (default)",
        "port = 2  (--port)",
        "seg = labelmap  (line 1)",
        "web.port = 80  (line 3)",
        "web.bind = 127.0.0.1  (default)",
        "peers[1].host = 10.1.2.3/32  (line 4)",
        "peers[1].ae_title = none  (default)",
        "overlap = 0.5  (CTFLOW_OVERLAP)",
        "limits.pdu = 128 KiB  (default)",
        "omit_empty_frames = true  (default)",
        "precision = the engine's own  (default)",
        "cache = /home/node/.cache/ctflow  (default)",
    ):
        assert line in told
    names = {line.split(" = ")[0] for line in told}
    assert names >= {row.name for row in documented(ServiceSettings) if not re.search(r"\[\]|tls\.", row.name)} - {
        "peers"
    }


def test_every_option_of_a_run_is_a_key_of_the_node_or_has_one_in_its_place(tmp_path):
    keys = {field.name for field in dataclasses.fields(ServiceSettings)}
    for option in OPTIONS:
        assert (option.name in keys) != (ServiceSettings.MEANT.get(option.name) in keys), option.name
    with raises_reason(SettingsInvalid, "unknown-key", names=("node.yaml, line 1: device", "devices")):
        read(tmp_path, "device: cpu")


def test_what_the_file_leaves_open_the_environment_says(tmp_path):
    run = read_settings(None, {**HOME, "CTFLOW_PRECISION": "fp32", "CTFLOW_CACHE": "/c"}).run
    assert (run.precision, run.cache, run.device) == ("fp32", Path("/c"), None)
    assert read(tmp_path, "devices: cpu\noverlap: 0.25").run == Settings(
        device="cpu", overlap=0.25, cache=Path("/home/node/.cache/ctflow")
    )
    with raises_reason(SettingsInvalid, "invalid-value", names="CTFLOW_SEG: "):
        read_settings(None, {**HOME, "CTFLOW_SEG": "bits"})
    with raises_reason(SettingsInvalid, "conflict", names=("--port", "8113")):
        given_settings(None, HOME, {"port": 8113}).read(ServiceSettings)


def test_every_key_has_its_line_of_documentation():
    keys = {each.name: each for each in documented(ServiceSettings)}
    assert {each.name for each in dataclasses.fields(ServiceSettings)} == {
        name.split(".")[0].removesuffix("[]") for name in keys
    }
    assert keys["limits.series"].default == "20 GB"
    assert keys["web.patient_data"].default == "false"
    assert keys["destinations[].backoff.first_s"].default == "5"
    assert all(each.meaning.endswith(".") for each in keys.values())
