"""C-STORE requests take the short way, are answered as pynetdicom answers them, and all else goes pynetdicom's own."""

from __future__ import annotations

import pytest
from pydicom.uid import UID
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dimse_primitives import C_STORE

from ctflow.node.receive import shortcut, transport
from ctflow.node.receive.intake import CANNOT_UNDERSTAND, WRONG_CLASS
from ctflow.node.receive.shortcut import _Command, _response
from service_support import RawPeer, association, encoded, fragment, instance, store, store_command, wait_until

CT, ECHO = RawPeer.CT, RawPeer.ECHO
COMMAND, LAST = 1, 2


def test_a_request_may_come_in_any_fragments_and_any_pdus(scp, raw):
    node = scp()
    peer = raw(node.port)
    command, data = store_command(instance(1)), encoded(instance(1))
    peer.send(fragment(CT, COMMAND, command[:10]))
    peer.send(fragment(CT, COMMAND | LAST, command[10:]), fragment(CT, 0, data[:3]), fragment(CT, 0, data[3:50]))
    for position in range(50, len(data), 7):
        peer.send(fragment(CT, 0, data[position : position + 7]))
    peer.send(fragment(CT, LAST, b""))
    answer = peer.read_response()
    assert (answer.Status, answer.MessageIDBeingRespondedTo, answer.CommandField) == (0, 7, 0x8001)
    assert (answer.AffectedSOPClassUID, answer.AffectedSOPInstanceUID) == (instance(1).SOPClassUID, "1.2.826.0.1.1")
    assert node.files[0].read_bytes().endswith(data)


def test_requests_that_do_not_wait_for_answers_are_answered_in_order(scp, raw):
    node = scp()
    peer = raw(node.port)
    for number in range(5):
        dataset = instance(number)
        peer.send(
            fragment(CT, COMMAND | LAST, store_command(dataset, MessageID=number)), fragment(CT, LAST, encoded(dataset))
        )
    assert [peer.read_response().MessageIDBeingRespondedTo for _ in range(5)] == list(range(5))
    assert len(node.files) == 5


def test_echo_and_store_share_an_association(scp):
    node = scp()
    with association(node.port) as found:
        for number in range(3):
            assert found.send_c_echo().Status == 0
            assert found.send_c_store(instance(number)).Status == 0
    assert len(node.files) == 3


def test_a_peer_that_takes_only_small_pdus_gets_its_answer_in_pieces(scp, raw):
    node = scp()
    peer = raw(node.port, most_pdu=32)
    answer = peer.ask(store_command(instance(1)), encoded(instance(1)))
    assert (answer.Status, answer.AffectedSOPInstanceUID) == (0, "1.2.826.0.1.1")


def test_an_answer_is_byte_for_byte_what_pynetdicom_would_say():
    request = _Command(1, 7, b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.826.0.1.1\0")
    primitive = C_STORE()
    primitive.MessageIDBeingRespondedTo, primitive.Status, primitive.ErrorComment = 7, 0xC001, "another content"
    primitive.AffectedSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.2")
    primitive.AffectedSOPInstanceUID = UID("1.2.826.0.1.1")
    message = C_STORE_RSP()
    message.primitive_to_message(primitive)
    (pdata,) = message.encode_msg(1, 16384)
    ((_, theirs),) = pdata.presentation_data_value_list
    assert theirs[1:] == _response(request, 0xC001, "another content")


@pytest.mark.parametrize("uid", [" ", "", None, "1.2.3\\1.2.4", "\xe9" * 4])
def test_an_instance_uid_of_any_kind_is_answered(scp, raw, uid):
    node = scp()
    peer = raw(node.port)
    command = store_command(instance(1), AffectedSOPInstanceUID=None)
    if uid is not None:
        value = uid.encode("latin-1")
        value += b"\0" * (len(value) % 2)
        command += b"\x00\x00\x00\x10" + len(value).to_bytes(4, "little") + value
    assert peer.ask(command, encoded(instance(1))).Status == WRONG_CLASS
    assert peer.ask(store_command(instance(2)), encoded(instance(2))).Status == 0


def test_a_request_without_a_data_set_is_refused(scp, raw):
    node = scp()
    peer = raw(node.port)
    peer.send(fragment(CT, COMMAND | LAST, store_command(instance(1), CommandDataSetType=0x0101)))
    assert peer.read_response().Status == WRONG_CLASS
    assert peer.ask(store_command(instance(1)), b"").Status == WRONG_CLASS
    assert peer.ask(store_command(instance(1)), b"\0").Status == CANNOT_UNDERSTAND


BROKEN = {
    "a fragment longer than its PDU": [b"\x00\x00\x10\x00\x01\x03" + bytes(20)],
    "a fragment shorter than its head": [b"\x00\x00\x00\x01\x01\x03"],
    "less than a fragment's head": [b"\x00\x00\x00"],
    "data before a command": [fragment(CT, LAST, b"data")],
    "a command within a data set": [
        fragment(CT, COMMAND | LAST, store_command(instance(1))), fragment(CT, COMMAND, b"again"),
    ],
    "data of another context": [
        fragment(CT, COMMAND | LAST, store_command(instance(1))), fragment(ECHO, LAST, b"data"),
    ],
    "a context that was not accepted": [fragment(99, COMMAND | LAST, store_command(instance(1)))],
    "a command without an end": [fragment(CT, COMMAND, bytes(40_000)), fragment(CT, COMMAND, bytes(40_000))],
    "a command that is none": [fragment(CT, COMMAND | LAST, b"GET / HTTP/1.1")],
    "an element longer than its command": [fragment(CT, COMMAND | LAST, b"\0\0\2\0\xff\0\0\0")],
    "a query": [fragment(CT, COMMAND | LAST, store_command(instance(1), CommandField=0x0020))],
    "an echo with a data set": [fragment(ECHO, COMMAND | LAST, store_command(instance(1), CommandField=0x0030))],
    "an unknown command": [fragment(CT, COMMAND | LAST, store_command(instance(1), CommandField=0x7777))],
}  # fmt: skip


@pytest.mark.parametrize("fragments", BROKEN.values(), ids=BROKEN)
def test_what_is_no_message_ends_the_association_and_nothing_else(scp, raw, fragments):
    node = scp()
    peer = raw(node.port)
    for each in fragments:
        peer.send(each)
    assert peer.read_pdu()[0] in (0, 7)  # closed, or A-ABORT
    peer.close()
    wait_until(lambda: node.receiver.associations == 0, "the association ends")
    assert node.receiver._shared.add(0) == 0
    assert not node.files
    assert store(node.port, instance(1)) == [0]


def test_a_peer_that_leaves_within_a_pdu_leaves_nothing_behind(scp, raw):
    node = scp()
    peer = raw(node.port)
    peer.send(fragment(CT, COMMAND | LAST, store_command(instance(1))))
    peer.socket.sendall(b"\x04\x00\x00\x00\x10\x00" + b"\x00\x00\x0f\xfc\x01\x00" + bytes(100))
    peer.close()
    wait_until(lambda: node.receiver.associations == 0, "the association ends")
    assert node.receiver._shared.add(0) == 0
    assert not node.files


def test_what_all_peers_send_together_is_bounded(scp, raw, monkeypatch):
    node = scp()
    monkeypatch.setattr(transport, "LARGEST_TOGETHER", 150_000)
    peers = [raw(node.port) for _ in range(3)]
    for peer in peers[:2]:
        peer.send(fragment(CT, COMMAND | LAST, store_command(instance(1))))
        peer.send(fragment(CT, 0, bytes(60_000)))
    wait_until(lambda: node.receiver._shared.add(0) > 120_000, "both are being received")
    peers[2].send(fragment(CT, COMMAND | LAST, store_command(instance(1))))
    peers[2].socket.sendall(b"\x04\x00" + (60_000).to_bytes(4, "big"))
    assert peers[2].read_pdu()[0] == 7  # A-ABORT
    wait_until(lambda: node.receiver.associations == 2, "its association ends")


def test_a_large_instance_leaves_no_large_buffer_behind(scp, monkeypatch):
    node = scp()
    kept = []
    monkeypatch.setattr(shortcut, "_KEPT", 100_000)
    answer = shortcut._Shortcut._serve

    def serve(self, command) -> None:
        answer(self, command)
        kept.append(len(self._data))

    monkeypatch.setattr(shortcut._Shortcut, "_serve", serve)
    large = instance(2, Rows=256, Columns=512, PixelData=bytes(2 * 256 * 512))
    assert store(node.port, instance(1), large, instance(3)) == [0, 0, 0]
    assert kept[1] == 0
    assert len(node.files) == 3


def test_a_receiver_that_stops_ends_an_association_that_waits(scp):
    node = scp()
    with association(node.port) as found:
        assert found.send_c_store(instance(1)).Status == 0
        node.receiver.stop(0.1)
        wait_until(lambda: not found.is_established, "the node ends it")
    assert node.receiver.associations == 0
