"""Print this interpreter's version (`3.12`), or one line that says why ctflow cannot be installed with it.

Runs on any Python from 2.7, so that the reason is seen and not a traceback.
"""

import platform
import sys
import sysconfig

OLDEST, NEWEST = (3, 11), (3, 13)
GLIBC = (2, 35)  # of Holoscan's wheels
LIBRARY = "install the library alone: pip install . (docs/install.md)"
ANOTHER = (
    "ctflow needs Python {}.{} to {}.{}: install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv), "
    "or name one: make PYTHON=/path/to/python3.12".format(*(OLDEST + NEWEST))
)


def problem(version, system="Linux", machine="x86_64", glibc=GLIBC, missing=(), bits=64, free_threaded=False):
    """What keeps an interpreter from running everything, and what to do, in one line; empty where nothing does.

    Args:
        version: (major, minor) of the interpreter.
        system: As `platform.system()` says.
        machine: As `platform.machine()` says.
        glibc: (major, minor) of the C library, or () where it is another one.
        missing: Modules of the standard library that this installation lacks.
        bits: Width of a pointer.
        free_threaded: Whether it is a build without the global lock, for which many packages have no wheel.
    """
    name = "Python {}.{}".format(*version)
    if version > NEWEST:
        return "{} is too new, Holoscan's wheels end at {}.{}; ".format(name, *NEWEST) + ANOTHER
    if version < OLDEST:
        return name + " is too old; " + ANOTHER
    if bits != 64 or free_threaded:
        kind = "a 32-bit build" if bits != 64 else "a free-threaded build"
        return "{} is {}, and many packages have no wheel for it; {}".format(name, kind, ANOTHER)
    if (system, machine) != ("Linux", "x86_64"):
        return "make installs the Holoscan application, for Linux on x86_64; on {} {} {}".format(
            system, machine, LIBRARY
        )
    if glibc < GLIBC:
        found = "glibc {}.{}".format(*glibc) if glibc else "another C library"
        return (
            "Holoscan's wheels need glibc {}.{} (Debian 12, Ubuntu 22.04), here is {}; ".format(*(GLIBC + (found,)))
            + LIBRARY
        )
    if missing:
        lacks = "{} lacks the module {}, which Debian and Ubuntu split off: ".format(name, " and ".join(missing))
        return lacks + "apt-get install python{}.{}-venv".format(*version)
    return ""


def _missing():
    missing = []
    for name in ("venv", "ensurepip"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    return missing


def main():
    """Print and return the exit code: 1 where something is wrong."""
    name, version = platform.libc_ver()
    found = problem(
        sys.version_info[:2],
        platform.system(),
        platform.machine(),
        tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else (),
        _missing(),
        64 if sys.maxsize > 2**32 else 32,
        bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    )
    sys.stdout.write((found or "{}.{}".format(*sys.version_info[:2])) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
