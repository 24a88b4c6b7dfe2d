"""Retention removes what is finished, and only that; journal and disk agree whenever it ends."""

from __future__ import annotations

import json
import threading

import pytest

from ctflow.cli.main import main
from ctflow.core.errors import SettingsInvalid, StorageFull
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, Why
from ctflow.node.keeping import retention as module
from ctflow.node.keeping.locks import may_remove, nothing_removed, only_one
from ctflow.node.keeping.pruning import RetentionThread, prune
from ctflow.node.keeping.retention import carry_out, plan_removals
from ctflow.node.log import AuditTrail
from ctflow.node.receive.inbox import Inbox
from ctflow.node.settings.retention import Retention
from ctflow.node.settings.service import read_settings
from node_support import Ward
from reasons import raises_reason
from service_support import wait_until

DAY_S = 86_400
WEEK = Retention(instances_days=7, results_days=30)


@pytest.fixture
def ward(tmp_path):
    """A node whose clock stands; see `fill`."""
    ward = Ward(tmp_path / "data")
    yield ward
    ward.close()


def fill(ward: Ward) -> dict[str, str]:
    """Series in every state; each instance and result has a file."""
    keys = {
        "delivered": ward.delivered("1", 3), "undelivered": ward.done("2"), "dead": ward.undeliverable("3"),
        "discarded": ward.complete("4"),
    }  # fmt: skip
    ward.journal.discard(keys["discarded"])
    keys["aside"] = ward.complete("5")
    ward.journal.set_aside(keys["aside"], Why("gap", "a gap"))
    keys |= {"running": ward.run("6").key, "waiting": ward.complete("7"), "received": ward.receive("8")}
    data = ward.settings.data
    for file in ward.journal.files():
        (data / "inbox" / file).parent.mkdir(parents=True, exist_ok=True)
        (data / "inbox" / file).write_bytes(bytes(1000))
    for key in keys.values():
        for result in ward.journal.results(key):
            (ward.results / result.folder).mkdir(exist_ok=True)
            (ward.results / result.folder / "result.json").write_bytes(bytes(500))
    return keys


def on_disk(ward: Ward) -> tuple[set[str], set[str]]:
    inbox = ward.settings.data / "inbox"
    files = {path.relative_to(inbox).as_posix() for path in inbox.rglob("*.dcm")}
    return files, {path.name for path in ward.results.iterdir()}


def run(ward: Ward, retention: Retention, days: float, free=None) -> dict:
    ward.clock.now += days * DAY_S
    return carry_out(ward.journal, ward.settings.data, retention, ward.clock.now, free)


def test_only_what_is_delivered_or_discarded_goes_and_only_after_its_days(ward):
    keys = fill(ward)
    assert run(ward, WEEK, 6.9)["removals"] == []
    done = run(ward, WEEK, 0.2)
    assert {(each["key"], each["what"]) for each in done["removals"]} == {
        (keys["delivered"], "instances"), (keys["discarded"], "instances"),
    }  # fmt: skip
    files, results = on_disk(ward)
    assert files == ward.journal.files() == {f"ab/{name}/0.dcm" for name in "235678"}
    assert results == {keys["delivered"], keys["undelivered"], keys["dead"]}
    (gone,) = run(ward, WEEK, 23)["removals"]
    assert (gone["key"], gone["what"], gone["count"], gone["bytes"]) == (keys["delivered"], "results", 1, 500)
    assert on_disk(ward)[1] == {keys["undelivered"], keys["dead"]}
    events = [event.text for event in ward.journal.events(key=keys["delivered"]) if event.kind == "pruned"]
    assert events == [
        "1 results are removed: older than 30 days (retention.results_days)",
        "3 instances are removed: older than 7 days (retention.instances_days)",
    ]
    assert run(ward, WEEK, 1000)["removals"] == []
    assert ward.journal.detail(keys["delivered"]).results[0].model == "lung tumour"  # what it was stays known


def test_what_is_set_aside_goes_where_the_site_says_so_and_what_is_undelivered_never_does(ward):
    keys = fill(ward)
    done = run(ward, Retention(instances_days=0, results_days=0, only_delivered=False), 100)
    assert {each["key"] for each in done["removals"]} == {keys["delivered"], keys["discarded"], keys["aside"]}
    ward.journal.discard(keys["dead"])  # a person may
    done = run(ward, Retention(instances_days=0, results_days=0), 100)
    assert {(each["key"], each["what"]) for each in done["removals"]} == {
        (keys["dead"], "instances"), (keys["dead"], "results"),
    }  # fmt: skip


def test_low_disk_space_takes_the_oldest_delivered_first_and_no_more_than_needed(ward):
    first, second = ward.delivered("1"), ward.delivered("2")
    other = ward.complete("0")
    ward.journal.discard(other)
    for file in ward.journal.files():
        (ward.settings.data / "inbox" / file).parent.mkdir(parents=True, exist_ok=True)
        (ward.settings.data / "inbox" / file).write_bytes(b"x")
    free = Retention(free_disk=10**9)
    gone = run(ward, free, 0, lambda: 10**9 - 600_000)["removals"]  # an instance has 526,000 bytes
    assert [each["key"] for each in gone] == [first, second]
    assert run(ward, free, 0, lambda: 10**9)["removals"] == []
    assert [each["key"] for each in run(ward, free, 0, lambda: 0)["removals"]] == [other]


def test_an_instance_of_two_revisions_stays_while_one_of_them_needs_it(ward):
    ward.delivered("1", 2)
    second = ward.done("1", 1, first=2)
    inbox = ward.settings.data / "inbox" / "ab" / "1"
    inbox.mkdir(parents=True)
    for number in range(3):
        (inbox / f"{number}.dcm").write_bytes(b"x")
    run(ward, WEEK, 8)
    assert len(list(inbox.iterdir())) == 3
    for record in ward.journal.detail(second).deliveries:
        ward.journal.sent(record.id, "sent")
    run(ward, WEEK, 8)
    assert not inbox.exists()


def test_a_crash_between_journal_and_disk_is_cleaned_at_the_start(ward, monkeypatch):
    fill(ward)

    def broken(_path):
        raise OSError(5, "input/output error")

    monkeypatch.setattr(module, "_unlink", lambda _path: None)
    monkeypatch.setattr(module.shutil, "rmtree", broken)
    run(ward, Retention(instances_days=1, results_days=1), 2)
    monkeypatch.undo()
    assert len(on_disk(ward)[0]) == len(ward.journal.files()) + 4
    assert len(on_disk(ward)[1]) == 3
    assert Inbox(ward.settings.data / "inbox", 0).sweep(ward.journal.files()) == 4
    assert module.remove_results(ward.journal, ward.results) == 1
    assert on_disk(ward)[0] == ward.journal.files()
    assert len(on_disk(ward)[1]) == 2
    assert module.remove_results(ward.journal, ward.results) == 0


def test_a_full_disk_in_the_middle_removes_nothing_that_is_not_recorded(ward, monkeypatch):
    keys = fill(ward)
    change, calls = ward.journal.change, []

    def full_at_second(work):
        calls.append(work)
        if len(calls) == 2:
            raise StorageFull("no space left for the journal")
        return change(work)

    monkeypatch.setattr(ward.journal, "change", full_at_second)
    with pytest.raises(StorageFull):
        run(ward, WEEK, 8)
    files = on_disk(ward)[0]
    assert files == ward.journal.files()
    assert len(files) == 7
    monkeypatch.undo()
    assert [each["key"] for each in run(ward, WEEK, 0)["removals"]] == [keys["discarded"]]


def test_a_series_that_comes_again_after_its_files_went_is_a_new_revision(ward):
    fill(ward)
    run(ward, Retention(instances_days=1, results_days=1), 2)
    for name, count in (("1", 3), ("4", 1)):
        key = ward.receive(name, count)
        again = ward.journal.find(key)
        assert (again.revision, again.instances, again.state) == (2, count, "received")
        assert len(ward.journal.instances(key)) == count
    texts = [event.text for event in ward.journal.events() if event.kind == "received"]
    assert "after the removal of revision 1" in texts[0]


def test_what_has_no_files_cannot_be_tried_again(ward):
    keys = fill(ward)
    run(ward, Retention(instances_days=1, only_delivered=False), 2)
    assert not ward.journal.retry(keys["aside"])
    assert not ward.journal.retry(keys["discarded"])
    assert ward.journal.retry(keys["dead"])


def test_an_instance_that_goes_while_it_comes_again_is_written(ward):
    """The journal had it when it was compared, and has it no more when it is recorded."""
    fill(ward)
    run(ward, WEEK, 8)
    arrival = Arrival("1.2.1", "1.2.3", "1.2.1.0", "1.2", "1.2.1", "CT", "A", "p", "", 1, f"{0:064x}")
    assert ward.journal.receive(arrival, most_instances=1, most_bytes=99).verdict == "again"


def test_objects_that_are_not_run_go_with_the_instances(ward):
    arrival = Arrival("1.9", "1.2.3", "1.9.1", "1.2", "1.2.1", "SR", "A", "p", "ab/sr/1.dcm", 1000, "0" * 64)
    assert ward.journal.leave_out(arrival, most_instances=9, most_bytes=9999).verdict == "new"
    file = ward.settings.data / "inbox" / "ab" / "sr" / "1.dcm"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert run(ward, WEEK, 6)["removals"] == []
    (gone,) = run(ward, WEEK, 2)["removals"]
    assert (gone["what"], gone["count"]) == ("left-out", 1)
    assert not file.exists()
    assert ward.journal.files() == set()


def test_events_are_forgotten_once_the_log_has_them_and_series_once_nothing_is_left(ward):
    keys = fill(ward)
    forget = Retention(instances_days=1, results_days=1, events_days=10)
    assert run(ward, forget, 5)["events"] == 0
    assert run(ward, forget, 20)["events"] == 0  # the log has none of them
    AuditTrail(ward.journal, ward.settings.data / "audit-position").tell()
    newest = ward.journal.events(limit=1)[0].id
    assert run(ward, forget, 1)["events"] > 20
    run(ward, forget, 20)  # what was noted of the removal is old by then
    AuditTrail(ward.journal, ward.settings.data / "audit-position").tell()
    ward.journal.event("test", "a line")
    AuditTrail(ward.journal, ward.settings.data / "audit-position").tell()
    run(ward, forget, 20)
    assert ward.journal.find(keys["delivered"]) is None
    assert ward.journal.find(keys["undelivered"]) is not None
    ward.journal.event("test", "a line")
    assert ward.journal.events(limit=1)[0].id > newest  # a number is never given twice
    assert ward.journal.look(lambda db: db.execute("PRAGMA foreign_key_check").fetchall()) == []
    assert ward.journal.look(lambda db: db.execute("PRAGMA freelist_count").fetchone()[0]) == 0


def test_nothing_goes_while_a_backup_is_made(ward):
    fill(ward)
    with nothing_removed(ward.settings.data):
        with may_remove(ward.settings.data) as allowed:
            assert not allowed
        done = run(ward, WEEK, 8)
    assert (done["removals"], done["postponed"]) == ([], True)
    assert len(run(ward, WEEK, 0)["removals"]) == 2


def settings_file(ward: Ward, tmp_path) -> str:
    config = tmp_path / "node.yaml"
    config.write_text(f"data: {ward.settings.data}\nretention: {{instances_days: 0, results_days: 0}}\n")
    return str(config)


def test_the_command_shows_and_removes_while_no_node_runs(ward, tmp_path, capsys):
    keys = fill(ward)
    words = ["node", "prune", "-c", settings_file(ward, tmp_path)]
    before = on_disk(ward)
    assert main([*words, "--dry-run", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dry_run"]
    assert {each["key"] for each in document["removals"]} == {keys["delivered"], keys["discarded"]}
    assert "1.2.1" not in json.dumps(document)  # no UID
    assert main([*words, "--dry-run"]) == 0
    assert "3 would be removed" in capsys.readouterr().out
    assert on_disk(ward) == before
    ward.journal.close()
    assert main(words) == 0
    assert "3 removed" in capsys.readouterr().out
    assert keys["delivered"] not in on_disk(ward)[1]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removals"] == []


def test_a_node_that_runs_does_the_work(ward, tmp_path, capsys):
    keys = fill(ward)
    data = ward.settings.data
    thread = RetentionThread(ward.journal, data, Retention())  # nothing at its own times: only what is asked for
    with only_one(data):
        thread.start()
        try:
            assert prune(data, Retention(), dry_run=False)["removals"] == []
            thread._is_disk_low = lambda: False
            thread._retention = Retention(instances_days=0, results_days=0)
            assert main(["node", "prune", "-c", settings_file(ward, tmp_path), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["dry_run"] is False
        finally:
            thread.stop()
    assert on_disk(ward)[0] == ward.journal.files()
    assert keys["delivered"] not in on_disk(ward)[1]
    assert not (data / "prune-answer").exists()


def test_the_thread_removes_by_itself(ward):
    fill(ward)
    thread = RetentionThread(ward.journal, ward.settings.data, Retention(instances_days=0, results_days=0))
    thread.start()
    wait_until(lambda: ward.results.exists() and len(ward.journal.files()) == 6, "they are gone")
    thread.stop()
    assert on_disk(ward)[0] == ward.journal.files()
    assert thread not in threading.enumerate()


def test_settings_that_cannot_work_are_refused(tmp_path):
    config = tmp_path / "node.yaml"
    config.write_text("limits: {free_disk: 5 GB}\nretention: {free_disk: 5 GB}\n")
    with raises_reason(SettingsInvalid, "invalid-value"):
        read_settings(config, {"HOME": "/none"})
    config.write_text(f"data: {tmp_path}/none\n")
    assert main(["node", "prune", "-c", str(config)]) == SettingsInvalid.exit_code


def test_nothing_is_planned_without_settings(ward):
    fill(ward)
    assert plan_removals(ward.journal, ward.settings.data, Retention(), ward.clock.now + 10**9) == ()


def test_a_new_journal_gives_its_pages_back(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    assert journal.look(lambda db: db.execute("PRAGMA auto_vacuum").fetchone()[0]) == 2
    journal.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE series SET previous = NULL WHERE previous = ?",  # as a foreign key looks, too
        "UPDATE pruned_results SET gone = 1 WHERE result_id IN (SELECT id FROM results WHERE folder = ?)",
        "SELECT CAST(at / 3600 AS INTEGER) AS hour, kind, count(*) FROM events WHERE at > ? GROUP BY hour, kind",
    ],
)
def test_what_is_asked_often_looks_at_no_whole_table(ward, statement):
    plan = ward.journal.look(lambda db: db.execute(f"EXPLAIN QUERY PLAN {statement}", ("1",)).fetchall())
    assert [row["detail"] for row in plan if row["detail"].startswith("SCAN")] == []


def test_a_node_that_stops_does_not_wait_for_all_that_goes(ward):
    fill(ward)
    ward.clock.now += 8 * DAY_S
    left = iter([False, True])
    done = carry_out(ward.journal, ward.settings.data, WEEK, ward.clock.now, is_ending=lambda: next(left, True))
    assert len(done["removals"]) == 1
    assert len(run(ward, WEEK, 0)["removals"]) == 1


def test_an_object_that_arrived_after_all_makes_no_dead_letter(ward):
    """Its commitment came while its delivery was being given up."""
    key = ward.done("1")
    first, _ = ward.journal.detail(key).deliveries
    ward.journal.sent(first.id, "there")
    ward.journal.not_sent(first.id, Why("not-committed", "it did not commit in time"), None)
    assert ward.journal.find(key).state == "done"
    assert ward.journal.backlog()["pacs"] == {"sent": 1, "waiting": 1}
