"""`monai-deploy`: adds the verb `exec`, and passes every other verb on to holoscan-cli."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ctflow.core.entry_point import exit_code_of
from ctflow.core.errors import EXIT_INTERRUPTED, BackendUnavailable, SettingsInvalid
from ctflow.report.terminal import say_error
from ctflow.settings.command import exit_code_of_command, flag_names, run_command

REPAIR = "pip install --force-reinstall --no-deps ctflow"
_HELP = """\
usage: monai-deploy exec APP [OPTIONS]   (exec --help lists them)
       monai-deploy {package,run,version,nics} ...   (holoscan-cli)

exec runs the application in the folder or file APP as a process of its own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code: the application's for `exec`, holoscan-cli's for other verbs.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _dispatch(words), say=say_error)


def _dispatch(words: list[str]) -> int:
    # holoscan-cli takes -l LEVEL before the verb; so does exec.
    before = words[:2] if words[:1] in (["-l"], ["--log-level"]) else []
    rest = words[len(before) :]
    if rest[:1] == ["exec"]:
        return exec_application([*rest[1:], *before])
    if words in ([], ["-h"], ["--help"]):
        sys.stdout.write(_HELP)
        return 0
    if importlib.util.find_spec("holoscan_cli") is None:
        raise BackendUnavailable(
            f"the verb {rest[0] if rest else ''!r} is holoscan-cli's: pip install 'holoscan-cli==4.2.*'",
            reason="not-installed",
        )
    program = "import sys; sys.argv[0] = 'monai-deploy'; from holoscan_cli.__main__ import main; sys.exit(main())"
    return _exit_code(subprocess.run([sys.executable, "-c", program, *words], check=False).returncode)


def exec_application(words: Sequence[str], program: str = "monai-deploy exec") -> int:
    """Run an application's folder or file in a process of its own and return its exit code.

    Args:
        words: Options and, anywhere among them, the application's path (as the App SDK's `exec` took them).
        program: What the help calls it.

    Raises:
        SettingsInvalid: No application is named, or it is not there.
    """
    if words and set(words) <= {"-h", "--help"}:
        return exit_code_of_command(_COMMAND, words, f"{program} APP")
    application, options = _split(words)
    with _handing_on_sigterm() as hand_on_to, subprocess.Popen([sys.executable, str(application), *options]) as process:
        hand_on_to(process)
        while True:
            try:
                return _exit_code(process.wait())
            except KeyboardInterrupt:
                continue  # the terminal told the application too: it cleans up and ends with 130


def _exit_code(ended: int) -> int:
    """As a shell has it where a signal ended the process: -9 would leave here as 247."""
    if ended in (-signal.SIGINT, -signal.SIGTERM):  # before the application could catch it
        return EXIT_INTERRUPTED
    return ended if ended >= 0 else 128 - ended


@contextmanager
def _handing_on_sigterm() -> Iterator[Callable[[subprocess.Popen[bytes]], None]]:
    """A terminal's interrupt also reaches the application; SIGTERM reaches only the process that it is sent to.

    Yields:
        Takes the process once it has started; a signal that came before is then handed on.
    """
    started: list[subprocess.Popen[bytes]] = []
    came = threading.Event()

    def hand_on(*_: object) -> None:
        came.set()
        for process in started:
            process.terminate()

    def take(process: subprocess.Popen[bytes]) -> None:
        started.append(process)
        if came.is_set():
            process.terminate()

    if threading.current_thread() is not threading.main_thread():  # Python handles signals nowhere else
        yield take
        return
    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        yield take
    finally:
        signal.signal(signal.SIGTERM, before)


def _split(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The one word that is neither a flag nor a flag's value, and the rest."""
    options: list[str] = []
    applications: list[str] = []
    takes_value = False
    for word in words:
        if takes_value or word.startswith("-"):
            takes_value = word.startswith("-") and not takes_value and "=" not in word and word not in _SWITCHES
            options.append(word)
        else:
            applications.append(word)
    if len(applications) != 1:
        found = f"found {len(applications)}" if applications else "found none"
        raise SettingsInvalid(
            f"exec needs one application folder or file, {found}: exec app -i DIR -o OUT", reason="no-application"
        )
    path, is_there = Path(applications[0]), False
    with suppress(OSError):  # a folder above it that may not be entered, a name that is too long
        is_there = (path / "__main__.py").is_file() or path.is_file()
    if not is_there:
        raise SettingsInvalid(
            f"exec: {path} is neither a Python file nor a folder with a __main__.py", reason="no-application"
        )
    return path, options


_COMMAND = run_command(lambda _: 0)  # the application has one with the same options
_SWITCHES = flag_names(_COMMAND)


def owner_of_script() -> tuple[bool, str]:
    """Whether the `monai-deploy` beside this Python is ctflow's.

    Returns:
        Whether it is, and a sentence that says how to repair it where it is not.
    """
    name = "monai-deploy"
    beside = Path(sys.executable).parent / name
    script = beside if beside.is_file() else Path(shutil.which(name) or os.devnull)
    if not script.is_file():
        return False, f"there is no {name} command next to this Python; repair: {REPAIR}"
    if "ctflow.cli.monai_deploy" in script.read_text(encoding="utf-8", errors="replace"):
        return True, f"{name} has the verb exec"
    return False, f"holoscan-cli has replaced the command {name}, so it lacks the verb exec; repair: {REPAIR}"
