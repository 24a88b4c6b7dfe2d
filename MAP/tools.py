#!/opt/ctflow/bin/python -I
"""/var/holoscan/tools, the entry point of the image: show, extract, env and help; anything else runs the application.

The application takes this process's place, so that its signals are its own and its exit code is the container's.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXPORT = Path("/var/run/holoscan/export")
EXIT_MACHINE, EXIT_OUTPUT, EXIT_USAGE = 4, 5, 64  # of ctflow's table

HELP = """\
usage: /var/holoscan/tools [WORD]

  (nothing)        segment /var/holoscan/input into /var/holoscan/output
  --OPTION ...     the same with options of the application (--help lists them)
  show [app|pkg]   print both manifests, or one as plain JSON
  extract          copy what is mounted for: /var/run/holoscan/export/{app,config,models,docs},
                   or all four into /var/run/holoscan/export
  env              print the environment
  help             print this
"""


class Failed(Exception):
    """What went wrong, and the exit code that says so."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def show(words: Sequence[str]) -> None:
    """Print the manifests: one as it is, both under headings."""
    if len(words) > 1 or not set(words) <= {"app", "pkg"}:
        raise Failed(EXIT_USAGE, f"show takes app or pkg, not {' '.join(words)}")
    if words:
        sys.stdout.write(_manifest(words[0]))
        return
    for name in ("app", "pkg"):
        sys.stdout.write(f"{f' {name}.json ':=^70}\n{_manifest(name)}\n")


def _manifest(name: str) -> str:
    path = Path(os.environ.get(f"HOLOSCAN_{name.upper()}_MANIFEST_PATH", f"/etc/holoscan/{name}.json"))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Failed(EXIT_MACHINE, f"{path} cannot be read: {error.strerror}") from error


def extract(export: Path = EXPORT) -> None:
    """Copy the parts of the package for which a folder is mounted; all of them where there is none but `export`."""
    if not export.is_dir():
        raise Failed(EXIT_USAGE, f"nothing is mounted at {export}: add -v FOLDER:{export}")
    parts = _parts()
    wanted = [name for name in parts if (export / name).is_dir()] or list(parts)
    for name in wanted:
        for source in parts[name]:
            try:
                _copy(source, export / name)
            except (OSError, shutil.Error) as error:
                reason = getattr(error, "strerror", None) or "some files cannot be copied"
                raise Failed(EXIT_OUTPUT, f"{export / name}: {reason}; may user {os.getuid()} write there?") from error
        sys.stdout.write(f"{name} is in {export / name}\n")


def _parts() -> dict[str, tuple[Path, ...]]:
    """The folders and files of each part; a folder stands for its content."""

    def at(variable: str, default: str) -> Path:
        return Path(os.environ.get(variable, default))

    return {
        "app": (at("HOLOSCAN_APPLICATION", "/opt/holoscan/app"),),
        "config": (
            at("HOLOSCAN_CONFIG_PATH", "/var/holoscan/app.yaml"),
            at("HOLOSCAN_APP_MANIFEST_PATH", "/etc/holoscan/app.json"),
            at("HOLOSCAN_PKG_MANIFEST_PATH", "/etc/holoscan/pkg.json"),
        ),
        "models": (at("HOLOSCAN_MODEL_PATH", "/opt/holoscan/models"),),
        "docs": (at("HOLOSCAN_DOCS", "/opt/holoscan/docs"),),
    }


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, copy_function=shutil.copyfile)
    else:
        shutil.copyfile(source, target / source.name)


def print_environment() -> None:
    """Print every variable, sorted."""
    sys.stdout.writelines(f"{name}={text}\n" for name, text in sorted(os.environ.items()))


def print_help() -> None:
    """Print the words."""
    sys.stdout.write(HELP)


def run(words: Sequence[str]) -> None:
    """Become the application."""
    command = shlex.split(json.loads(_manifest("app"))["command"])
    work = os.environ.get("HOLOSCAN_WORKDIR", "/var/holoscan")
    try:
        os.chdir(work)
        os.execvp(command[0], [*command, *words])  # noqa: S606  # without a shell, as meant
    except OSError as error:
        raise Failed(EXIT_MACHINE, f"cannot run {shlex.join(command)} in {work}: {error.strerror}") from error


def _dispatch(verb: str, rest: Sequence[str], words: Sequence[str]) -> None:
    alone: dict[str, Callable[[], object]] = {"extract": extract, "env": print_environment, "help": print_help}
    if verb == "show":
        show(rest)
    elif verb not in alone:
        run(words)
    elif rest:
        raise Failed(EXIT_USAGE, f"{verb} takes no words")
    else:
        alone[verb]()


def main(words: Sequence[str]) -> int:
    """Do what the first word says.

    Returns:
        0, or an exit code of ctflow's table; running the application never returns.
    """
    try:
        _dispatch(words[0] if words else "", words[1:], words)
    except Failed as failed:
        sys.stderr.write(f"tools: {failed}\n")
        return failed.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
