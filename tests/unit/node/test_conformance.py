"""The DICOM Conformance Statement says what the node offers, proposes and answers: no more, no less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydicom.uid import UID
from pynetdicom import AE, evt

from ctflow.dicom.write.ct_series import IMPLEMENTATION_UID
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.receive import commitment, intake
from ctflow.node.receive.headers import IMPLEMENTATION_VERSION
from ctflow.node.receive.receiver import UNCOMPRESSED
from ctflow.node.settings.groups import Limits
from ctflow.node.settings.service import ServiceSettings
from service_support import association

STATEMENT = (Path(__file__).parents[3] / "docs" / "conformance.md").read_text(encoding="utf-8")


def table(name: str) -> list[list[str]]:
    """The rows of the table after a mark, without its head."""
    lines = STATEMENT.split(f"<!-- {name} -->\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.fixture
def stated() -> dict[str, set[str]]:
    """Abstract syntax -> the transfer syntaxes that the statement names."""
    kinds: dict[str, set[str]] = {}
    for _, uid, kind in table("syntaxes"):
        kinds.setdefault(kind, set()).add(uid)
    return {uid: set().union(*(kinds[kind] for kind in words.split(", "))) for _, uid, words in table("accepted")}


def test_the_node_accepts_what_is_stated_and_nothing_else(scp, stated):
    node = scp()
    every = sorted({syntax for syntaxes in stated.values() for syntax in syntaxes})
    others = ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.100"]
    for abstract in [*stated, "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.2.2.1"]:
        accepted = set()
        for syntax in [*every, *others]:
            with association(node.port, contexts={abstract: [syntax]}) as found:
                accepted |= {context.transfer_syntax[0] for context in found.accepted_contexts}
        assert accepted == stated.get(abstract, set()), abstract


def test_names_are_those_of_the_standard():
    for name, uid, *_ in [*table("accepted"), *table("proposed"), *table("syntaxes")]:
        known = UID(uid).name.replace(" SOP Class", "")
        assert name == known or known == uid, name


def test_the_node_says_who_it_is_as_stated(scp):
    with association(scp().port) as found:
        assert found.acceptor.implementation_class_uid == IMPLEMENTATION_UID
        assert found.acceptor.implementation_version_name == IMPLEMENTATION_VERSION
    assert f"| Implementation Class UID | {IMPLEMENTATION_UID} |" in STATEMENT
    assert f"| Implementation Version Name | {IMPLEMENTATION_VERSION} |" in STATEMENT


def test_the_node_proposes_what_is_stated():
    proposed = []
    ae = AE("PACS")
    for _, uid in table("proposed"):
        ae.add_supported_context(uid)

    def requested(event) -> None:
        proposed.extend(event.assoc.requestor.primitive.presentation_context_definition_list)

    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_REQUESTED, requested)])
    try:
        with StorageTarget("CTFLOW", "PACS", "127.0.0.1", server.server_address[1]).open():
            pass
    finally:
        server.shutdown()
    assert {str(context.abstract_syntax) for context in proposed} == {uid for _, uid in table("proposed")}
    assert {tuple(context.transfer_syntax) for context in proposed} == {UNCOMPRESSED[:2]}


def test_every_status_that_the_node_answers_is_stated():
    source = Path(intake.__file__).read_text(encoding="utf-8")
    answered = {int(code, 16) for code in re.findall(r"^[A-Z_]+ = 0x([0-9A-F]{4})", source, re.MULTILINE)}
    assert {int(code, 16) for code, _, _ in table("statuses")} == answered


def test_every_status_of_storage_commitment_is_stated():
    source = Path(commitment.__file__).read_text(encoding="utf-8")
    answered = {int(code, 16) for code in re.findall(r"^[A-Z_]+ = 0x([0-9A-F]{4})", source, re.MULTILINE)}
    assert {int(code, 16) for code, _, _ in table("commitment")} == answered


def test_the_defaults_that_are_named_are_the_defaults(tmp_path):
    settings, limits = ServiceSettings(data=tmp_path), Limits()
    assert f"{settings.bind}:{settings.port}" in STATEMENT
    assert f"`limits.associations` at the same time, {limits.associations} by default" in STATEMENT
    assert f"`limits.pdu`, {limits.pdu // 1024} KiB by default" in STATEMENT
    assert f"`limits.idle_s`, {limits.idle_s:g} s by default" in STATEMENT
    assert f"{settings.ae_title} by default" in STATEMENT
