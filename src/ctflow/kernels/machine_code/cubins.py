"""A file of compiled kernels: a ZIP archive with an index, the same bytes for the same kernels."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ctflow.core.errors import EngineMismatch
from ctflow.kernels.machine_code.forms import Cubin

_INDEX = "index.json"
_DATE = (1980, 1, 1, 0, 0, 0)


def write_cubins(cubins: Mapping[str, Cubin], path: Path) -> None:
    """Write compiled kernels.

    Args:
        cubins: By the keys of their forms.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    index = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, cubin in sorted(cubins.items()):
            index[key] = {name: value for name, value in asdict(cubin).items() if name != "code"}
            archive.writestr(_entry(f"{key}.cubin"), cubin.code)
        archive.writestr(_entry(_INDEX), json.dumps(index, indent=1, sort_keys=True))


def read_cubins(path: Path) -> dict[str, Cubin]:
    """The compiled kernels of a file, whose digest the engine store has checked, by the keys of their forms.

    Raises:
        EngineMismatch: It is not what `write_cubins` writes.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            index = json.loads(archive.read(_INDEX))
            return {key: Cubin(archive.read(f"{key}.cubin"), **fields) for key, fields in index.items()}
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        EOFError,
    ) as error:
        raise EngineMismatch(
            f"{path.parent.name}: no file of kernels ({type(error).__name__}); remove that folder and run "
            "`ctflow export --engine fused`",
            reason="stored-engine",
        ) from error


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _DATE)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry
