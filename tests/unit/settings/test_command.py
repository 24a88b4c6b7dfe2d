"""One command behind four entry points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ctflow.app.__main__ import main as run_application

from ctflow.cli.main import main as run_ctflow
from ctflow.cli.monai_deploy import main as run_monai_deploy
from ctflow.core.errors import SettingsInvalid
from ctflow.settings.command import Request, exit_code_of_command, flag_names, run_command
from ctflow.settings.run import OPTIONS, Paths, Settings


def asked(words: list[str]) -> Request:
    taken: list[Request] = []

    def take(request: Request) -> int:
        taken.append(request)
        return 6

    assert exit_code_of_command(run_command(take), words, "ctflow run") == 6
    return taken[0]


def test_every_entry_point_shows_the_same_help(capsys):
    shown = []
    for run, words in (
        (run_ctflow, ["run", "--help"]),
        (run_application, ["--help"]),
        (run_ctflow, ["exec", "--help"]),
        (run_monai_deploy, ["exec", "-h"]),
    ):
        assert run(words) == 0
        usage, _, rest = capsys.readouterr().out.partition("\n")
        shown.append((usage, rest))
    assert len({rest for _, rest in shown}) == 1
    assert [usage for usage, _ in shown] == [
        f"Usage: {program} [OPTIONS]"
        for program in ("ctflow run", "python app", "ctflow exec APP", "monai-deploy exec APP")
    ]
    assert all(f"  {option.flag}" in shown[0][1] for option in OPTIONS)


@pytest.mark.parametrize("words", [[], ["bench"], ["cohort"], ["node"], ["rules"]], ids=str)
def test_no_command_at_all_shows_the_commands(capsys, words):
    assert run_ctflow(words) == SettingsInvalid.exit_code
    shown = capsys.readouterr()
    help_text = shown.err or shown.out
    assert help_text.startswith(f"Usage: {' '.join(['ctflow', *words])} ")
    assert "SettingsInvalid" not in help_text
    assert "(see `" not in help_text


def test_the_help_groups_the_settings(capsys):
    assert run_ctflow(["run", "--help"]) == 0
    general, series, computed, written = re.split(
        r"\n(?:Which series|How they are segmented|What is written):\n", capsys.readouterr().out
    )
    assert "--input" in general
    assert "--help" in general
    assert all(flag in series for flag in ("--series UID", "--volume V", "--allow-gaps"))
    assert all(flag in computed for flag in ("--engine NAME", "--overlap F", "--cache DIR"))
    assert all(flag in written for flag in ("--report", "--for ohif", "--rtstruct-holes", "--nifti"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-flag"], "No such option"),
        (["--overlap"], "requires an argument"),
        (
            ["-i", "x", "-o", "y", "--seg", "bits"],
            "--seg: invalid choice 'bits' (choose from binary, labelmap, fractional)",
        ),
        (["-i", "x", "-o", "y", "-w", "nowhere"], "--workdir: cannot enter nowhere"),
        (["-o", "y"], "no input folder: give -i DIR or set HOLOSCAN_INPUT_PATH"),
    ],
)
def test_every_entry_point_says_the_same_of_wrong_usage(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    said = []
    for run, verb in ((run_ctflow, ["run"]), (run_application, [])):
        assert run([*verb, *words]) == SettingsInvalid.exit_code
        said.append(capsys.readouterr().err.replace("python app --help", "ctflow run --help"))
    assert message in said[0]
    assert said[0] == said[1]


def test_paths_settings_and_log_level_reach_the_function(monkeypatch, tmp_path):
    monkeypatch.delenv("CTFLOW_ENGINE")
    monkeypatch.setenv("CTFLOW_CACHE", "")
    request = asked(["-i", "x", "-o", "y", "-m", "b", "--force", "--seg", "labelmap", "-l", "error"])
    assert request == Request(
        Paths(Path("x"), Path("y"), Path("b")), Settings(force=True, seg="labelmap", cache=None), "ERROR"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    assert asked(["-i", "x", "-o", "y", "-w", "inner"]).paths == Paths(tmp_path / "x", tmp_path / "y", None)
    assert Path.cwd() == tmp_path / "inner"


def test_the_flags_without_a_value_are_those_of_the_switches():
    expected = {"-h", "--help", "--debug", *(option.flag for option in OPTIONS if not option.metavar)}
    assert flag_names(run_command(lambda _: 0)) == expected
