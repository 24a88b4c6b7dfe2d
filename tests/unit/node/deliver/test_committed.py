"""Storage commitment as its user: a result counts as delivered once its destination has committed to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_role, evt

from ctflow.node.deliver.send import CommitmentPolicy, DeliveryThread
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.journal.records import DeliveryRecord
from ctflow.node.metrics import Metrics
from ctflow.node.receive.commitment import COMMITMENT, COMMITMENT_INSTANCE, CommitmentService
from ctflow.node.settings.groups import Backoff
from service_support import Archive, RunningScp, result_with_objects, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # of pynetdicom
SEG, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.7"
FILE = "segmentation.dcm"


class CommittingArchive:
    """An archive that answers requests with a report on an association of its own, to a port; `answer` makes it."""

    def __init__(self, report_to: int, answer, *, status: int = 0) -> None:
        self.received: list[str] = []
        self.asked: list[Dataset] = []
        self.statuses: list[int] = []
        self._report_to, self._answer, self._status = report_to, answer, status
        self._threads: list[threading.Thread] = []
        ae = AE("PACS")
        ae.add_supported_context(SEG)
        ae.add_supported_context(COMMITMENT)
        handlers = [(evt.EVT_C_STORE, self._store), (evt.EVT_N_ACTION, self._act)]
        self._server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        self.port = self._server.server_address[1]

    def _store(self, event) -> int:
        self.received.append(event.request.AffectedSOPInstanceUID)
        return 0

    def _act(self, event):
        self.asked.append(event.action_information)
        if self._status == 0 and (report := self._answer(event.action_information, len(self.asked))) is not None:
            self._threads.append(threading.Thread(target=self._report, args=report))
            self._threads[-1].start()
        return self._status, None

    def _report(self, kind: int, dataset: Dataset) -> None:
        ae = AE("PACS")
        ae.add_requested_context(COMMITMENT)
        role = build_role(COMMITMENT, scp_role=True)
        found = ae.associate("127.0.0.1", self._report_to, ae_title="CTFLOW", ext_neg=[role])
        answer, _ = found.send_n_event_report(dataset, kind, COMMITMENT, COMMITMENT_INSTANCE)
        self.statuses.append(answer.Status)
        found.release()

    def close(self) -> None:
        for thread in self._threads:
            thread.join()
        self._server.shutdown()


def committed(request: Dataset, _count: int):
    """All is committed."""
    return 1, request


def refused_once(request: Dataset, count: int):
    """The first request fails, the next is committed."""
    if count > 1:
        return 1, request
    report = Dataset()
    report.TransactionUID = request.TransactionUID
    (item,) = request.ReferencedSOPSequence
    item.FailureReason = 0x0110
    report.FailedSOPSequence = [item]
    return 2, report


def never_at_first(request: Dataset, count: int):
    """The first request is not answered."""
    return (1, request) if count > 1 else None


class Sender:
    """A node that sends one SEG to one destination."""

    def __init__(self, node: RunningScp, folder, port: int, kind: str, *, seg_class: str = SEG, timeout_s=60.0) -> None:
        self.node = node
        self.service = CommitmentService(node.commitments, ())
        self.key = result_with_objects(node.journal, folder, 1, [("pacs", FILE)], seg_class=seg_class)
        policy = CommitmentPolicy(node.commitments, timeout_s) if kind != "none" else None
        target = StorageTarget("CTFLOW", "PACS", "127.0.0.1", port, None, kind, self.service.report)
        self.thread = DeliveryThread(
            "pacs", target, node.journal, folder,
            Backoff(0.1, 0.2, 3600.0), Metrics(node.journal, folder), policy,
        )  # fmt: skip

    @property
    def delivery(self) -> DeliveryRecord:
        (found,) = self.node.journal.detail(self.key).deliveries
        return found

    @property
    def kinds(self) -> list[str]:
        """Events, the newest first."""
        return [each.kind for each in self.node.journal.events(key=self.key)]


@pytest.fixture
def sender(scp, tmp_path):
    """Starts one; ends its thread."""
    made = []

    def make(port_of, kind: str, **settings) -> Sender:
        node = scp()
        made.append(Sender(node, tmp_path / "results", port_of(node), kind, **settings))
        made[-1].thread.start()
        return made[-1]

    yield make
    for each in made:
        each.thread.stop()


@contextlib.contextmanager
def archive(answer, **settings) -> Iterator[dict]:
    """Makes one that reports to a node, when the node's port is known."""
    made: dict = {}

    def for_node(node: RunningScp) -> int:
        made["archive"] = CommittingArchive(node.port, answer, **settings)
        return made["archive"].port

    made["for"] = for_node
    try:
        yield made
    finally:
        made["archive"].close()


@pytest.mark.parametrize("kind", ["auto", "required"])
def test_a_result_is_delivered_when_its_destination_has_committed_to_it(sender, kind):
    with archive(committed) as made:
        found = sender(made["for"], kind)
        wait_until(lambda: found.delivery.state == "sent", "it is committed")
    (asked,) = made["archive"].asked
    (item,) = asked.ReferencedSOPSequence
    assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (SEG, made["archive"].received[0])
    assert made["archive"].statuses == [0]
    assert found.kinds[:3] == ["delivered", "sent", "stored"]


def test_until_then_it_awaits_commitment(sender):
    with archive(lambda *_: None) as made:
        found = sender(made["for"], "auto")
        wait_until(lambda: found.delivery.state == "stored", "it is sent")
        wait_until(lambda: made["archive"].asked, "it is asked for")
    assert found.node.journal.find(found.key).state == "done"
    assert found.node.journal.backlog() == {"pacs": {"stored": 1}}


def test_a_failure_has_the_object_sent_again(sender):
    with archive(refused_once) as made:
        found = sender(made["for"], "auto")
        wait_until(lambda: found.delivery.state == "sent", "it is committed in the end")
    assert len(made["archive"].received) == 2
    assert len(set(made["archive"].received)) == 1


def test_a_silent_destination_gets_the_object_again(sender):
    with archive(never_at_first) as made:
        found = sender(made["for"], "auto", timeout_s=4.0)
        wait_until(lambda: found.delivery.state == "sent", "it is committed in the end")
    assert len(made["archive"].received) == 2


def test_a_refused_request_has_the_object_sent_again_later(sender):
    with archive(committed, status=0x0110) as made:
        found = sender(made["for"], "required")
        wait_until(lambda: found.delivery.attempts >= 2, "it was tried twice")
        wait_until(lambda: found.delivery.last_reason == "commitment-refused", "the reason is kept")
    assert "0110H" in found.delivery.last_error


def test_a_destination_without_commitment_is_enough_for_auto_and_not_for_required(sender):
    destination = Archive()
    try:
        assert sender(lambda _: destination.port, "auto")
        wait_until(lambda: destination.received, "it is sent")
    finally:
        destination.close()


def test_required_commitment_that_is_not_offered_is_named_and_nothing_is_sent(sender):
    destination = Archive()
    try:
        found = sender(lambda _: destination.port, "required")
        wait_until(lambda: found.delivery.last_reason == "no-commitment", "the reason is kept")
        assert destination.received == []
    finally:
        destination.close()


def test_a_report_on_the_same_association_is_taken(sender, scp):
    """ctflow's own receiver, which sends it there."""
    destination = scp(ae_title="PACS")
    found = sender(lambda _: destination.port, "required", seg_class=SECONDARY_CAPTURE)
    wait_until(lambda: found.delivery.state == "sent", "it is committed")
    wait_until(lambda: not destination.commitments.waiting(), "its destination knows that the report arrived")
    assert len(destination.files) == 1


def test_a_report_for_what_was_sent_again_changes_nothing(sender):
    with archive(lambda *_: None) as made:
        found = sender(made["for"], "auto", timeout_s=3.0)
        wait_until(lambda: len(made["archive"].asked) == 2, "it was sent again")
        late = made["archive"].asked[0]
        (uid,) = {each.ReferencedSOPInstanceUID for each in late.ReferencedSOPSequence}
        assert not found.node.commitments.answered(late.TransactionUID, {uid}, {})
        assert found.delivery.state != "sent"
