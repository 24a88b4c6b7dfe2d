"""The installed packages: their versions against those in ctflow's metadata, and byte code where it is missing."""

from __future__ import annotations

import compileall
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from ctflow.core.errors import RequirementUnmet


def check_requirements(extra: str = "") -> None:
    """Stop if a package that ctflow needs is absent or has another version, before an import fails.

    Code that runs from a folder without metadata (PYTHONPATH) names no versions, and nothing is checked.

    Args:
        extra: The extra whose packages are also needed.

    Raises:
        RequirementUnmet: The message names each package, the version found, the versions needed and the command.
    """
    found = [_problem(each) for each in _requirements(extra)]
    problems = [problem for problem in found if problem]
    if problems:
        wanted = " ".join(f"'{each}'" for each, problem in zip(_requirements(extra), found, strict=True) if problem)
        raise RequirementUnmet(f"{'; '.join(problems)}: python -m pip install {wanted.replace(' ;', ';')}")


def version_problem(extra: str) -> str:
    """The faults of an extra's installed packages, and what to do; empty if there are none."""
    own = [each for each in _requirements(extra) if each not in _requirements("")]
    problems = [problem for each in own if _installed(each.name) and (problem := _problem(each))]
    return f"{'; '.join(problems)}: python -m pip install 'ctflow[{extra}]'" if problems else ""


@cache
def _requirements(extra: str) -> tuple[Requirement, ...]:
    return tuple(_bare(each) for each in _all_requirements() if each.marker is None or _wanted(each, extra))


def _wanted(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _bare(requirement: Requirement) -> Requirement:
    """A requirement without its marker, for a command on this machine."""
    return Requirement(f"{requirement.name}{requirement.specifier}")


def _all_requirements() -> Iterator[Requirement]:
    try:
        lines = requires("ctflow") or []
    except PackageNotFoundError:
        return
    yield from map(Requirement, lines)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _problem(requirement: Requirement) -> str:
    found = _installed(requirement.name)
    needed = f"ctflow needs {requirement.name} {requirement.specifier}".rstrip()
    if not found:
        return f"the package {requirement.name} is not installed, and {needed}"
    return "" if _fits(found, requirement) else f"{requirement.name} {found} is installed, and {needed}"


def _fits(found: str, requirement: Requirement) -> bool:
    try:
        # Other builds append to a version ("2.13.0+cpu", "2.12.0a0+nv25.10"): the release decides.
        return requirement.specifier.contains(Version(found).base_version, prereleases=True)
    except InvalidVersion:
        return False


def compile_imported() -> tuple[int, int]:
    """Compile every imported module that has no byte code file.

    Python itself writes none where PYTHONDONTWRITEBYTECODE is set, and pip none with --no-compile: torch alone then
    takes 2 s longer to import, each time.

    Returns:
        How many modules were compiled, and of how many the byte code could not be written.
    """
    compiled = failed = 0
    for module in [each for each in sys.modules.values() if isinstance(each, ModuleType)]:
        spec = vars(module).get("__spec__")
        source, target = (getattr(spec, name, None) for name in ("origin", "cached"))
        if not source or not target or not source.endswith(".py") or Path(target).exists():
            continue
        compileall.compile_file(source, quiet=2)
        if Path(target).exists():
            compiled += 1
        else:
            failed += 1
    return compiled, failed
