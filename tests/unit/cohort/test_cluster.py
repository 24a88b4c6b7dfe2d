"""What a cluster's driver decides before and between its calls of Ray."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ctflow.cli.cohort import _has_several_gpus, cohort
from ctflow.cohort.cluster import connection
from ctflow.cohort.cluster.driver import Cluster
from ctflow.cohort.cluster.pool import ClusterPool
from ctflow.core.errors import BackendUnavailable, RequirementUnmet, SettingsInvalid
from ctflow.settings.run import Settings

SETTINGS = Settings()


def node(name: str, *, cpus: int = 0, gpus: int = 0, alive: bool = True) -> dict:
    return {"NodeID": name, "Alive": alive, "NodeManagerHostname": name, "Resources": {"CPU": cpus, "GPU": gpus}}


def ray_of(*nodes: dict) -> SimpleNamespace:
    there = sum(each["Resources"]["GPU"] for each in nodes)
    return SimpleNamespace(
        nodes=lambda: list(nodes), remote=lambda kind: kind, cluster_resources=lambda: {"GPU": there}
    )


def wanted(gpus: int | None, *nodes: dict) -> dict[str, int]:
    return ClusterPool(ray_of(*nodes), None, gpus)._wanted()


def test_a_worker_a_gpu_or_a_worker_a_machine():
    nodes = [node("head"), node("a", cpus=16, gpus=2), node("b", cpus=8, gpus=4), node("gone", gpus=9, alive=False)]
    assert wanted(None, *nodes) == {"a": 2, "b": 4}
    assert wanted(5, *nodes) == {"b": 4, "a": 1}
    assert wanted(0, *nodes) == {"a": 1, "b": 1}


def test_how_many_gpus_are_used():
    def used(gpus: int | None, there: int, address: str | None = "auto", settings: Settings = SETTINGS) -> int | None:
        return Cluster("/out", None, address, gpus)._gpus_of(ray_of(node("a", cpus=1, gpus=there)), settings)

    assert (used(None, 2), used(None, 0), used(2, 2), used(0, 2)) == (None, 0, 2, 0)
    assert used(None, 2, settings=replace(SETTINGS, device="cpu")) == 0
    with pytest.raises(BackendUnavailable, match="this machine has 1") as raised:
        used(2, 1, address=None)
    assert raised.value.reason == "no-such-device"


@pytest.fixture
def no_ray(monkeypatch):
    def missing(extra: str) -> None:
        raise RequirementUnmet("the package ray is not installed: python -m pip install 'ray>=2.60'")

    monkeypatch.setattr(connection, "check_requirements", missing)


def test_without_ray_the_message_says_what_to_install_and_how_to_do_without(no_ray):
    with pytest.raises(RequirementUnmet, match=r"pip install 'ray>=2.60'; without it, this process computes with"):
        connection.check_ray()


def test_several_gpus_need_ray_unless_one_is_named(no_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert not _has_several_gpus(replace(SETTINGS, device="cuda:0"))
    (tmp_path / "m.csv").write_text("id,location\na,absent\n", encoding="utf-8")
    with pytest.raises(RequirementUnmet, match="several GPUs"):
        cohort.main(["run", str(tmp_path / "m.csv"), "-o", str(tmp_path / "out")], standalone_mode=False)


@pytest.mark.parametrize("words", [["--address", "auto"], ["--gpus", "0"]])
def test_a_share_is_computed_without_ray(words, tmp_path):
    arguments = ["run", str(tmp_path / "m.csv"), "-o", str(tmp_path / "out"), "--part", "1/2", *words]
    with pytest.raises(SettingsInvalid) as raised:
        cohort.main(arguments, standalone_mode=False)
    assert raised.value.reason == "conflict"


def test_a_folder_of_a_killed_ray_is_removed_and_that_of_a_running_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(connection.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(connection, "_LONGEST", 400)
    killed = tmp_path / "ctflow-ray-killed"
    killed.mkdir()
    (killed / "lock").touch()
    with connection._temporary_folder() as first:
        assert not killed.exists()
        with connection._temporary_folder() as second:
            assert first.is_dir()
            assert second.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_ray_that_does_not_start_is_started_again_and_ends_by_name():
    calls = []

    def init(**options) -> None:
        calls.append(options)
        if len(calls) < ends_at:
            raise Exception("The current node timed out during startup.\nand more")

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    ends_at = 3
    connection._initialize(ray, {"address": "local"}, 3)
    assert len(calls) == 3
    ends_at = 99
    with pytest.raises(
        BackendUnavailable, match="does not start here: The current node timed out during startup.$"
    ) as raised:
        connection._initialize(ray, {"address": "local"}, 3)
    assert (raised.value.reason, len(calls)) == ("no-cluster", 6)
    with pytest.raises(BackendUnavailable, match="no Ray cluster answers"):
        connection._initialize(ray, {"address": "auto"}, 1)
    assert len(calls) == 7
