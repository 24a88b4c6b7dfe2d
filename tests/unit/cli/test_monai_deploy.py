from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ctflow.cli import monai_deploy
from ctflow.cli.monai_deploy import exec_application, main, owner_of_script
from ctflow.core.entry_point import interrupted_by_signals
from ctflow.core.errors import SettingsInvalid
from reasons import raises_reason

ECHO = """
import sys, pathlib
pathlib.Path(sys.argv[0]).parent.joinpath("args").write_text(" ".join(sys.argv[1:]))
sys.exit(6)
"""


@pytest.fixture
def application(tmp_path) -> Path:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "__main__.py").write_text(ECHO)
    return folder


def args_of(folder: Path) -> str:
    # `python app` sets argv[0] to the folder itself, `python app/x.py` to the file.
    return next(path.read_text() for path in (folder.parent / "args", folder / "args") if path.exists())


def test_exec_runs_the_folder_and_returns_its_exit_code(application):
    assert exec_application([str(application), "-i", "in", "-o", "out"]) == 6
    assert args_of(application) == "-i in -o out"


def test_the_application_may_stand_anywhere_among_the_options(application):
    assert main(["-l", "INFO", "exec", "-i", "in", "--force", str(application), "--output=out"]) == 6
    assert args_of(application) == "-i in --force --output=out -l INFO"


def test_a_file_runs_too(application):
    file = application / "other.py"
    file.write_text(ECHO)
    assert exec_application([str(file)]) == 6


WAITS = """
import pathlib, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
pathlib.Path(sys.argv[2]).touch()
signal.sigwait([signal.SIGTERM])
sys.exit(130)
"""


def test_sigterm_is_handed_on_to_the_application(application, tmp_path):
    (application / "__main__.py").write_text(WAITS)
    ready = tmp_path / "ready"

    def end() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=end, daemon=True).start()
    assert exec_application([str(application), "-i", str(ready)]) == 130
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_the_application_starts_leaves_no_orphan(application, monkeypatch):
    (application / "__main__.py").write_text("import time; time.sleep(60)")
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            os.kill(os.getpid(), signal.SIGTERM)  # before whoever starts it knows of it

    monkeypatch.setattr(monai_deploy.subprocess, "Popen", Interrupted)
    with interrupted_by_signals():
        assert exec_application([str(application)]) == 130
    assert started[0].poll() == -signal.SIGTERM


@pytest.mark.parametrize(("ended", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, 137)])
def test_an_application_that_a_signal_ends_has_the_exit_code_of_a_shell(application, ended, code):
    (application / "__main__.py").write_text(
        f"import os, signal; signal.signal({int(ended)}, signal.SIG_DFL) if {int(ended)} != 9 else None\n"
        f"os.kill(os.getpid(), {int(ended)})"
    )
    assert exec_application([str(application)]) == code


@pytest.mark.parametrize("words", [[], ["-i", "in"], ["no-such-app"], ["a", "b"]])
def test_no_single_application_is_a_usage_error(words):
    with raises_reason(SettingsInvalid, "no-application"):
        exec_application(words)
    assert main(["exec", *words]) == 64


def test_a_folder_without_main_is_refused(tmp_path):
    with raises_reason(SettingsInvalid, "no-application", names="__main__"):
        exec_application([str(tmp_path)])


def test_help_names_all_verbs(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("exec", "package", "run", "version"))


def test_other_verbs_reach_holoscan_cli(capfd):
    assert main(["version"]) == 0
    captured = capfd.readouterr()
    assert "4.2" in captured.out + captured.err


def test_an_unknown_verb_fails_as_holoscan_cli_says(capfd):
    assert main(["brew"]) == 2
    assert "brew" in capfd.readouterr().err


def test_without_holoscan_cli_the_verb_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(monai_deploy.importlib.util, "find_spec", lambda _: None)
    assert main(["package"]) == 4
    assert "holoscan-cli" in capsys.readouterr().err


def test_who_owns_the_script_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(monai_deploy.shutil, "which", lambda _: None)
    ours, sentence = owner_of_script()
    assert not ours
    assert "there is no" in sentence
    script = tmp_path / "monai-deploy"
    script.write_text("from ctflow.cli.monai_deploy import main")
    assert owner_of_script() == (True, "monai-deploy has the verb exec")
    script.write_text("from holoscan_cli.__main__ import main")
    ours, sentence = owner_of_script()
    assert not ours
    assert "pip install --force-reinstall --no-deps ctflow" in sentence
