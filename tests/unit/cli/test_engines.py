from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ctflow.cli.engines import engines_document
from ctflow.cli.main import main
from ctflow.engines.registry import BACKENDS
from ctflow.engines.store.store import EngineKey, EngineStore

PLAN = EngineKey(
    kind="plan", version="tensorrt 8.5.3.1", rewrite=1, weights_digest="0123456789ab" + "d" * 52, network="SwinUNETR",
    arguments={"feature_size": 12}, head="difference", roi=(96, 96, 96), batch_range=(1, 8), precision="fp16",
    device="NVIDIA H200, compute capability 9.0, driver 580.159.04",
)  # fmt: skip
EAGER = {"backend": "eager", "precision": "fp32"}
MEASURED = [{**EAGER, "window_seconds": 2.5}, {"backend": "openvino", "precision": "fp32", "window_seconds": None}]
FOR = {"model": "Spleen 1.2", "device": "NVIDIA H200, compute capability 9.0, driver 580.1"}
CHOICE = {"format": 2, **EAGER, "measured": MEASURED}


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def put(cache: Path, **change) -> Path:
    return EngineStore(cache).put(replace(PLAN, **change), lambda path: path.write_bytes(b"x" * 1_500_000))


def write_choice(cache: Path, text: str, name: str = "choice-0.json") -> Path:
    cache.mkdir(exist_ok=True)
    (cache / name).write_text(text)
    return cache / name


def test_the_backends_are_told_as_before(cache, capsys):
    assert main(["engines", "--json", "--cache", str(cache)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [backend["name"] for backend in document["backends"]] == list(BACKENDS)
    assert all(backend.keys() == {"name", "available", "reason"} for backend in document["backends"])
    assert document["monai_deploy"].keys() == {"has_exec", "reason"}
    assert document["cache"] == {"folder": str(cache), "problem": None}
    assert (document["engines"], document["choices"]) == ([], [])
    assert not cache.exists(), "looking makes nothing"


def test_a_stored_engine_is_told_with_its_key(cache, capsys):
    path = put(cache)
    assert main(["engines", "--json", "--cache", str(cache)]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["name"] == path.parent.name
    assert (engine["state"], engine["reason"]) == ("ready", None)
    assert engine["bytes"] == 1_500_000 + (path.parent / "manifest.json").stat().st_size
    for name in ("kind", "version", "rewrite", "network", "weights_digest", "head", "precision", "device"):
        assert engine[name] == getattr(PLAN, name)
    assert (engine["roi"], engine["batch_range"]) == ([96, 96, 96], [1, 8])
    assert engine["made"].endswith("+00:00")


def test_the_lines_name_all_that_a_person_asks(cache, capsys):
    path = put(cache)
    write_choice(cache, json.dumps(CHOICE))
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        f"engines in {cache}",
        f"{path.parent.name}  ready           1.5 MB  20",
        "plan in fp16, windows of 96 x 96 x 96, batch 1 to 8, SwinUNETR 0123456789ab\n",
        f"for {PLAN.device}\n",
        "by tensorrt 8.5.3.1\n",
        "choice-0 ",
        "eager fp32  2.500 s per window",
    ):
        assert expected in shown
    assert "remove" not in shown


def test_a_choice_says_for_which_model_and_device_and_when(cache, capsys):
    write_choice(cache, json.dumps({**CHOICE, **FOR}))
    (choice,) = engines_document(cache)["choices"]
    assert {name: choice[name] for name in FOR} == FOR
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    assert f"eager fp32  2.500 s per window  {choice['made'][:10]}" in shown
    for text in FOR.values():
        assert f"for {text}\n" in shown


def test_what_came_with_the_installation_is_listed(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ctflow.cli.engines.INSTALLED", tmp_path / "made")
    path = put(tmp_path / "made")
    (engine,) = engines_document(cache)["installed"]
    assert (engine["name"], engine["state"]) == (path.parent.name, "ready")
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("engines that came with the installation") < shown.index(path.parent.name)
    assert f"no engines in {cache}" in shown


def test_the_folder_may_come_from_the_environment(cache, capsys, monkeypatch):
    put(cache)
    monkeypatch.setenv("CTFLOW_CACHE", str(cache))
    assert main(["engines"]) == 0
    assert f"engines in {cache}" in capsys.readouterr().out


def test_without_engines_it_is_said_how_to_make_one(cache, capsys):
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    assert f"no engines in {cache}" in shown
    assert "ctflow export" in shown


def test_without_a_folder_it_is_said_how_to_give_one(capsys):
    assert main(["engines", "--cache", ""]) == 0
    assert "--cache DIR or set CTFLOW_CACHE" in capsys.readouterr().out
    assert engines_document(None)["cache"] == {"folder": None, "problem": None}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["engines", "--cache", str(tmp_path / "file")]) == 0
    assert "it cannot be read (Not a directory)" in capsys.readouterr().out


def test_what_is_damaged_is_listed_beside_what_is_whole(cache, capsys):
    put(cache)
    put(cache, precision="fp32").write_bytes(b"")
    (put(cache, roi=(64, 64, 64)).parent / "manifest.json").unlink()
    (cache / f"onnx-{'0' * 32}").write_text("a file")
    (cache / f".{PLAN.name}.abcd1234").mkdir()
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "ready", "damaged", "foreign", "left over", "engine.plan is not the file that was stored",
        "it is not a folder", "manifest.json cannot be read (FileNotFoundError)",
        "remove what is damaged or foreign, and run `ctflow export`",
    ):  # fmt: skip
        assert expected in shown


def test_a_stored_key_cannot_write_to_the_terminal(cache, capsys):
    put(cache, device="\x1b[2J\u202e[bold]" + "y" * 5000, network="\ud800")
    put(cache, roi=(10**400, 1, 1))
    (put(cache, rewrite=2).parent / "manifest.json").touch()
    os.utime(cache / replace(PLAN, rewrite=2).name / "manifest.json", (1e15, 1e15))
    assert main(["engines", "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "for ?[2J?[bold]yyy" in shown
    assert len(shown) < 4000
    assert main(["engines", "--json", "--cache", str(cache)]) == 0
    assert len(json.loads(capsys.readouterr().out)["engines"]) == 3


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "[" * 100_000, '{"format": 1, "backend": "eager"}',
        json.dumps({**CHOICE, "backend": "abacus"}), json.dumps({**CHOICE, "backend": ["eager"]}),
        json.dumps({**CHOICE, "measured": [3]}), json.dumps({**CHOICE, "measured": {"a": 1}}),
        json.dumps({**CHOICE, "measured": [{**EAGER, "window_seconds": "soon"}]}),
        json.dumps({**CHOICE, "measured": [{**EAGER, "window_seconds": float("nan")}]}),
        json.dumps({**CHOICE, "measured": [{**EAGER, "backend": ["eager"], "window_seconds": 1.0}]}),
        json.dumps({**CHOICE, "precision": "fp64"}), json.dumps({**CHOICE, "measured": [{"backend": "eager"}]}),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_damaged_choice_is_listed_as_such(cache, text, capsys):
    write_choice(cache, text)
    (choice,) = engines_document(cache)["choices"]
    assert (choice["name"], choice["state"], choice["backend"]) == ("choice-0", "damaged", None)
    assert choice["reason"]
    assert main(["engines", "--cache", str(cache)]) == 0
    assert "damaged: it " in capsys.readouterr().out


def test_choices_are_told_with_their_times(cache):
    write_choice(cache, json.dumps(CHOICE))
    (cache / "choice-1.json").symlink_to("choice-0.json")
    (cache / "choice-2.json").mkdir()
    first, *others = engines_document(cache)["choices"]
    assert first["backend"] == "eager"
    assert first["window_seconds"] == {"eager fp32": 2.5, "openvino fp32": None}
    assert first["made"].endswith("+00:00")
    assert [other["state"] for other in others] == ["damaged", "damaged"]
