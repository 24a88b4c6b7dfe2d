"""A shortcut for C-STORE requests through pynetdicom: one thread reads, stores and answers each.

pynetdicom takes each PDU through an event, a state machine and several copies, passes the message to a second thread,
and builds the answer as a data set: more than half of the time of an image, most of it for the handover.
It keeps everything else: association, negotiation, C-ECHO, release, abort and timers.

In the data transfer state this module reads P-DATA-TF, and the original everything else (`compat/pynetdicom`).

Gain: 25 associations that send 10 images of 512 x 512 each take 2.5 ms per image and 2.4 ms of CPU, with
pynetdicom alone 4.8 and 5.4 (1.9 and 2.2 times; benchmarks/own_code.py store, 2026-11-29: AMD EPYC, 2 cores at a load
of 4.1, Python 3.11.7, pynetdicom 3.0.4). One association waits for the disk: it takes as long, for half the CPU.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ctflow.compat.pynetdicom import UpperLayer
from ctflow.node.receive.transport import LimitedSocket

P_DATA = 0x04
_IS_COMMAND, _IS_LAST = 1, 2  # bits of a fragment's control header (PS3.8 E.2)
_PDV_HEAD = 6  # bytes: length, context, control header
_LARGEST_COMMAND = 2**16
_STORE_REQUEST, _STORE_RESPONSE, _ECHO_REQUEST = 0x0001, 0x8001, 0x0030  # PS3.7 9.3
_NO_DATA_SET = 0x0101
_LONGEST_COMMENT = 64
_LOOK_AGAIN_MS = 50  # between checks of timers and of the association's end, as pynetdicom does
OTHER_STUDY = 0xA901  # the instance is of another study than STOW-RS named; no answer to C-STORE
_KEPT = 2**22  # bytes of a buffer kept for the next instance


@dataclass(frozen=True)
class StoreRequest:
    """A C-STORE request (PS3.7 9.3.1.1).

    Attributes:
        sop_class_uid: Affected SOP Class UID; not checked.
        sop_instance_uid: Affected SOP Instance UID; not checked.
        abstract_syntax: Of its presentation context.
        transfer_syntax: Of its presentation context.
        data: The encoded data set; valid until the answer.
        study_uid: Of the study that it must belong to; any if empty.
    """

    sop_class_uid: str
    sop_instance_uid: str
    abstract_syntax: str
    transfer_syntax: str
    data: memoryview
    study_uid: str = ""


@dataclass(frozen=True)
class Message:
    """A message of another service than storage.

    Attributes:
        kind: Command Field.
        context_id: Of its presentation context.
        transfer_syntax: Of its presentation context.
        elements: Values of its command set by element number.
        data: Its data set; empty without one.
    """

    kind: int
    context_id: int
    transfer_syntax: str
    elements: Mapping[int, bytes]
    data: bytes


class Others(Protocol):
    """Takes messages of other services, and answers them itself; runs in the reading thread."""

    def takes(self, kind: int, abstract_syntax: str) -> bool:
        """Whether messages of this kind are taken in such a context."""
        ...

    def take(self, message: Message) -> None:
        """Take one."""
        ...

    def idle(self) -> None:
        """Do what is due; called many times a second between messages."""
        ...


StoreAnswer = tuple[int, str]
Store = Callable[[Any, StoreRequest], StoreAnswer]


class Invalid(Exception):
    """The received data is not P-DATA by PS3.8."""


LARGEST_OTHER = 2**22  # bytes of a data set that is no instance: 20,000 references of storage commitment have 3 MB


@dataclass(frozen=True)
class _Command:
    """The fields needed from the command set of a C-STORE request."""

    context_id: int
    message_id: int
    sop_class: bytes
    sop_instance: bytes
    other: Message | None = None


def shorten(association: Any, store: Store, others: Callable[[UpperLayer], Others] | None = None) -> None:
    """Install the shortcut for C-STORE requests in an association that has not started yet.

    Args:
        association: A pynetdicom `Association` as acceptor, whose socket is a `LimitedSocket`.
        store: Takes the association and a request; returns status and comment. It runs in the reading thread.
        others: Makes what takes messages of other services than storage.
    """
    layer = UpperLayer(association)
    made = None if others is None else others(layer)
    layer.read_with(_Shortcut(association, layer, store, made).read)
    if made is not None:
        layer.each_round(made.idle)


class _Shortcut:
    """Reads PDUs in place of pynetdicom."""

    def __init__(self, association: Any, layer: UpperLayer, store: Store, others: Others | None) -> None:
        self._association = association
        self._layer = layer
        self._store = store
        self._others = others
        self._connection: LimitedSocket = layer.connection
        self._command = bytearray()
        self._request: _Command | None = None
        self._data = bytearray()
        self._filled = 0
        self._poll = select.poll()  # takes descriptors of any number
        self._poll.register(self._connection, select.POLLIN)
        self._poll.register(layer.bell, select.POLLIN)

    def read(self) -> None:
        """Read available data: requests as long as they come, or one PDU of another kind."""
        try:
            while self._layer.is_transferring:
                if self._connection.next_kind() != P_DATA:
                    break
                self._read_pdu()
                self._layer.heard()
                if not self._is_more_coming():
                    return
        except OSError:
            self._layer.lost()
            return
        except Invalid:
            self._layer.invalid()
            return
        self._layer.read_others()

    def _is_more_coming(self) -> bool:
        """Whether to read next; False if pynetdicom has something to do, or nothing came."""
        if self._layer.has_work:
            return False
        if self._connection.pending():
            return True
        ready = self._poll.poll(_LOOK_AGAIN_MS)
        return len(ready) == 1 and ready[0][0] == self._connection.fileno()

    def _read_pdu(self) -> None:
        left = self._connection.begin_pdu()
        while left:
            if left < _PDV_HEAD:
                raise Invalid
            length, context_id, control = struct.unpack(">LBB", self._received(_PDV_HEAD))
            if not 2 <= length <= left - 4:
                raise Invalid
            left -= 4 + length
            if control & _IS_COMMAND:
                self._take_command(context_id, control, length - 2)
            else:
                self._take_data(context_id, control, length - 2)

    def _received(self, count: int) -> bytearray:
        data = self._connection.receive(count)
        if len(data) < count:
            raise ConnectionAbortedError("closed within a PDU")
        return data

    # -- commands -----------------------------------------------------------------------------------------------------

    def _take_command(self, context_id: int, control: int, count: int) -> None:
        if self._request is not None or len(self._command) + count > _LARGEST_COMMAND:
            raise Invalid  # before the last command's data set had arrived, or without an end
        self._command += self._received(count)
        if not control & _IS_LAST:
            return
        command, self._command = bytes(self._command), bytearray()
        elements = dict(_elements(command))
        kind, has_data = unsigned_short(elements, 0x0100), unsigned_short(elements, 0x0800) != _NO_DATA_SET
        if kind == _ECHO_REQUEST and not has_data:
            self._pass_on(context_id, command)
            return
        syntaxes = self._layer.context(context_id)
        if syntaxes is None:
            raise Invalid
        other = None
        if kind != _STORE_REQUEST:
            if self._others is None or not self._others.takes(kind, syntaxes[0]):
                raise Invalid  # this node offers nothing else
            other = Message(kind, context_id, syntaxes[1], elements, b"")
        self._request = _Command(
            context_id=context_id,
            message_id=unsigned_short(elements, 0x0110),
            sop_class=elements.get(0x0002, b""),
            sop_instance=elements.get(0x1000, b""),
            other=other,
        )
        if not has_data:
            self._serve(self._request)

    def _pass_on(self, context_id: int, command: bytes) -> None:
        """Pass a command to pynetdicom, as if it had come alone in a PDU."""
        fragment = struct.pack(">LBB", len(command) + 2, context_id, _IS_COMMAND | _IS_LAST) + command
        self._layer.pass_on(struct.pack(">BBL", P_DATA, 0, len(fragment)) + fragment)

    # -- data sets ----------------------------------------------------------------------------------------------------

    def _take_data(self, context_id: int, control: int, count: int) -> None:
        if self._request is None or self._request.context_id != context_id:
            raise Invalid
        end = self._filled + count
        if self._request.other is not None and end > LARGEST_OTHER:
            raise Invalid
        if end > len(self._data):  # doubled each time: a buffer that grows by PDUs is copied for each
            self._data.extend(bytes(max(end, min(2 * len(self._data), end + 2**26)) - len(self._data)))
        with memoryview(self._data) as whole, whole[self._filled : end] as view:
            if self._connection.receive_into(view) < count:
                raise ConnectionAbortedError("closed within a PDU")
        self._filled = end
        if control & _IS_LAST:
            self._serve(self._request)

    def _serve(self, command: _Command) -> None:
        """Store the instance, and answer; or pass another message on."""
        if command.other is not None and self._others is not None:
            data = bytes(self._data[: self._filled])
            self._request, self._filled = None, 0
            self._others.take(replace(command.other, data=data))
            return
        syntaxes = self._layer.context(command.context_id)
        if syntaxes is None:
            raise Invalid
        with memoryview(self._data) as whole, whole[: self._filled].toreadonly() as stored:
            request = StoreRequest(
                sop_class_uid=text_of(command.sop_class),
                sop_instance_uid=text_of(command.sop_instance),
                abstract_syntax=syntaxes[0],
                transfer_syntax=syntaxes[1],
                data=stored,
            )
            status, comment = self._store(self._association, request)
        self._request, self._filled = None, 0
        if len(self._data) > _KEPT:
            self._data = bytearray()
        response = _response(command, status, comment)
        self._layer.send(b"".join(pdus(command.context_id, response, self._layer.most_pdu)))


def _elements(command: bytes) -> Iterator[tuple[int, bytes]]:
    """Element numbers and values of a command set (group 0000, Implicit VR Little Endian, PS3.7 6.3.1)."""
    position = 0
    while position < len(command):
        if position + 8 > len(command):
            raise Invalid
        group, element, length = struct.unpack_from("<HHL", command, position)
        position += 8
        if group != 0 or position + length > len(command):
            raise Invalid
        yield element, command[position : position + length]
        position += length


def unsigned_short(elements: Mapping[int, bytes], element: int) -> int:
    """An unsigned short; -1 if it is absent or invalid."""
    value = elements.get(element, b"")
    return int.from_bytes(value, "little") if len(value) == 2 else -1


def text_of(uid: bytes) -> str:
    """A UID of a command set, without its padding."""
    return uid.decode("ascii", "replace").strip(" \0")


def _response(command: _Command, status: int, comment: str) -> bytes:
    """The command set of a C-STORE response (PS3.7 9.3.1.2); UIDs are the request's, byte for byte."""
    message_id = command.message_id if command.message_id >= 0 else 0
    said = comment[:_LONGEST_COMMENT].encode("ascii", "replace")
    elements = b"".join(
        (
            element(0x0002, command.sop_class),
            element(0x0100, struct.pack("<H", _STORE_RESPONSE)),
            element(0x0120, struct.pack("<H", message_id)),
            element(0x0800, struct.pack("<H", _NO_DATA_SET)),
            element(0x0900, struct.pack("<H", status)),
            element(0x0902, said + b" " * (len(said) % 2)) if said else b"",
            element(0x1000, command.sop_instance),
        )
    )
    return element(0x0000, struct.pack("<L", len(elements))) + elements


def element(number: int, value: bytes) -> bytes:
    """An element of a command set."""
    return struct.pack("<HHL", 0, number, len(value)) + value


def pdus(context_id: int, content: bytes, most: int, *, is_command: bool = True) -> Iterator[bytes]:
    """A command or data set as P-DATA-TF PDUs of at most so many bytes after their heads; 0 is any (PS3.8 D.1)."""
    step = max(most - _PDV_HEAD, 1) if most else len(content)
    for start in range(0, len(content), step):
        part = content[start : start + step]
        control = (_IS_COMMAND if is_command else 0) | (_IS_LAST if start + step >= len(content) else 0)
        fragment = struct.pack(">LBB", len(part) + 2, context_id, control) + part
        yield struct.pack(">BBL", P_DATA, 0, len(fragment)) + fragment
