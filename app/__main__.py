"""`python app -i DIR -o DIR [-m MODEL]`: the application as a process, with ctflow's exit codes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctflow.app.interrupt import Interruption

# Before NumPy is imported: the threads of its OpenBLAS would take a signal, and Holoscan's handler end the process.
_INTERRUPTION = Interruption() if __name__ == "__main__" else None

from ctflow.compat.monai import import_lean
from ctflow.core.entry_point import exit_code_of, open_standard_streams
from ctflow.core.progress import Progress, startup
from ctflow.core.requirements import check_requirements
from ctflow.core.user import name_user
from ctflow.report.run_record import RunRecord, recorded_run
from ctflow.report.terminal import progress_on, say_error, say_report
from ctflow.settings.command import Request, exit_code_of_command, run_command

if TYPE_CHECKING:
    from ctflow.pipeline.run import RunReport


def main(argv: Sequence[str] | None = None) -> int:
    """Run the application.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    if argv is None:  # else it is somebody else's process
        open_standard_streams()
        import_lean()
        name_user()
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_code_of(
        lambda: exit_code_of_command(run_command(_run), words, "python app"), say=say_error, debug="--debug" in words
    )


def _run(request: Request) -> int:
    startup.begin()
    check_requirements("holoscan")
    interruption = _INTERRUPTION or Interruption()
    with recorded_run(request.paths.output) as record, progress_on(sys.stderr) as progress:
        interruption.check()
        report = _report(request, record, interruption.stops(progress))
    say_report(report.document, request.paths.output)
    return report.exit_code


def _report(request: Request, record: RunRecord, progress: Progress) -> RunReport:
    # Late: pydicom, and then torch, MONAI and Holoscan take seconds to import, which a usage error should not cost.
    from ctflow.bundle import demonstration_bundle, find_bundle  # noqa: PLC0415
    from ctflow.pipeline.overlap.cases import CasesOfRun  # noqa: PLC0415
    from ctflow.pipeline.run import begin_run  # noqa: PLC0415

    paths, settings = request.paths.absolute(), request.settings
    bundle = find_bundle(paths.model) if paths.model else demonstration_bundle()
    with CasesOfRun(settings, paths.output, progress) as cases:
        model, found = begin_run(bundle, paths.input, settings, cases, progress)
        from ctflow.app.application import CtflowApplication  # noqa: PLC0415
        from holoscan.logger import LogLevel, set_log_level  # noqa: PLC0415

        set_log_level(LogLevel.INFO if request.log_level in {"DEBUG", "INFO"} else LogLevel.OFF)
        application = CtflowApplication(
            paths=paths, model=model, settings=settings, cases=cases, progress=progress, found=found
        )
        record.describe = application.unfinished
        application.run()
        return application.report()


if __name__ == "__main__":
    sys.exit(main())
