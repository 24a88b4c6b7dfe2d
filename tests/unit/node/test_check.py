"""`ctflow serve --check` opens what the settings name."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import re
import sqlite3
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from pynetdicom import AE

from bundle_support import small_unet_bundle
from certificate_support import Authority
from ctflow.cli.main import main
from ctflow.core.errors import (
    BackendUnavailable,
    BundleInvalid,
    DestinationDown,
    NotWritten,
    SettingsInvalid,
    StorageFull,
)
from ctflow.core.processes import Line
from ctflow.node.check import _data_folder, answers, opened
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.schema import VERSION
from ctflow.node.node import Node
from ctflow.node.receive.receiver import VERIFICATION
from ctflow.node.settings.groups import Destination, Limits
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.tls import ClientTls, ServerTls
from ctflow.node.settings.web import Web
from ctflow.node.tls import TlsContext
from ctflow.node.work.messages import NotReady, Ready
from ctflow.settings.run import Settings
from reasons import raises_reason
from service_support import free_port, worker_that_answers

RUN = Settings(engine="eager", cache=None, device="cpu")


@pytest.fixture
def settings(tmp_path) -> ServiceSettings:
    return ServiceSettings(data=tmp_path / "data", devices=("cpu",), limits=Limits(free_disk=0), web=Web(enabled=False))


def worker_without_a_bundle(connection, _setup) -> None:
    connection.send(NotReady(BundleInvalid("no such folder", reason="no-bundle")))


def worker_that_dies(connection, _setup) -> None:
    connection.close()


def end_at_once() -> None:
    """A process of a case that has nothing to do."""


def worker_with_a_process(connection, setup) -> None:
    process = multiprocessing.get_context("spawn").Process(target=end_at_once)
    process.start()
    process.join()
    worker_that_answers(connection, setup)


def first_word_without_a_configuration(setup) -> tuple[Ready, list[str]]:
    """What a worker says of a bundle that lacks the configuration `absent.json`."""
    if setup.settings.config == "absent.json":
        raise BundleInvalid("configs/absent.json is missing", reason="missing-file")
    return Ready("model", "1", False, 0), []


def worker_of_two_gpus(connection, setup) -> None:
    connection.send(Line(logging.WARNING, "engine", f"opens {setup.settings.device}"))
    connection.send(Ready("model", "1", False, 2))
    with contextlib.suppress(EOFError):
        connection.recv()


def test_bundle_engine_device_and_folders_are_opened_and_nothing_is_left(settings, tmp_path):
    bundle = small_unet_bundle(tmp_path / "small")
    (tmp_path / "copies").mkdir()
    lines = list(opened(replace(settings, bundle=bundle, copy_to=tmp_path / "copies"), RUN))
    assert lines[:2] == ["can create the data folder", "can write to the folder for copies"]
    assert lines[2].startswith("opened ")
    assert lines[2].endswith(" on cpu")
    assert not settings.data.exists()
    assert not list((tmp_path / "copies").iterdir())


def test_a_worker_may_start_processes_of_its_own(settings, monkeypatch):
    monkeypatch.setattr("ctflow.node.check.run_worker", worker_with_a_process)
    assert "opened model 1 on cpu" in list(opened(settings, RUN))
    assert not multiprocessing.active_children()


def test_every_gpu_is_opened_where_none_is_named_and_warnings_are_said(settings, monkeypatch):
    monkeypatch.setattr("ctflow.node.check.run_worker", worker_of_two_gpus)
    _, *lines = opened(replace(settings, devices=()), replace(RUN, device=None))
    assert lines == [
        "opened model 1 on cuda:0",
        "warning: opens None",
        "opened model 1 on cuda:1",
        "warning: opens cuda:1",
    ]


@pytest.mark.parametrize(
    ("worker", "error", "reason"),
    [(worker_without_a_bundle, BundleInvalid, "no-bundle"), (worker_that_dies, BackendUnavailable, "worker-ended")],
)
def test_what_cannot_be_opened_is_the_error_that_the_node_would_end_with(settings, monkeypatch, worker, error, reason):
    monkeypatch.setattr("ctflow.node.check.run_worker", worker)
    with raises_reason(error, reason):
        list(opened(settings, RUN))


def test_folders_that_cannot_be_used_are_named_errors(settings, tmp_path):
    with raises_reason(NotWritten, "copies-folder", names="copy_to"):
        list(opened(replace(settings, copy_to=tmp_path / "absent"), RUN))
    (tmp_path / "file").write_text("")
    for data in (tmp_path / "file" / "data", tmp_path / ("x" * 300)):
        with raises_reason(NotWritten, "unwritable", names="the data folder"):
            list(opened(replace(settings, data=data), RUN))
    with raises_reason(StorageFull, "disk-full", names="limits.free_disk"):
        list(opened(replace(settings, limits=Limits(free_disk=10**18)), RUN))


def folder_of_a_node(settings) -> None:
    """What a node that ran and ended leaves."""
    Journal(settings.data / "journal.sqlite3").close()
    for name in ("inbox/ab", "results", "running"):
        (settings.data / name).mkdir(parents=True)
    for name in ("lock", "removal-lock"):
        (settings.data / name).touch()


@pytest.fixture
def shared(settings):
    """Settings of a data folder of a node that anybody may enter, as nobody may the test's own folders."""
    with tempfile.TemporaryDirectory() as folder:
        found = replace(settings, data=Path(folder))
        folder_of_a_node(found)
        for path in (found.data, *found.data.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o666)
        yield found


@contextlib.contextmanager
def another_user():
    """Root may do anything, so it asks as nobody."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_what_another_user_made_in_the_data_folder_is_named(shared):
    with another_user():
        assert _data_folder(shared) == "can write to the data folder"
    folders, files = ("inbox", "inbox/ab", "results", "running"), ("journal.sqlite3", "lock", "removal-lock")
    for name, mode, usual in [(each, 0o555, 0o777) for each in folders] + [(each, 0o444, 0o666) for each in files]:
        (shared.data / name).chmod(mode)
        with another_user(), raises_reason(NotWritten, "unwritable") as caught:
            _data_folder(shared)
        (shared.data / name).chmod(usual)
        assert str(caught.value) == (
            f"{name} in the data folder cannot be written (Permission denied): "
            "the user of the node must be able to write there"
        )


def test_a_node_whose_lock_is_another_users_says_so(shared):
    (shared.data / "lock").chmod(0o444)
    with another_user(), raises_reason(NotWritten, "unwritable", names="the data folder"):
        Node(shared, RUN)


def test_a_journal_is_looked_at_and_nothing_is_made_beside_it(settings):
    settings.data.mkdir()
    folder_of_a_node(settings)
    before = sorted(settings.data.rglob("*"))
    assert _data_folder(settings) == "can write to the data folder"
    assert sorted(settings.data.rglob("*")) == before
    journal = Journal(settings.data / "journal.sqlite3")  # a node runs
    try:
        journal.event("note", "before")
        assert _data_folder(settings) == "can write to the data folder"
        journal.event("note", "after")
        assert [event.text for event in journal.events()] == ["after", "before"]
    finally:
        journal.close()


@pytest.mark.parametrize("is_database", [True, False])
def test_a_journal_that_the_node_could_not_use_is_the_error_that_it_would_end_with(settings, is_database):
    settings.data.mkdir()
    path = settings.data / "journal.sqlite3"
    if is_database:
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    else:
        path.write_text("no database " * 100)
    with raises_reason(SettingsInvalid, "journal") as node:
        Journal(path)
    with raises_reason(SettingsInvalid, "journal") as check:
        _data_folder(settings)
    assert str(check.value) == str(node.value)
    assert (str(VERSION + 1) if is_database else "not a database") in str(check.value)


def test_a_folder_that_leads_nowhere_is_named(settings):
    settings.data.mkdir()
    (settings.data / "inbox").symlink_to("not-mounted")
    with raises_reason(NotWritten, "unwritable", names="inbox in the data folder"):
        _data_folder(settings)


def test_the_command_says_what_it_opened_and_ends_with_the_errors_code(tmp_path, monkeypatch, capsys):
    config = tmp_path / "node.yaml"
    config.write_text(f"data: {tmp_path / 'data'}\ndevices: [cpu]\nlimits: {{free_disk: 1 MB}}\n")
    monkeypatch.setattr("ctflow.node.check.run_worker", worker_that_answers)
    assert main(["serve", "-c", str(config), "--check"]) == 0
    assert "opened model 1 on cpu" in capsys.readouterr().out
    monkeypatch.setattr("ctflow.node.check.run_worker", worker_without_a_bundle)
    assert main(["serve", "-c", str(config), "--check"]) == 3
    said = capsys.readouterr()
    assert "listens as CTFLOW" in said.out
    assert "no such folder" in said.err


@pytest.mark.parametrize("more", [[], ["--check"]])
def test_the_pages_port_typed_for_the_node_is_refused_with_its_text(tmp_path, capsys, more):
    assert main(["serve", "--data", str(tmp_path), "--port", "8113", *more]) == 64
    assert "port and web.port are both 8113" in capsys.readouterr().err


def test_an_empty_data_folder_is_not_the_folder_that_one_is_in(capsys):
    assert main(["serve", "--data", "", "--check"]) == 64
    assert "[invalid-value]: --data: must be one line" in capsys.readouterr().err


def test_certificates_are_opened_and_their_end_is_told(settings, tmp_path):
    authority = Authority(tmp_path / "certificates")
    pair = authority.issue("server", days=40.5)
    checked = replace(settings, tls=ServerTls(pair.certificate, pair.key, client="none"))
    lines = opened(checked, RUN)
    assert next(lines) == "can create the data folder"
    assert re.fullmatch(r"tls: the certificate expires on \d{4}-\d\d-\d\d, in 40 days", next(lines))
    pair.key.write_text("")
    with raises_reason(SettingsInvalid, "certificate", names="tls.key: server.key"):
        list(opened(checked, RUN))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of pynetdicom, where nobody answers
def test_destinations_are_asked_and_the_first_that_does_not_answer_is_the_error(settings, tmp_path):
    authority = Authority(tmp_path / "certificates")
    pair = authority.issue("server")
    secured = TlsContext("tls", ServerTls(pair.certificate, pair.key, client="none"))
    ae = AE("PACS")
    ae.add_supported_context(VERIFICATION)
    plain = ae.start_server(("127.0.0.1", 0), block=False)
    behind_tls = ae.start_server(("127.0.0.1", 0), block=False, ssl_context=secured.context)
    others = AE("PACS")
    others.add_supported_context("1.2.840.10008.5.1.4.1.1.66.4")
    without_echo = others.start_server(("127.0.0.1", 0), block=False)
    try:
        ports = [server.server_address[1] for server in (plain, behind_tls, without_echo)]
        tls = (None, ClientTls(ca=authority.ca), None)
        destinations = [
            Destination(name, "PACS", "127.0.0.1", port, tls=each)
            for name, port, each in zip(("plain", "tls", "mute"), ports, tls, strict=True)
        ]
        lines = list(answers(replace(settings, destinations=tuple(destinations[:2]))))
        assert lines == ["plain: answers C-ECHO", "tls: answers C-ECHO, with TLSv1.3"]
        with free_port() as port:
            down = Destination("down", "PACS", "127.0.0.1", port)
        told = []
        with raises_reason(DestinationDown, "no-connection", names="PACS does not answer"):
            told.extend(answers(replace(settings, destinations=(down, *destinations))))
        found = answers(replace(settings, destinations=(destinations[2], destinations[0])))
        assert [next(found), next(found)] == ["mute: PACS accepts nothing that was proposed", "plain: answers C-ECHO"]
    finally:
        for server in (plain, behind_tls, without_echo):
            server.shutdown()


def test_the_network_is_asked_only_with_a_check(capsys):
    assert main(["serve", "--network"]) == 64
    assert "--check" in capsys.readouterr().err


def test_every_model_is_opened_also_with_options_of_a_rule_and_a_wrong_one_is_named_with_its_line(
    tmp_path, capsys, monkeypatch
):
    small_unet_bundle(tmp_path / "small")
    config = tmp_path / "node.yaml"
    content = (
        f"data: {tmp_path / 'data'}\ndevices: [cpu]\nlimits: {{free_disk: 1 MB}}\nengine: eager\ncache: ''\n"
        "models:\n- {name: lung, bundle: small}\n- {name: body, bundle: small, overlap: 0.5}\n"
        "rules:\n- run: body\n  options: {config: CONFIG}\n"
    )
    config.write_text(content.replace("CONFIG", "inference.json"))
    assert main(["serve", "-c", str(config), "--check"]) == 0
    said = capsys.readouterr().out
    assert re.findall("opened (.*?): .* on cpu", said) == ["lung", "body", "body, rule 1"]
    monkeypatch.setattr("ctflow.node.check._first_word", first_word_without_a_configuration)
    config.write_text(content.replace("CONFIG", "absent.json"))
    assert main(["serve", "-c", str(config), "--check"]) == 3
    assert "node.yaml, line 11: rules[1].options: " in capsys.readouterr().err
