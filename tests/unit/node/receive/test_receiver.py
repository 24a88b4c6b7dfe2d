"""What comes in is acknowledged when it is on the disk and in the journal; what may not come in is refused by name."""

from __future__ import annotations

import gc
import os
import socket
import sqlite3
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSNearLossless,
)

from ctflow.core.errors import NotWritten, SettingsInvalid
from ctflow.dicom.read.pixels.stored import READABLE
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.journal.writes import key_of
from ctflow.node.receive import headers, inbox, intake, pending, receiver
from ctflow.node.receive.pending import MOST_WAITING
from ctflow.node.receive.receiver import VERIFICATION, supported_contexts
from ctflow.node.settings.groups import MOST_ASSOCIATIONS
from service_support import (
    association,
    association_request,
    encoded,
    instance,
    store,
    store_command,
    storescu,
    wait_until,
)

COMPARABLE_PAIR = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
KEY = key_of("1.2.826.0.2", "1.2.826.0.3", 1)


def test_an_instance_is_in_a_synced_file_and_in_the_journal_when_it_is_acknowledged(scp, monkeypatch):
    node = scp()
    synced = []
    monkeypatch.setattr("ctflow.node.receive.inbox.os.fsync", synced.append)
    assert store(node.port, instance(1), instance(2)) == [0x0000, 0x0000]
    assert len(synced) >= 4  # each file and its folder
    found = node.journal.detail(KEY)
    assert found.series.state == "received"
    assert (found.series.calling_ae, found.series.peer, found.series.modality) == ("ROUTER", "127.0.0.1", "CT")
    assert sorted(node.inbox.folder / each.file for each in found.instances) == node.files
    dataset = pydicom.dcmread(node.inbox.folder / found.instances[0].file)
    assert dataset.SOPInstanceUID == "1.2.826.0.1.1"
    assert dataset.file_meta.MediaStorageSOPInstanceUID == "1.2.826.0.1.1"
    assert dataset.PatientName == "SECRET^NAME"
    assert found.series.patient is None


def test_patient_data_is_in_the_journal_only_where_it_is_switched_on(scp):
    secret, shown = scp(), scp(patient_data=True)
    for node in (secret, shown):
        store(node.port, instance(1))
    assert b"SECRET" not in (
        secret.journal.path.read_bytes() + (secret.journal.path.parent / "journal.sqlite3-wal").read_bytes()
    )
    assert shown.journal.find(KEY).patient.name == "SECRET^NAME"


def test_every_context_that_is_offered_is_accepted_and_no_other(scp):
    node = scp()
    for syntax in READABLE:
        with association(node.port, contexts={CT_IMAGE_STORAGE: [syntax]}) as found:
            assert [context.transfer_syntax[0] for context in found.accepted_contexts] == [syntax]
    others = {"1.2.840.10008.5.1.4.1.1.4": ["1.2.840.10008.1.2"], CT_IMAGE_STORAGE: ["1.2.840.10008.1.2.4.50"]}
    with association(node.port, contexts=others) as found:
        assert not found.accepted_contexts


def test_a_compressed_instance_is_kept_as_it_came(scp):
    node = scp()
    dataset = instance(1)
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(20)])
    dataset["PixelData"].is_undefined_length = True
    with association(node.port, contexts={CT_IMAGE_STORAGE: [JPEG2000Lossless]}) as found:
        assert found.send_c_store(dataset).Status == 0x0000
    (kept,) = node.journal.instances(KEY)
    assert kept.transfer_syntax == JPEG2000Lossless
    assert pydicom.dcmread(node.inbox.folder / kept.file).file_meta.TransferSyntaxUID == JPEG2000Lossless


def test_echo_is_answered(scp):
    with association(scp().port) as found:
        assert found.send_c_echo().Status == 0x0000


def test_the_same_instance_again_is_acknowledged_and_kept_once(scp):
    node = scp()
    assert store(node.port, instance(1), instance(1)) == [0, 0]
    with association(node.port, contexts={CT_IMAGE_STORAGE: [ImplicitVRLittleEndian]}) as found:
        again = instance(1)
        again.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        assert found.send_c_store(again).Status == 0
    assert len(node.files) == 1
    assert node.journal.find(KEY).duplicates == 2


def test_another_content_under_the_same_uid_is_refused(scp):
    node = scp()
    assert store(node.port, instance(1), instance(1, InstanceNumber=7)) == [0, intake.CONFLICT]
    assert len(node.files) == 1


def nested(number: int, **changes) -> Dataset:
    """An instance with sequences, a private element and a group length."""
    dataset = instance(number, **changes)
    inner = Dataset()
    inner.CodeValue, inner.CodeMeaning = "1", "meaning"
    middle = Dataset()
    middle.ConceptCodeSequence = [inner]
    dataset.ProcedureCodeSequence = [inner, middle]
    dataset.private_block(0x0011, "ctflow test", create=True).add_new(0x01, "DS", "1.5")
    return dataset


def send_as(node, syntax: str, dataset: Dataset) -> int:
    with association(node.port, contexts={CT_IMAGE_STORAGE: [syntax]}) as found:
        dataset.file_meta.TransferSyntaxUID = syntax
        return found.send_c_store(dataset).Status


@pytest.mark.parametrize(("first", "second"), [COMPARABLE_PAIR, COMPARABLE_PAIR[::-1]])
def test_the_same_content_in_the_other_little_endian_syntax_is_a_duplicate(scp, first, second):
    node = scp()
    assert [send_as(node, first, nested(1)), send_as(node, second, nested(1))] == [0, 0]
    assert (len(node.files), node.journal.find(KEY).duplicates) == (1, 1)


@pytest.mark.parametrize(
    "changes", [{"PixelData": b"\1" * 32}, {"InstanceNumber": 7}, {"KVP": "120"}, {"ProcedureCodeSequence": []}]
)
def test_another_content_in_another_syntax_is_refused_and_told(scp, changes):
    node = scp()
    other = nested(1)
    for keyword, value in changes.items():
        setattr(other, keyword, value)
    assert send_as(node, COMPARABLE_PAIR[0], nested(1)) == 0
    assert send_as(node, COMPARABLE_PAIR[1], other) == intake.CONFLICT
    assert len(node.files) == 1
    assert next(event.kind for event in node.journal.events()) == "conflict"


def test_what_cannot_be_compared_is_refused_and_told(scp):
    node = scp()
    assert send_as(node, COMPARABLE_PAIR[0], instance(1)) == 0
    assert send_as(node, str(JPEGLSNearLossless), instance(1, PixelData=bytes(30))) == intake.CONFLICT
    node.files[0].write_bytes(b"damaged meanwhile")
    assert send_as(node, COMPARABLE_PAIR[1], instance(1)) == intake.CONFLICT
    assert [event.kind for event in node.journal.events()][:2] == ["conflict", "conflict"]


def test_one_instance_in_two_syntaxes_at_once_is_kept_once(scp, monkeypatch):
    node = scp()
    assert send_as(node, COMPARABLE_PAIR[0], instance(1)) == 0
    holds, asked = node.journal.holds, []

    def late(*uids):
        asked.append(uids)
        return holds(*uids) if len(asked) > 1 else None

    monkeypatch.setattr(node.journal, "holds", late)
    assert send_as(node, COMPARABLE_PAIR[1], instance(1)) == 0
    assert (len(node.files), len(asked)) == (1, 2)


def test_one_instance_from_many_senders_at_once_is_kept_once(scp):
    node = scp()
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: store(node.port, instance(1)), range(6))) == [[0]] * 6
    assert len(node.files) == 1
    assert node.journal.find(KEY).duplicates == 5


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"SeriesInstanceUID": ""}, intake.CANNOT_UNDERSTAND),
        ({"StudyInstanceUID": "1" * 65}, intake.CANNOT_UNDERSTAND),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, intake.WRONG_CLASS),
        ({"SOPInstanceUID": "1.2.3"}, intake.WRONG_CLASS),
    ],
)
@pytest.mark.parametrize("patient_data", [False, True])
def test_what_cannot_be_kept_is_refused_with_its_status(scp, raw, changes, status, patient_data):
    node = scp(patient_data=patient_data)
    peer = raw(node.port)
    # The request says one thing, the data set another.
    answer = peer.ask(store_command(instance(1)), encoded(instance(1, **changes)))
    assert answer.Status == status
    assert answer.ErrorComment
    assert not node.files


@pytest.mark.parametrize("patient_data", [False, True])
def test_a_damaged_data_set_is_refused_and_the_next_instance_is_taken(scp, raw, patient_data):
    node = scp(patient_data=patient_data)
    peer = raw(node.port)
    whole = encoded(instance(1))
    for damaged in (whole[:50], whole[8:30] + whole, b"\x08\x00", b"\xff" * 40):
        answer = peer.ask(store_command(instance(1)), damaged)
        assert (answer.Status, answer.AffectedSOPInstanceUID) == (intake.CANNOT_UNDERSTAND, "1.2.826.0.1.1")
    assert peer.ask(store_command(instance(1)), whole).Status == 0
    assert len(node.files) == 1


def test_a_header_that_pydicom_cannot_read_is_refused(scp, monkeypatch):
    node = scp()
    monkeypatch.setattr(headers, "read_header", lambda *_, **__: (_ for _ in ()).throw(ValueError("secret")))
    assert store(node.port, instance(1)) == [intake.CANNOT_UNDERSTAND]
    monkeypatch.undo()
    assert store(node.port, instance(1)) == [0]


def test_a_class_of_another_context_is_refused(scp, raw):
    node = scp()
    magnetic = instance(1, SOPClassUID="1.2.840.10008.5.1.4.1.1.4")
    answer = raw(node.port).ask(store_command(magnetic), encoded(magnetic))
    assert answer.Status == intake.WRONG_CLASS
    assert not node.files


def test_deflated_instances_are_taken(scp):
    node = scp()
    dataset = instance(1)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    with association(node.port, contexts={CT_IMAGE_STORAGE: [DeflatedExplicitVRLittleEndian]}) as found:
        assert found.send_c_store(dataset).Status == 0
    assert pydicom.dcmread(*node.files).SOPInstanceUID == dataset.SOPInstanceUID


def test_a_mistake_of_ctflow_is_out_of_resources_and_in_the_log(scp, monkeypatch, caplog):
    node = scp()
    monkeypatch.setattr(intake, "header_of_object", lambda *_: (_ for _ in ()).throw(RuntimeError("SECRET^NAME")))
    with association(node.port) as found, caplog.at_level("ERROR"):
        answer = found.send_c_store(instance(1))
        assert (answer.Status, answer.ErrorComment) == (
            intake.OUT_OF_RESOURCES, "unexpected RuntimeError; the log says where",
        )  # fmt: skip
        monkeypatch.undo()
        assert found.send_c_store(instance(1)).Status == 0
    assert "an instance could not be checked" in [record.message for record in caplog.records]


def test_what_fails_unexpectedly_is_out_of_resources_and_the_series_is_not_run_without_it(scp, monkeypatch):
    node = scp()
    monkeypatch.setattr(
        node.journal, "holds", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("unable to open"))
    )
    assert store(node.port, instance(1)) == [intake.OUT_OF_RESOURCES]
    monkeypatch.undo()
    assert node.journal.find(KEY).refused == 1
    assert not node.files


HOSTILE = (
    "../../../../tmp/evil", "..", "/etc/passwd", "a/b", "1.2.3\0", "1.2.3;rm -rf", "%2e%2e%2f", "COM1", "~root",
    "1.2.3'--", "." * 64, "x" * 64, "1.2.3 4",
)  # fmt: skip


def test_no_uid_chooses_where_a_file_lies(scp, tmp_path):
    node = scp()
    before = {path for path in tmp_path.rglob("*") if path.is_file() and "journal" not in path.name}
    for number, hostile in enumerate(HOSTILE):
        for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            with pydicom.config.disable_value_validation():
                store(node.port, instance(number, **{keyword: hostile}))
    after = {path for path in tmp_path.rglob("*") if path.is_file() and "journal" not in path.name}
    kept = after - before
    assert kept
    for path in kept:
        parts = path.relative_to(node.inbox.folder).parts
        assert len(parts) == 3
        assert all(set(part.removesuffix(".dcm")) <= set("0123456789abcdef-") for part in parts)
    assert {path.relative_to(node.inbox.folder).as_posix() for path in kept} == node.journal.files()


def test_below_the_watermark_instances_are_refused_and_taken_again_above_it(scp, monkeypatch):
    node = scp(least_free=10**6)
    free = [10**9]
    usage = lambda _folder: type("Usage", (), {"free": free[0]})  # noqa: E731
    monkeypatch.setattr("ctflow.node.receive.inbox.shutil.disk_usage", usage)
    assert store(node.port, instance(1)) == [0]
    free[0] = 10**5
    node.inbox._looked_at = 0
    assert store(node.port, instance(2)) == [intake.OUT_OF_RESOURCES]
    assert node.journal.find(KEY).refused == 1
    assert node.journal.complete_quiet(0) == ()
    free[0] = 10**9
    assert store(node.port, instance(2)) == [0]
    assert node.journal.complete_quiet(0) == (KEY,)


def test_a_disk_that_fails_is_out_of_resources_and_leaves_nothing(scp, monkeypatch):
    node = scp()

    def fail(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctflow.node.receive.inbox.os.fsync", fail)
    assert store(node.port, instance(1)) == [intake.OUT_OF_RESOURCES]
    monkeypatch.undo()
    assert not node.files
    monkeypatch.setattr(
        node.journal, "receive", lambda *_, **__: (_ for _ in ()).throw(NotWritten("no", reason="unwritable"))
    )
    assert store(node.port, instance(1)) == [intake.OUT_OF_RESOURCES]
    assert not node.files


def test_a_series_that_is_too_large_is_refused(scp):
    node = scp(most_instances=2)
    assert store(node.port, instance(1), instance(2), instance(3)) == [0, 0, intake.TOO_MUCH]
    assert node.journal.find(KEY).state == "aside"
    assert len(node.files) == 2


def test_who_is_no_peer_is_rejected(scp):
    node = scp(is_peer=lambda title, host: (title, host) == ("ROUTER", "127.0.0.1"))
    with association(node.port) as found:
        assert found.is_established
    with association(node.port, calling="STRANGER") as found:
        assert found.is_rejected
        assert found.acceptor.primitive.diagnostic == 0x03
    with association(node.port, called="OTHER") as found:
        assert found.is_rejected
        assert found.acceptor.primitive.diagnostic == 0x07
    other = scp(may_come=lambda host: host != "127.0.0.1")
    with association(other.port) as found:
        assert not found.is_established


@pytest.mark.parametrize("what", ["is_peer", "certificate_refusal"])
def test_a_peer_that_cannot_be_checked_is_rejected(scp, what):
    """pynetdicom only logs what such a check raises, and goes on to accept."""

    def broken(*_):
        raise RuntimeError("a mistake")

    with association(scp(**{what: broken}).port) as found:
        assert found.is_rejected
        assert found.acceptor.primitive.diagnostic == 0x03


def test_more_associations_than_allowed_are_rejected_for_now(scp):
    node = scp(associations=2)
    with association(node.port), association(node.port) as second, association(node.port) as third:
        assert second.is_established
        assert third.is_rejected
        assert third.acceptor.primitive.result_str == "Rejected Transient"
    wait_until(lambda: node.receiver.associations == 0, "the associations end")
    with association(node.port) as found:
        assert found.is_established


def send_raw(port: int, data: bytes) -> bytes:
    """Send bytes to a node; what it answers until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        answer = b""
        try:
            while piece := connection.recv(4096):
                answer += piece
        except ConnectionResetError:
            pass
        return answer


@pytest.mark.parametrize(
    "head",
    [
        struct.pack(">BBL", 1, 0, 300 * 2**20),  # an A-ASSOCIATE-RQ of 300 MB
        struct.pack(">BBL", 4, 0, 10),  # data before an association
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_what_is_no_lawful_request_is_refused_by_its_first_six_bytes(scp, head):
    node = scp()
    assert send_raw(node.port, head)[:1] in (b"\x07", b"")
    assert node.receiver.associations == 0


def test_a_pdu_that_is_too_long_ends_the_association_before_it_is_read(scp):
    node = scp()
    with association(node.port) as found:
        found.dul.socket.socket.sendall(struct.pack(">BBL", 4, 0, 300 * 2**20) + bytes(100))
        wait_until(lambda: found.is_aborted, "the association is aborted")
    wait_until(lambda: node.receiver.associations == 0, "the association ends")


def test_silence_ends_an_association_and_a_connection(scp):
    node = scp(idle_s=0.3)
    with association(node.port) as found:
        assert found.is_established
        wait_until(lambda: not found.is_established, "the node ends it")
    assert send_raw(node.port, b"\x01") == b""


def test_a_pdu_that_never_ends_ends_the_association(scp):
    node = scp(idle_s=0.5)
    with association(node.port, network_timeout=None) as found:
        found.dul.socket.socket.sendall(struct.pack(">BBL", 4, 0, 1000) + bytes(10))
        wait_until(lambda: node.receiver.associations == 0, "the association ends")


def test_idle_connections_keep_nobody_from_being_answered(scp):
    node = scp()
    idle = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(100)]
    try:
        for each in idle[::2]:
            each.send(b"\x01\x00")  # half of them begin a request
        with association(node.port, acse_timeout=10) as found:
            assert found.is_established
            assert found.send_c_echo().Status == 0
        assert node.receiver.associations <= 1
    finally:
        for each in idle:
            each.close()


def test_a_port_that_is_taken_is_named(scp):
    taken = scp().port
    with pytest.raises(SettingsInvalid, match=f"cannot listen on 127.0.0.1:{taken} ") as caught:
        scp(address=("127.0.0.1", taken))
    assert caught.value.reason == "cannot-listen"


def test_dcmtk_sends_a_series(scp, series):
    node = scp()
    storescu(node.port, series)
    (found,) = node.journal.series()
    assert found.instances == len(list(series.iterdir()))


def test_the_journal_and_the_offered_contexts_agree_with_the_module(scp):
    assert set(supported_contexts()) == {
        VERIFICATION, receiver.COMMITMENT, *receiver.STORED_CLASSES, *intake.LEFT_OUT,
    }  # fmt: skip
    node = scp()
    assert sqlite3.connect(node.journal.path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_connection_that_cannot_be_taken_is_the_end_of_no_other(scp, monkeypatch):
    node = scp()
    finish, asked = node.receiver._server.finish_request, []

    def fail(*given) -> None:
        asked.append(given)
        if len(asked) == 1:
            raise RuntimeError("can't start new thread")
        finish(*given)

    monkeypatch.setattr(node.receiver._server, "finish_request", fail)
    with association(node.port) as found:
        assert not found.is_established
    with association(node.port) as found:
        assert found.send_c_echo().Status == 0
    assert all(thread.is_alive() for thread in node.receiver.threads)
    assert asked[0][0].fileno() == -1  # it is closed


def test_descriptors_stay_below_what_select_knows():
    others = 150  # the page's 100 connections, the journal, workers, delivery_threads, the log
    assert 2 * MOST_ASSOCIATIONS + MOST_WAITING + others < 1024


def test_no_more_wait_than_there_is_room_for(scp, monkeypatch):
    monkeypatch.setattr(pending, "MOST_WAITING", 3)
    node = scp()
    idle = [socket.create_connection(("127.0.0.1", node.port), timeout=30) for _ in range(4)]
    try:
        assert idle[0].recv(1) == b""  # the one that waited the longest
        with association(node.port) as found:
            assert found.send_c_echo().Status == 0
    finally:
        for each in idle:
            each.close()


def request(calling: bytes, called: bytes = b"CTFLOW") -> bytes:
    """An A-ASSOCIATE-RQ with these AE titles, which spaces fill up."""
    pdu = bytearray(association_request())
    pdu[10:26], pdu[26:42] = called.ljust(16), calling.ljust(16)
    return bytes(pdu)


def answer_to(port: int, pdu: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(pdu)
        return connection.recv(10)


@pytest.mark.parametrize(
    "calling", [b"  ROUTER", b"ROUTER" + bytes(10), b"\0ROUTER \0"], ids=["leading spaces", "NULs", "both"]
)
def test_a_title_is_known_whatever_pads_it(scp, calling):
    titles = []
    node = scp(is_peer=lambda title, _host: titles.append(title) or True)
    assert answer_to(node.port, request(calling, b"CTFLOW" + bytes(10)))[0] == 2  # A-ASSOCIATE-AC
    assert titles == ["ROUTER"]


@pytest.mark.parametrize(
    ("calling", "called", "reason", "why"),
    [
        (b"", b"CTFLOW", 3, "its calling AE title is blank"),
        (bytes(16), b"CTFLOW", 3, "its calling AE title is blank"),
        (b"ROU\xc4TER", b"CTFLOW", 3, "its calling AE title has characters that an AE title may not have"),
        (b"ROU\\TER", b"CTFLOW", 3, "its calling AE title has characters that an AE title may not have"),
        (b"ROU\nTER", b"CTFLOW", 3, "its calling AE title has characters that an AE title may not have"),
        (b"ROUTER", b"", 7, "its called AE title is blank"),
        (b"ROUTER", bytes(16), 7, "its called AE title is blank"),
    ],
)
def test_what_is_no_title_is_rejected_with_its_reason_and_told(scp, caplog, calling, called, reason, why):
    node = scp()
    assert answer_to(node.port, request(calling, called)) == bytes([3, 0, 0, 0, 0, 4, 0, 1, 1, reason])
    (record,) = (record for record in caplog.records if "rejected" in record.message)
    assert record.message == f"association rejected: {why}"
    assert record.facts == {"peer": "127.0.0.1"}
    assert store(node.port, instance(1)) == [0], "the next one is served"


def test_an_instance_waits_until_the_folder_that_another_association_makes_is_synced(scp, monkeypatch):
    """The second one finds the folder there, and its name may not be on the disk yet."""
    node = scp()
    reached, go_on, done = threading.Event(), threading.Event(), []
    sync = inbox.sync_folder

    def slow(folder):
        if folder.parent == node.inbox.folder:  # the name of the series' folder is synced here
            reached.set()
            assert go_on.wait(60)
        sync(folder)

    monkeypatch.setattr(inbox, "sync_folder", slow)

    def write(number: int) -> None:
        done.append(node.inbox.write("ab" + "0" * 30, f"1.2.{number}", [b"content"]))

    threads = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    threads[0].start()
    assert reached.wait(60)
    assert (node.inbox.folder / "ab" / ("ab" + "0" * 30)).is_dir()
    threads[1].start()
    threads[1].join(0.3)
    assert done == []
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(done) == 2


def test_a_folder_that_an_earlier_process_made_is_synced_again(scp, monkeypatch):
    node, synced, sync = scp(), [], inbox.sync_folder
    series = node.inbox.folder / "ab" / "abc"
    series.mkdir(parents=True)
    monkeypatch.setattr(inbox, "sync_folder", lambda folder: (synced.append(folder), sync(folder)))
    monkeypatch.setattr(inbox, "_MOST_KNOWN", 1)
    for name, again in (("abc", True), ("abc", False), ("abd", True), ("abc", True)):  # the last was forgotten
        synced.clear()
        node.inbox.write(name, "1.2.3", [b"content"])
        parents = [series.parent, node.inbox.folder] if again else []
        assert synced == [*parents, series.with_name(name)]


def _even_context(good: bytes) -> bytes:
    """A request whose presentation context has an even number, which cannot be (PS3.8 9.3.2.2)."""
    place = good.index(b"\x20\x00", 74) + 4  # after the fixed fields
    assert good[place] == 1
    return good[:place] + b"\x02" + good[place + 1 :]


@pytest.mark.parametrize(
    "sent", [request(b"ROUTER") + b"\x04\x00\x00\x00\x00\x01\x00", _even_context(request(b"ROUTER"))]
)
def test_a_request_with_or_before_nonsense_leaves_no_thread_and_no_descriptor(scp, sent):
    """pynetdicom's reading thread raised (`Evt7` in `Sta13`), and descriptors waited for a collection of garbage."""
    node = scp()
    raised = []
    before, hook = len(os.listdir("/proc/self/fd")), threading.excepthook
    threading.excepthook = raised.append
    gc.disable()
    try:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", node.port)) as connection:
                connection.sendall(sent)
        wait_until(lambda: node.receiver.associations == 0, "the associations end")
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 4, "descriptors are closed")
    finally:
        gc.enable()
        threading.excepthook = hook
    assert raised == []


def test_a_request_that_says_what_cannot_be_ends_its_association_at_once(scp):
    """Its other thread waited for the request until pynetdicom's timeout of 30 s, and held an association."""
    node = scp()
    with socket.create_connection(("127.0.0.1", node.port), timeout=60) as connection:
        connection.sendall(_even_context(request(b"ROUTER")))
        with suppress(ConnectionError):
            assert connection.recv(4096) == b""
        wait_until(lambda: node.receiver.associations == 0, "the association ends", 15)
