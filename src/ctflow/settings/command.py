"""The command that segments a folder: one for `ctflow run`, `ctflow exec`, `monai-deploy exec` and `python app`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ctflow.core.entry_point import set_up_logging
from ctflow.core.errors import SettingsInvalid
from ctflow.settings.run import (
    OPTIONS,
    Option,
    Paths,
    Settings,
    paths_from_values,
    read_environment,
    settings_from_values,
)

Function = TypeVar("Function", bound=Callable[..., Any])
HELP = {"help_option_names": ["-h", "--help"]}
DEBUG = click.option("--debug", is_flag=True, help="Show the traceback of an unexpected error.")
LOG_LEVEL = click.option(
    "-l",
    "--log-level",
    type=click.Choice(["DEBUG", "INFO", "WARN", "ERROR", "CRITICAL"], case_sensitive=False),
    help="What is logged (default: WARN).",
)
MODEL = click.option(
    "-m",
    "--model",
    metavar="MODEL",
    help="The folder of a MONAI bundle, or an nnU-Net model as a folder or zip (default: the "
    "demonstration bundle).  [env: HOLOSCAN_MODEL_PATH]",
)


_OF_SERIES = ("series", "pick", "force", "volume", "allow_gaps")


class GroupedCommand(click.Command):
    """A command whose help tells settings by what they are about; a single list of 40 is hard to read."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options below their headings."""
        sections: dict[str, list[tuple[str, str]]] = {
            name: [] for name in ("Options", "Which series", "How they are segmented", "What is written")
        }
        headings = {option.name: _heading(option) for option in OPTIONS}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                sections[headings.get(parameter.name or "", "Options")].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def _heading(option: Option) -> str:
    if option.key.of_files:
        return "What is written"
    return "Which series" if option.name in _OF_SERIES else "How they are segmented"


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    paths: Paths
    settings: Settings
    log_level: str | None


def options(*names: str) -> Callable[[Function], Function]:
    """The settings of `ctflow.settings.run` as click options."""

    def decorate(function: Function) -> Function:
        for option in reversed([option for option in OPTIONS if option.name in names]):
            kind: dict[str, Any] = {"metavar": option.metavar} if option.metavar else {"is_flag": True}
            shown = f"{option.key.meaning}  [default: {option.default}]"
            function = click.option(option.flag, option.name, help=shown, **kind)(function)
        return function

    return decorate


def run_command(function: Callable[[Request], int]) -> click.Command:
    """The command `run`.

    Args:
        function: Segments; returns the exit code.
    """

    @click.command("run", cls=GroupedCommand, context_settings=HELP)
    @click.option("-i", "--input", metavar="DIR", help="Folder with DICOM files.  [env: HOLOSCAN_INPUT_PATH]")
    @click.option("-o", "--output", metavar="DIR", help="Gets one folder per series.  [env: HOLOSCAN_OUTPUT_PATH]")
    @MODEL
    @options(*(option.name for option in OPTIONS))
    @click.option("-w", "--workdir", metavar="DIR", help="Working directory of the process.")
    @LOG_LEVEL
    @DEBUG
    def run(log_level: str | None, debug: bool, workdir: str | None, **given: Any) -> int:
        """Segment every eligible CT series of a folder. Each option is also a variable: CTFLOW_SEG for --seg."""
        whole = click.get_current_context().find_root().params  # `ctflow -l INFO run`
        level = log_level or whole["log_level"]
        set_up_logging(level, debug=debug or whole["debug"])
        environment = read_environment()
        settings, paths = settings_from_values(given, environment), paths_from_values(given, environment)
        if workdir:
            paths = paths.absolute()
            _enter(Path(workdir))
        return function(Request(paths, settings, level))

    return run


def _enter(folder: Path) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise SettingsInvalid(f"--workdir: cannot enter {folder}: {error.strerror}", reason="missing-folder") from error


def flag_names(command: click.Command) -> frozenset[str]:
    """The flags of a command that take no value."""
    flags = (
        parameter.opts for parameter in command.params if isinstance(parameter, click.Option) and parameter.is_flag
    )
    return frozenset({"-h", "--help"}.union(*flags))


def exit_code_of_command(command: click.Command, words: Sequence[str], program: str) -> int:
    """Run a command.

    Args:
        command: Returns its exit code, or None for 0.
        words: Its arguments.
        program: What help and messages call it.

    Raises:
        SettingsInvalid: The words are wrong.
        KeyboardInterrupt: It was interrupted.
        CtflowError: What the command raises.
    """
    try:
        result = command.main(args=list(words), prog_name=program, standalone_mode=False)
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2 and later; earlier ones show the help themselves
            error.show()
            return SettingsInvalid.exit_code
        hint = f" (see `{error.ctx.command_path} --help`)" if error.ctx else ""
        raise SettingsInvalid(error.format_message() + hint, reason="usage") from error
    except click.Abort as error:  # what click makes of an interrupt
        raise KeyboardInterrupt from error
    return int(result or 0)
