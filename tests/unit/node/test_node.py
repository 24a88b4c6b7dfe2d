"""The whole node in this process, with its real worker: CT comes in, SEG and SR go out, and it starts and stops."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace

import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.main import main
from ctflow.core.errors import BundleInvalid, NotWritten, SettingsInvalid
from ctflow.node.node import Node, run_node
from ctflow.node.rules import Rule
from ctflow.node.settings.groups import Backoff, Destination, Limits
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.web import Web
from ctflow.node.settings.webhooks import Webhook
from ctflow.node.settings.when import Millilitres, NumberOfFindings, When
from ctflow.settings.run import Settings
from nnunet_support import dataset, plans, untrained, zipped
from node_support import loggers_kept
from reasons import raises_reason
from service_support import Archive, association, free_port, instance, storescu, wait_until, worker_that_answers
from webhook_support import HookReceiver

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
SR, SEG = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.66.4"
RUN = Settings(engine="eager", cache=None, device="cpu", report="none")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")


@pytest.fixture
def archive():
    archive = Archive()
    yield archive
    archive.close()


@pytest.fixture
def settings(tmp_path, bundle, archive) -> ServiceSettings:
    with free_port() as port:
        pass
    return ServiceSettings(
        data=tmp_path / "data", port=port, quiet_period_s=0.3, bundle=bundle, engine="eager", devices=("cpu",),
        limits=Limits(free_disk=0), web=Web(port=0), allow_demonstration=True,
        destinations=(Destination("pacs", "PACS", "127.0.0.1", archive.port, Backoff(0.1, 0.5, 3600.0)),),
    )  # fmt: skip


def test_a_series_goes_through_and_what_comes_late_makes_a_revision(settings, archive, series, tmp_path):
    files = sorted(series.iterdir())
    first, late = tmp_path / "first", tmp_path / "late"
    for folder, part in ((first, files[:-1]), (late, files[-1:])):
        folder.mkdir()
        for path in part:
            (folder / path.name).symlink_to(path)
    copies, secret, told = tmp_path / "copies", tmp_path / "secret", HookReceiver()
    copies.mkdir()
    secret.write_bytes(bytes(32))
    secret.chmod(0o600)
    never = When(volume_ml=Millilitres(min=90_000))
    hooks = (
        Webhook("hook", f"http://127.0.0.1:{told.port}/", secret, when=When(findings=NumberOfFindings())),
        Webhook("never", f"http://127.0.0.1:{told.port}/", secret, when=never),
    )
    with Node(replace(settings, copy_to=copies, webhooks=hooks), RUN) as node:
        storescu(node.receiver.port, first)
        wait_until(lambda: node.journal.counts()["delivered"] == 1, "SEG and SR are delivered")
        assert sorted(each.SOPClassUID for each in archive.received) == [SEG, SR]
        assert node.problems() == []
        assert node.demonstration().startswith("RESEARCH ONLY")
        storescu(node.receiver.port, late)
        wait_until(lambda: node.journal.counts()["delivered"] == 2, "the revision is delivered")
        (newer, older) = node.journal.series()
        exposition = node.metrics.exposition()[0].decode()
        chosen = [event.text for event in node.journal.events(key=older.key) if event.kind == "destinations"]
    told.close()
    assert len(told.requests) == 2
    assert len({headers["Idempotency-Key"] for headers, _ in told.requests}) == 2
    assert json.loads(told.requests[0][1])["series"] == older.digest
    assert chosen[0].startswith("to pacs, hook; not to never (volume_ml is ")
    assert (newer.revision, newer.previous, newer.instances) == (2, older.key, len(files))
    segs = [each for each in archive.received if each.SOPClassUID == SEG]
    reports = [each for each in archive.received if each.SOPClassUID == SR]
    assert len({each.SOPInstanceUID for each in segs}) == 2
    assert "PredecessorDocumentsSequence" not in reports[0]
    (study,) = reports[1].PredecessorDocumentsSequence
    referenced = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
    assert referenced.ReferencedSOPInstanceUID == reports[0].SOPInstanceUID
    assert len(list(copies.iterdir())) == 2
    assert 'ctflow_series{state="delivered"} 2.0' in exposition
    assert f"ctflow_instances_received_total {len(files)}.0" in exposition
    assert 'ctflow_sends_total{destination="pacs",outcome="sent"} 4.0' in exposition


def test_a_zip_of_nnunet_goes_through(settings, archive, series, tmp_path):
    trained = untrained(tmp_path / "trained", plans(spacing=[8.0, 6.0, 6.0], patch_size=[16, 32, 32]), dataset())
    (trained / "metadata.json").write_text('{"name": "Liver", "body_parts": ["CHEST"]}')
    model = zipped(trained, tmp_path / "model.zip")
    with Node(replace(settings, bundle=model, mirror="none", allow_demonstration=False), RUN) as node:
        storescu(node.receiver.port, series)
        wait_until(lambda: node.journal.counts()["delivered"] >= 1, "SEG and SR are delivered")
        assert node.problems() == []
    seg = next(each for each in archive.received if each.SOPClassUID == SEG)
    assert seg.ManufacturerModelName == "Liver"
    assert {each.SegmentLabel for each in seg.SegmentSequence} <= {"liver", "lung tumour"}


def test_what_was_interrupted_goes_on_after_a_start_and_nothing_half_written_stays(settings, archive, series):
    with Node(settings, RUN) as node:
        storescu(node.receiver.port, series)
        node.completer.stop()
    orphan = settings.data / "inbox" / "ab" / "ab" / "half.dcm"
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"half")
    hidden = settings.data / "results" / "key" / ".half"
    hidden.mkdir(parents=True)
    with Node(settings, RUN) as node:
        assert not orphan.exists()
        assert not hidden.exists()
        wait_until(lambda: node.journal.counts()["delivered"] == 1, "it is delivered")
    assert len(archive.received) == 2


def test_results_of_a_demonstration_model_stay_here_unless_allowed(settings, archive, series):
    with Node(replace(settings, allow_demonstration=False), RUN) as node:
        storescu(node.receiver.port, series)
        wait_until(lambda: node.journal.counts()["done"] == 1, "it is done")
        assert node.journal.backlog() == {}
        assert "are not sent" in node.demonstration()
    assert archive.received == []


def test_a_rule_and_a_series_that_cannot_be_run_set_aside_with_the_reason(settings, series):
    with Node(replace(settings, rules=(Rule("ignore", calling_ae=("STORESCU",)),)), RUN) as node:
        storescu(node.receiver.port, series)
        with association(node.receiver.port) as found:
            assert found.send_c_store(instance(1)).Status == 0
        wait_until(lambda: node.journal.counts()["aside"] == 2, "both are set aside")
        reasons = {each.calling_ae: (each.reason, each.message) for each in node.journal.series()}
    assert reasons["STORESCU"][0] == "rule-ignore"
    assert "rule 1" in reasons["STORESCU"][1]
    assert reasons["ROUTER"][0] == "no-frame-of-reference"
    assert "SECRET" not in json.dumps(reasons)


def test_every_thread_that_ends_is_named(settings, monkeypatch):
    monkeypatch.setattr("ctflow.node.work.supervisor.run_worker", worker_that_answers)
    with Node(settings, RUN) as node:
        wait_until(lambda: node.problems() == [], "the node is ready")
        node.receiver._waiting.stop()
        node.completer.stop()
        node.delivery_threads[0].stop()
        node.pool.stop(0)

        def ended(*names):
            return [f"{name} has ended unexpectedly: start the node again" for name in names]

        assert node.problems() == [*ended("listener", "completer"), "no worker is open: the log says why"]
        assert node.remarks() == ended("worker 0", "delivery pacs")
        node.journal.close()
        assert node.problems()[0] == "journal has ended unexpectedly: start the node again"


def test_a_node_is_ready_while_it_receives_and_one_worker_of_two_runs(settings, monkeypatch):
    monkeypatch.setattr("ctflow.node.work.pool._LOOK_AGAIN_S", 3600)  # else it may be open again before the test looks
    monkeypatch.setattr("ctflow.node.work.supervisor.run_worker", worker_that_answers)
    with Node(replace(settings, devices=("cuda:0", "cuda:1")), RUN) as node:
        wait_until(lambda: node.problems() == node.remarks() == [], "both workers are open")
        node.delivery_threads[0].stop()
        node.pool.threads[1].kill()
        said = ["delivery pacs has ended unexpectedly: start the node again", "worker 1 is not open"]
        wait_until(lambda: node.remarks() == said, "they are named")
        assert node.problems() == []


def test_two_nodes_do_not_share_a_data_folder(settings, monkeypatch):
    monkeypatch.setattr("ctflow.node.work.supervisor.run_worker", worker_that_answers)
    with Node(settings, RUN), raises_reason(SettingsInvalid, "folder-in-use"):
        Node(replace(settings, port=1), RUN)


def test_a_data_folder_that_cannot_be_made_is_named_by_its_option(settings, tmp_path):
    (tmp_path / "file").touch()
    with raises_reason(NotWritten, "unwritable", names=("the data folder", "--data")):
        Node(replace(settings, data=tmp_path / "file"), RUN)


def test_a_model_that_cannot_be_opened_ends_the_start(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with raises_reason(BundleInvalid, "no-bundle"):
        run_node(replace(settings, bundle=tmp_path / "empty"), RUN, threading.Event())


def test_serve_checks_and_refuses_a_file_and_stops_when_told(tmp_path, capsys, settings, monkeypatch):
    config = tmp_path / "node.yaml"
    config.write_text(f"data: {settings.data}\nport: {settings.port}\nweb: {{enabled: false}}\n")
    monkeypatch.setattr("ctflow.node.check.opened", lambda *_: iter(()))
    assert main(["serve", "-c", str(config), "--check", "--port", "11113"]) == 0
    assert "listens as CTFLOW on 127.0.0.1:11113" in capsys.readouterr().out
    config.write_text("prot: 1\n")
    assert main(["serve", "-c", str(config)]) == 64
    asked = []
    monkeypatch.setattr("ctflow.node.node.run_node", lambda *given: asked.append(given))
    level, handlers = logging.getLogger().level, logging.getLogger().handlers[:]
    try:
        assert main(["serve", "--data", str(settings.data), "--allow-demonstration"]) == 0
    finally:
        logging.basicConfig(level=level, handlers=handlers, force=True)
    (given,) = asked
    assert given[0].allow_demonstration
    assert given[0].data == settings.data
    assert given[1].roi == "none"
    assert not given[2].is_set()


@pytest.mark.parametrize(
    ("line", "variable", "roi"), [("roi: body", "none", "body"), ("", "body", "body"), ("roi: none", "body", "none")]
)
def test_file_or_environment_says_which_part_is_looked_at(tmp_path, capsys, settings, monkeypatch, line, variable, roi):
    config = tmp_path / "node.yaml"
    config.write_text(f"data: {settings.data}\nweb: {{enabled: false}}\n{line}\n")
    monkeypatch.setenv("CTFLOW_ROI", variable)
    asked = []
    monkeypatch.setattr("ctflow.node.node.run_node", lambda *given: asked.append(given))
    with loggers_kept():
        assert main(["serve", "-c", str(config)]) == 0
    assert asked[0][1].roi == roi
    monkeypatch.setattr("ctflow.node.check.opened", lambda *_: iter(()))
    assert main(["serve", "-c", str(config), "--check"]) == 0
    assert ("only where the body is" in capsys.readouterr().out) == (roi == "body")
