"""Results reach every destination, the oldest first, however long it is away, and nobody is asked in a tight loop."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from ctflow.node.deliver import send
from ctflow.node.deliver.folder import FolderTarget
from ctflow.node.deliver.send import COPY, WHOLE, DeliveryThread
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.journal.journal import Journal
from ctflow.node.metrics import Metrics
from ctflow.node.settings.groups import Backoff
from service_support import PATIENCE_S, Archive, result_with_objects, wait_until

# pynetdicom leaves the socket of a connection that was refused to the garbage collector, which closes it at once.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
FILES = ("segmentation.dcm", "measurements.dcm")
HASTY = Backoff(0.05, 0.1, 3600.0)


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


@pytest.fixture
def delivery_thread(journal, tmp_path):
    """Starts delivery threads, and stops them."""
    started = []

    def start(target, name="pacs", backoff=HASTY) -> DeliveryThread:
        metrics = Metrics(journal, tmp_path)
        started.append(DeliveryThread(name, target, journal, tmp_path / "results", backoff, metrics))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def archive():
    made = []

    def make(**named) -> Archive:
        made.append(Archive(**named))
        return made[-1]

    yield make
    for each in made:
        each.close()


def waiting(journal, tmp_path, *numbers, destination="pacs"):
    deliveries = [(destination, file) for file in FILES]
    return [result_with_objects(journal, tmp_path / "results", number, deliveries) for number in numbers]


def states(journal, keys) -> list[str]:
    return [journal.find(key).state for key in keys]


def to(archive: Archive) -> StorageTarget:
    return StorageTarget("CTFLOW", "PACS", "127.0.0.1", archive.port)


def test_every_object_arrives_the_oldest_result_first_and_the_segmentation_before_the_report(
    journal, delivery_thread, archive, tmp_path
):
    keys, pacs = waiting(journal, tmp_path, 1, 2, 3), archive()
    delivery_thread(to(pacs))
    wait_until(lambda: states(journal, keys) == ["delivered"] * 3, "all is delivered")
    assert [each.SOPInstanceUID for each in pacs.received] == [f"2.25.{n}{k}" for n in (1, 2, 3) for k in (0, 1)]
    (late,) = waiting(journal, tmp_path, 4)
    wait_until(lambda: states(journal, [late]) == ["delivered"], "what comes later is also delivered")


def test_a_destination_that_was_down_gets_everything_afterwards_the_oldest_first(
    journal, delivery_thread, archive, tmp_path
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    keys = waiting(journal, tmp_path, 1, 2)
    target = StorageTarget("CTFLOW", "PACS", "127.0.0.1", port)
    delivery_thread(target)
    wait_until(lambda: journal.detail(keys[1]).deliveries[1].last_error, "the page says why it waits")
    assert journal.detail(keys[0]).deliveries[0].last_reason == "no-connection"
    keys += waiting(journal, tmp_path, 3)
    pacs = archive(port=port)
    wait_until(lambda: states(journal, keys) == ["delivered"] * 3, "all is delivered")
    assert [each.SOPInstanceUID for each in pacs.received] == [f"2.25.{n}{k}" for n in (1, 2, 3) for k in (0, 1)]


def test_a_destination_that_is_down_is_asked_no_more_often_than_its_patience_says(journal, delivery_thread, tmp_path):
    asked, second = [], threading.Event()

    class Down:
        def open(self):
            asked.append(1)
            if len(asked) == 2:
                second.set()
            raise send.DestinationDown("it is away", reason="no-connection")

    (key,) = waiting(journal, tmp_path, 1)

    class ShortThenLong(Backoff):  # twice as long may be over before a busy machine has written the events
        def wait_s(self, failures):
            return 0.5 if failures == 1 else 3600.0

    delivery_thread(Down(), backoff=ShortThenLong(0.5, 3600.0, 7200.0))
    assert second.wait(PATIENCE_S)
    for _ in range(50):  # whatever happens meanwhile wakes the delivery_thread, and not the destination
        journal.event("note", "something")
    assert len(asked) == 2
    assert journal.find(key).state == "done"


def test_patience_doubles_up_to_its_longest_wait():
    backoff = Backoff(5.0, 60.0, 3600.0)
    assert [backoff.wait_s(n) for n in (1, 2, 3, 4, 5, 1000)] == [5, 10, 20, 40, 60, 60]


def test_an_object_that_is_refused_is_tried_again_and_holds_up_no_other(journal, delivery_thread, archive, tmp_path):
    pacs, keys = archive(status=0xA700), waiting(journal, tmp_path, 1)
    delivery_thread(to(pacs))
    wait_until(lambda: all(d.attempts > 1 for d in journal.detail(keys[0]).deliveries), "both are tried again")
    refused = journal.detail(keys[0]).deliveries[0]
    assert refused.last_reason == "object-refused"
    assert "A700H" in refused.last_error
    pacs.status = 0x0000
    wait_until(lambda: states(journal, keys) == ["delivered"], "it is delivered")


def test_after_its_time_an_object_is_a_dead_letter_that_a_person_can_send_again(
    journal, delivery_thread, archive, tmp_path
):
    pacs, keys = archive(status=0xC000), waiting(journal, tmp_path, 1)
    delivery_thread(to(pacs), backoff=Backoff(0.01, 0.02, 0.0))
    wait_until(lambda: states(journal, keys) == ["dead"], "it is given up")
    wait_until(lambda: journal.backlog() == {"pacs": {"dead": 2}}, "both are")
    pacs.status = 0x0000
    assert journal.retry(keys[0])
    wait_until(lambda: states(journal, keys) == ["delivered"], "it is delivered")


def test_what_is_too_old_is_given_up_also_where_nobody_answers(journal, delivery_thread, tmp_path):
    keys = waiting(journal, tmp_path, 1)
    delivery_thread(StorageTarget("CTFLOW", "PACS", "127.0.0.1", 1), backoff=Backoff(0.01, 0.02, 0.0))
    wait_until(lambda: states(journal, keys) == ["dead"], "it is given up")


def test_a_warning_means_that_it_was_stored(journal, delivery_thread, archive, tmp_path):
    keys = waiting(journal, tmp_path, 1)
    delivery_thread(to(archive(status=0xB000)))
    wait_until(lambda: states(journal, keys) == ["delivered"], "it is delivered")
    assert any("warning B000H" in event.text for event in journal.events(key=keys[0]))


def test_no_answer_is_lost_to_a_loop_that_just_goes_on(journal, archive, tmp_path, monkeypatch):
    """pynetdicom asks a flag whether its loop for requests is paused; here the loop goes on as the answer comes."""
    destination = archive()
    waiting(journal, tmp_path, 1)
    (result,) = journal.results(journal.series()[0].key)
    with StorageTarget("CTFLOW", "PACS", "127.0.0.1", destination.port).open() as channel:
        checkpoint, messages = channel.association._reactor_checkpoint, channel.association.dimse.msg_queue
        wait = checkpoint.wait

        def late(*given) -> bool:
            found = wait(*given)
            deadline = time.monotonic() + 0.2
            while messages.empty() and time.monotonic() < deadline:
                time.sleep(0.001)
            return found

        monkeypatch.setattr(checkpoint, "wait", late)
        for _ in range(5):
            assert channel.send(tmp_path / "results" / result.folder, "segmentation.dcm") == ""
    assert len(destination.received) == 5


def test_a_destination_without_a_context_for_an_object_is_named(journal, delivery_thread, archive, tmp_path):
    keys = waiting(journal, tmp_path, 1)
    delivery_thread(to(archive(contexts=["1.2.840.10008.5.1.4.1.1.66.4"])))
    wait_until(lambda: journal.detail(keys[0]).deliveries[1].last_error, "the report is refused")
    seg, report = journal.detail(keys[0]).deliveries
    assert seg.state == "sent"
    assert report.last_reason == "no-context"
    assert "measurements.dcm" in report.last_error


def test_a_node_that_rejects_the_association_is_named(journal, delivery_thread, scp, tmp_path):
    keys = waiting(journal, tmp_path, 1)
    delivery_thread(StorageTarget("CTFLOW", "WRONG", "127.0.0.1", scp().port))
    wait_until(lambda: journal.detail(keys[0]).deliveries[0].last_error, "it is told")
    assert journal.detail(keys[0]).deliveries[0].last_reason == "association-rejected"


def test_a_copy_of_a_result_is_whole_and_waits_for_a_folder_that_is_not_mounted(journal, delivery_thread, tmp_path):
    key = result_with_objects(journal, tmp_path / "results", 1, [(COPY, WHOLE)])
    target = tmp_path / "copies"
    delivery_thread(FolderTarget(target), name=COPY)
    wait_until(lambda: journal.detail(key).deliveries[0].last_error, "the folder is missed")
    assert journal.detail(key).deliveries[0].last_reason == "folder-unmounted"
    target.mkdir()
    wait_until(lambda: journal.find(key).state == "delivered", "it is copied")
    (copy,) = target.iterdir()
    assert sorted(path.name for path in copy.iterdir()) == sorted(FILES)


def test_two_destinations_do_not_wait_for_each_other(journal, delivery_thread, archive, tmp_path):
    deliveries = [(name, file) for name in ("down", "pacs") for file in FILES]
    key = result_with_objects(journal, tmp_path / "results", 1, deliveries)
    delivery_thread(StorageTarget("CTFLOW", "PACS", "127.0.0.1", 1), name="down", backoff=Backoff(600.0, 600.0, 9999.0))
    delivery_thread(to(archive()))
    wait_until(lambda: journal.backlog()["pacs"] == {"sent": 2}, "one has everything")
    assert journal.backlog()["down"] == {"waiting": 2}
    assert journal.find(key).state == "done"
