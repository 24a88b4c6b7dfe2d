"""Storage commitment as its provider: what is committed, what is not and why, and that a report is never lost."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from ctflow.core.errors import DestinationDown
from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.deliver.reports import ReportThread
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.journal import commitments as commitments_of_journal
from ctflow.node.journal.commitments import CommitmentRequest, Commitments, Reference
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Why
from ctflow.node.receive import commitment, shortcut
from ctflow.node.receive.commitment import COMMITMENT, COMMITMENT_INSTANCE, request_dataset
from ctflow.node.settings.groups import Backoff
from service_support import association, instance, store, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of pynetdicom
MR = "1.2.840.10008.5.1.4.1.1.4"
ENHANCED = "1.2.840.10008.5.1.4.1.1.2.1"
KEPT, UNKNOWN = Reference(CT_IMAGE_STORAGE, "1.2.826.0.1.1"), Reference(CT_IMAGE_STORAGE, "1.2.3")


class Asker:
    """A peer that asks, and takes reports: on its associations, and at a port."""

    def __init__(self, port: int = 0, *, status: int = 0) -> None:
        self.reports: list[tuple[int, Dataset]] = []
        self.status = status
        ae = AE("ROUTER")
        ae.add_supported_context(COMMITMENT, scu_role=True, scp_role=True)
        self._server = ae.start_server(
            ("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._take)]
        )
        self.port = self._server.server_address[1]

    def _take(self, event):
        if self.status == 0:
            self.reports.append((event.event_type, event.event_information))
        return self.status, None

    @contextlib.contextmanager
    def ask(self, port: int, *references: Reference, transaction: str = "1.2.99") -> Iterator:
        """The association on which a request was accepted, still open."""
        ae = AE("ROUTER")
        ae.add_requested_context(COMMITMENT)
        found = ae.associate("127.0.0.1", port, ae_title="CTFLOW", evt_handlers=[(evt.EVT_N_EVENT_REPORT, self._take)])
        assert found.is_established
        status, _ = found.send_n_action(request_dataset(transaction, references), 1, COMMITMENT, COMMITMENT_INSTANCE)
        assert status.Status == 0
        try:
            yield found
        finally:
            if found.is_established:
                found.release()

    @property
    def reasons(self) -> dict[str, int]:
        """The reason of each object that failed in the only report."""
        ((_, report),) = self.reports
        return {each.ReferencedSOPInstanceUID: each.FailureReason for each in report.get("FailedSOPSequence", ())}

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def asker():
    made = []

    def make(**settings) -> Asker:
        made.append(Asker(**settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@contextlib.contextmanager
def reporting(journal: Journal, commitments: Commitments, port: int | None) -> Iterator[None]:
    """The thread that sends reports to a port."""

    def target(report) -> StorageTarget | None:
        request = report.request
        return None if port is None else StorageTarget("CTFLOW", request.calling_ae, request.peer, port)

    thread = ReportThread(journal, commitments, target, Backoff(0.1, 0.2, 60.0))
    thread.start()
    try:
        yield
    finally:
        thread.stop()


def test_what_is_stored_is_committed_and_the_rest_fails_by_name_on_the_same_association(scp, asker):
    node, peer = scp(), asker()
    assert store(node.port, instance(1), instance(2)) == [0, 0]
    lost = Reference(CT_IMAGE_STORAGE, "1.2.826.0.1.2")
    node.inbox.remove(node.journal.stored_as(lost.sop_instance_uid)[0][1])
    other_class, foreign = Reference(ENHANCED, KEPT.sop_instance_uid), Reference(MR, "1.2.4")
    with peer.ask(node.port, KEPT, UNKNOWN, lost, other_class, foreign):
        wait_until(lambda: peer.reports, "the report comes on the association")
        wait_until(lambda: not node.commitments.waiting(), "its answer is recorded")
    kind, report = peer.reports[0]
    assert kind == 2
    assert report.TransactionUID == "1.2.99"
    assert [each.ReferencedSOPInstanceUID for each in report.ReferencedSOPSequence] == [KEPT.sop_instance_uid]
    failed = [(each.ReferencedSOPClassUID, each.FailureReason) for each in report.FailedSOPSequence]
    assert failed == [(CT_IMAGE_STORAGE, 0x0112), (CT_IMAGE_STORAGE, 0x0112), (ENHANCED, 0x0119), (MR, 0x0122)]
    kinds = [each.kind for each in node.journal.events()]
    assert kinds[:2] == ["commitment-reported", "commitment"]


def test_all_committed_is_event_one_without_failures(scp, asker):
    node, peer = scp(), asker()
    assert store(node.port, instance(1)) == [0]
    with peer.ask(node.port, KEPT):
        wait_until(lambda: peer.reports, "the report comes")
    ((kind, report),) = peer.reports
    assert kind == 1
    assert "FailedSOPSequence" not in report


def test_a_peer_that_has_gone_gets_its_report_on_a_new_association(scp, asker):
    node, peer = scp(), asker()
    assert store(node.port, instance(1)) == [0]
    with peer.ask(node.port, KEPT):
        pass
    with reporting(node.journal, node.commitments, peer.port):
        wait_until(lambda: peer.reports, "the report comes")
        wait_until(lambda: not node.commitments.waiting(), "it is recorded")
    assert peer.reasons == {}


def test_a_report_is_sent_until_it_is_taken(scp, asker):
    node, peer = scp(), asker(status=0x0110)
    with peer.ask(node.port, UNKNOWN):
        pass
    with reporting(node.journal, node.commitments, peer.port):
        wait_until(lambda: [each for each in node.commitments.waiting() if each.attempts >= 2], "it was tried twice")
        peer.status = 0
        wait_until(lambda: peer.reports, "the report comes")
    assert peer.reasons == {"1.2.3": 0x0112}


def test_an_accepted_request_outlives_the_node(tmp_path, asker):
    """As after kill -9: whatever was recorded before the answer is all that is left."""
    peer = asker()
    journal = Journal(tmp_path / "journal.sqlite3")
    request = CommitmentRequest("1.2.99", "ROUTER", "127.0.0.1", False, (UNKNOWN,))
    Commitments(journal, tmp_path).asked(request, 0.0)
    journal.close()
    journal = Journal(tmp_path / "journal.sqlite3")
    commitments = Commitments(journal, tmp_path)
    try:
        with reporting(journal, commitments, peer.port):
            wait_until(lambda: peer.reports, "the report comes")
            wait_until(lambda: not commitments.waiting(), "it is recorded")
    finally:
        journal.close()


def test_without_a_port_the_audit_trail_says_that_no_report_can_be_sent(scp, asker):
    node, peer = scp(), asker()
    with peer.ask(node.port, UNKNOWN):
        pass
    with reporting(node.journal, node.commitments, None):
        wait_until(lambda: not node.commitments.waiting(), "it is given up")
    event = node.journal.events()[0]
    assert event.kind == "commitment-unreported"
    assert "peers[].port" in event.text


def test_the_same_transaction_again_is_reported_again(scp, asker):
    node, peer = scp(), asker()
    for number in (1, 2):
        with peer.ask(node.port, UNKNOWN):
            wait_until(lambda number=number: len(peer.reports) == number, "the report comes")
            wait_until(lambda: not node.commitments.waiting(), "it is recorded")


def without(dataset: Dataset, keyword: str) -> Dataset:
    delattr(dataset, keyword)
    return dataset


@pytest.mark.parametrize(
    ("dataset", "action", "instance_uid", "status"),
    [
        (request_dataset("1.2.9", [KEPT]), 2, COMMITMENT_INSTANCE, commitment.NO_SUCH_ACTION),
        (request_dataset("1.2.9", [KEPT]), 1, "1.2.3", commitment.NO_SUCH_INSTANCE),
        (without(request_dataset("1.2.9", [KEPT]), "TransactionUID"), 1, COMMITMENT_INSTANCE, 0x0120),
        (request_dataset("1.2.9", []), 1, COMMITMENT_INSTANCE, commitment.MISSING_ATTRIBUTE),
        (request_dataset("9" * 65, [KEPT]), 1, COMMITMENT_INSTANCE, commitment.INVALID_VALUE),
        (request_dataset("1.2.9", [Reference("", "1.2")]), 1, COMMITMENT_INSTANCE, commitment.MISSING_ATTRIBUTE),
        (request_dataset("1.2.9", [Reference(MR, "1" * 70)]), 1, COMMITMENT_INSTANCE, commitment.INVALID_VALUE),
        (request_dataset("1.2.9", [KEPT] * 5), 1, COMMITMENT_INSTANCE, commitment.RESOURCE_LIMIT),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about the UIDs
def test_a_request_that_cannot_be_meant_is_answered_by_its_status(
    scp, monkeypatch, dataset, action, instance_uid, status
):
    monkeypatch.setattr(commitment, "MOST_REFERENCES", 4)
    node = scp()
    with association(node.port, contexts={COMMITMENT: ["1.2.840.10008.1.2.1"]}) as found:
        answer, _ = found.send_n_action(dataset, action, COMMITMENT, instance_uid)
        assert answer.Status == status
        assert found.is_established
    assert node.commitments.waiting() == ()


def test_a_report_of_nothing_that_was_asked_is_refused(scp):
    node = scp()
    with association(node.port, contexts={COMMITMENT: ["1.2.840.10008.1.2.1"]}) as found:
        for context in found.accepted_contexts:
            context._as_scp = True
        kinds = ((1, commitment.INVALID_VALUE), (7, commitment.NO_SUCH_EVENT))
        for kind, status in kinds:
            answer, _ = found.send_n_event_report(
                request_dataset("1.2.5", [KEPT]), kind, COMMITMENT, COMMITMENT_INSTANCE
            )
            assert answer.Status == status


def test_requests_and_images_share_an_association(scp, asker):
    node = scp()
    contexts = {CT_IMAGE_STORAGE: ["1.2.840.10008.1.2.1"], COMMITMENT: ["1.2.840.10008.1.2.1"]}
    with association(node.port, contexts=contexts) as found:
        for number in (1, 2, 3):
            assert found.send_c_store(instance(number)).Status == 0
            answer, _ = found.send_n_action(
                request_dataset(f"1.2.{number}", [KEPT]), 1, COMMITMENT, COMMITMENT_INSTANCE
            )
            assert answer.Status == 0
    assert len(node.commitments.waiting()) == 3
    assert all(each.request.references[0].failure is None for each in node.commitments.waiting())


def test_a_peer_that_takes_no_reports_leaves_room_for_others(scp, monkeypatch):
    monkeypatch.setattr(commitments_of_journal, "_MOST_OF_PEER", 2)
    node = scp()
    for number in range(2):
        assert not node.commitments.is_full("OFF")
        node.commitments.asked(asked_by("OFF", number), 0.0)
    assert node.commitments.is_full("OFF")
    assert not node.commitments.is_full("ROUTER")


def test_no_more_requests_are_taken_than_can_wait(scp, monkeypatch):
    monkeypatch.setattr(commitments_of_journal, "_MOST_WAITING", 1)
    node = scp()
    with association(node.port, contexts={COMMITMENT: ["1.2.840.10008.1.2.1"]}) as found:
        answers = [
            found.send_n_action(request_dataset(f"1.2.{number}", [KEPT]), 1, COMMITMENT, COMMITMENT_INSTANCE)[0].Status
            for number in (1, 2)
        ]
    assert answers == [0, commitment.RESOURCE_LIMIT]


def test_a_request_is_no_longer_than_its_limit(scp, monkeypatch):
    """The node reads no data set of any length for what is no image."""
    monkeypatch.setattr(shortcut, "LARGEST_OTHER", 1000)
    node = scp()
    with association(node.port, contexts={COMMITMENT: ["1.2.840.10008.1.2.1"]}) as found:
        answer, _ = found.send_n_action(request_dataset("1.2.9", [KEPT] * 100), 1, COMMITMENT, COMMITMENT_INSTANCE)
        assert "Status" not in answer
        wait_until(lambda: not found.is_established, "the association is aborted")


def asked_by(title: str, number: int) -> CommitmentRequest:
    return CommitmentRequest(f"1.2.{number}", title, "127.0.0.1", False, (UNKNOWN,))


def test_a_peer_that_is_off_keeps_no_other_from_its_report(scp, asker):
    node, peer, tried = scp(), asker(), []
    for number in range(5):
        node.commitments.asked(asked_by("OFF", number), 0.0)
    node.commitments.asked(asked_by("ROUTER", 9), 0.0)

    def target(report) -> StorageTarget:
        if report.request.calling_ae == "OFF":
            tried.append(report.id)
            raise DestinationDown("it is off", reason="no-connection")
        return StorageTarget("CTFLOW", "ROUTER", "127.0.0.1", peer.port)

    thread = ReportThread(node.journal, node.commitments, target, Backoff(600.0, 600.0, 6000.0))
    thread.start()
    try:
        wait_until(lambda: peer.reports, "the other's report comes")
    finally:
        thread.stop()
    assert len(tried) == 1
    assert node.journal.waiting_reports() == 5


def test_what_a_peer_asks_without_an_end_takes_no_more_room(scp):
    node = scp()
    number = node.commitments.asked(asked_by("ROUTER", 1), 0.0)
    node.commitments.not_reported(number, Why("no-port", "no port is known"), None)
    kept = node.journal.look(lambda db: [tuple(row) for row in db.execute("SELECT state, report FROM commitments")])
    assert kept == [("dead", "[]")]


def test_a_request_that_waits_for_its_report_does_not_keep_its_data():
    sent = []
    layer = SimpleNamespace(most_pdu=16384, send=sent.append)
    service = SimpleNamespace(request=lambda *_, **__: (0, 1))
    talk = commitment.Conversation(layer, service, lambda: None, with_tls=False)
    talk.take(shortcut.Message(0x0130, 1, "1.2.840.10008.1.2", {}, bytes(2**22)))
    ((_, _, waiting),) = talk._due
    assert len(sent) == 1
    assert waiting.data == b""


def test_half_a_million_empty_items_are_refused_before_they_are_decoded(monkeypatch):
    item = b"\xfe\xff\x00\xe0\0\0\0\0"
    data = struct.pack("<HHL", 8, 0x1199, 40_001 * len(item)) + item * 40_001
    monkeypatch.setattr("pynetdicom.dsutils.decode", lambda *_: pytest.fail("it was decoded"))
    service = commitment.CommitmentService(None, ())
    answer = service.request(1, COMMITMENT_INSTANCE, data, "1.2.840.10008.1.2", None, with_tls=False)
    assert answer == (commitment.RESOURCE_LIMIT, None)
