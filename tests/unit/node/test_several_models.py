"""A node with several models and its real worker: each has its result, whatever happens to the worker or another."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from bundle_support import small_unet_bundle
from ctflow.node.node import Node
from ctflow.node.rules import Rule
from ctflow.node.settings.groups import Backoff, Destination, Limits
from ctflow.node.settings.models import NodeModel, RunOptions
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.web import Web
from ctflow.settings.run import Settings
from service_support import Archive, free_port, storescu, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
RUN = Settings(engine="eager", cache=None, device="cpu", report="none")


@pytest.fixture
def archives():
    found = {name: Archive() for name in ("all", "body")}
    yield found
    for each in found.values():
        each.close()


@pytest.fixture
def settings(tmp_path, archives) -> ServiceSettings:
    bundle = small_unet_bundle(tmp_path / "small")
    with free_port() as port:
        pass
    backoff = Backoff(0.1, 0.5, 3600.0)
    return ServiceSettings(
        data=tmp_path / "data", port=port, quiet_period_s=0.3, bundle=bundle, engine="eager", devices=("cpu",),
        limits=Limits(free_disk=0), web=Web(port=0), allow_demonstration=True, report="none", cache=None,
        engines_open=1,
        models=(
            NodeModel(name="broken", bundle=tmp_path / "absent"), NodeModel(name="lung"),
            NodeModel(name="body", overlap=0.5, constant_windows="compute"),
        ),
        rules=(Rule(run=("lung", "body", "broken"), options=RunOptions(overlap=0.0)),),
        destinations=(
            Destination("all", "PACS", "127.0.0.1", archives["all"].port, backoff),
            Destination("body", "PACS", "127.0.0.1", archives["body"].port, backoff, models=("body",)),
        ),
    )  # fmt: skip


def runs(node: Node) -> dict[str, str]:
    return {run.model: run.state for each in node.journal.series() for run in node.journal.runs(each.key)}


def test_each_model_has_one_result_though_the_worker_is_killed_in_between(settings, archives, series):
    with Node(settings, settings.run) as node:
        (supervisor,) = node.pool.threads
        storescu(node.receiver.port, series)
        wait_until(lambda: "running" in {runs(node).get("lung"), runs(node).get("body")}, "a model computes")
        os.kill(supervisor._process.pid, signal.SIGKILL)
        wanted = {"lung": "delivered", "body": "delivered", "broken": "aside"}
        wait_until(lambda: runs(node) == wanted, "both results are delivered")
        (found,) = node.journal.series()
        detail = node.journal.detail(found.key)
        assert (found.state, found.reason) == ("aside", "no-bundle"), "a person must look at it"
        assert sorted(each.run_model for each in detail.results) == ["body", "lung"]
        assert [each.kind for each in detail.events].count("retry") == 1
        assert node.problems() == []
        wait_until(lambda: any("model broken: BundleInvalid" in each for each in node.remarks()), "it is a remark")
        exposition = node.metrics.exposition()[0].decode()
        assert node.demonstration().startswith("RESEARCH ONLY")
        folders = [settings.data / "results" / each.folder for each in detail.results]
        assert sorted(folder.name.split("-")[0] for folder in folders) == ["body", "lung"]
        documents = [json.loads((folder / "result.json").read_text()) for folder in folders]
        assert {each["window"]["overlap"] for each in documents} == {0.0}, "the rule's option"
    assert 'ctflow_runs{model="lung",state="delivered"} 1.0' in exposition
    assert 'ctflow_stage_seconds_count{model="body",stage="segment"} 1.0' in exposition
    assert (len(archives["all"].received), len(archives["body"].received)) == (4, 2), "SEG and SR of each, once"
    assert len({each.SOPInstanceUID for each in archives["all"].received}) == 4
    assert not list(Path(settings.data / "running").iterdir())
