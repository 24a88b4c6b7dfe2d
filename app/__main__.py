"""`python app -i DIR -o DIR [-m BUNDLE]`: the application as a process, with ctflow's exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ctflow.app.interrupt import Interruption

# Before NumPy is imported: the threads of its OpenBLAS would take a signal, and Holoscan's handler end the process.
_INTERRUPTION = Interruption() if __name__ == "__main__" else None

from ctflow.core.entry_point import exit_code_of, set_up_logging
from ctflow.core.errors import SettingsInvalid
from ctflow.core.progress import Progress
from ctflow.core.requirements import check_requirements
from ctflow.core.user import name_user
from ctflow.report.run_record import RunRecord, recorded_run
from ctflow.report.terminal import progress_on, say_error, say_report
from ctflow.settings.run import OPTIONS, Paths, Settings, paths_from_values, read_environment, settings_from_values

if TYPE_CHECKING:
    from ctflow.pipeline.run import RunReport


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsInvalid(f"{message}; --help lists the options", reason="usage")


def parser_of_application() -> argparse.ArgumentParser:
    """The options of `monai-deploy exec`, and ctflow's own."""
    parser = _Parser(prog="python app", description="Segment every CT series of a folder.", allow_abbrev=False)
    parser.add_argument("-i", "--input", metavar="DIR", help="folder with DICOM files")
    parser.add_argument("-o", "--output", metavar="DIR", help="gets one folder a series")
    parser.add_argument("-m", "--model", metavar="BUNDLE", help="MONAI bundle (default: the demonstration bundle)")
    parser.add_argument("-w", "--workdir", metavar="DIR", help="working directory of the process")
    parser.add_argument(
        "-l",
        "--log-level",
        type=str.upper,
        choices=["DEBUG", "INFO", "WARN", "ERROR", "CRITICAL"],
        help="what is logged (default: WARN)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    for option in OPTIONS:
        if option.switch:
            parser.add_argument(option.flag, action="store_true", help=option.help)
        else:
            parser.add_argument(option.flag, metavar=option.metavar, help=option.help)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the application.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    if argv is None:  # else it is somebody else's process
        name_user()
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(lambda: _run(words), say=say_error, debug="--debug" in words)


def _run(words: list[str]) -> int:
    given = vars(parser_of_application().parse_args(words))
    environment = read_environment()
    settings = settings_from_values(given, environment)
    paths = _absolute(paths_from_values(given, environment))
    set_up_logging(given["log_level"], debug=given["debug"])
    check_requirements("holoscan")
    if given["workdir"]:
        _enter(Path(given["workdir"]))
    return _run_graph(paths, settings, quiet=given["log_level"] not in {"DEBUG", "INFO"})


def _absolute(paths: Paths) -> Paths:
    model = paths.model.absolute() if paths.model else None
    return Paths(paths.input.absolute(), paths.output.absolute(), model)


def _enter(folder: Path) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise SettingsInvalid(f"--workdir: cannot enter {folder}: {error.strerror}", reason="missing-folder") from error


def _run_graph(paths: Paths, settings: Settings, *, quiet: bool) -> int:
    interruption = _INTERRUPTION or Interruption()
    with recorded_run(paths.output) as record, progress_on(sys.stderr) as progress:
        interruption.check()
        report = _report(paths, settings, record, interruption.stops(progress), quiet=quiet)
    say_report(report.document, paths.output)
    return report.exit_code


def _report(paths: Paths, settings: Settings, record: RunRecord, progress: Progress, *, quiet: bool) -> RunReport:
    # Late: importing torch, MONAI and Holoscan takes seconds, which a usage error should not cost.
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415
    from ctflow.pipeline.run import announce  # noqa: PLC0415

    model = read_bundle(find_bundle(paths.model) if paths.model else demonstration_bundle())
    announce(model)
    from ctflow.app.application import CtflowApplication  # noqa: PLC0415
    from holoscan.logger import LogLevel, set_log_level  # noqa: PLC0415

    set_log_level(LogLevel.OFF if quiet else LogLevel.INFO)
    application = CtflowApplication(paths=paths, model=model, settings=settings, progress=progress)
    record.describe = application.unfinished
    application.run()
    return application.report()


if __name__ == "__main__":
    sys.exit(main())
