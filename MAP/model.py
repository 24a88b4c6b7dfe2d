"""The model of an image: its folder's name, and a copy of the files that it consists of.

Names come from a bundle's metadata.json or nnU-Net's plans.json, without anything that a path or manifest forbids.
Of what nnU-Net wrote only the model is copied: its folds also hold predictions of training cases, which are patients'
data.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LONGEST = 100  # characters of a name; the specification allows 128 bytes
_LARGEST = 2**33  # bytes of a file, as ctflow reads it
_OF_NNUNET = re.compile(
    r"(?:plans|dataset|metadata|postprocessing)\.json|fold_(?:[0-9]{1,3}|all)/checkpoint_final\.pth", re.ASCII
)
METADATA, PLANS = "configs/metadata.json", "plans.json"


class Refused(Exception):
    """What is no model, in one sentence."""


def name_of(path: Path) -> str:
    """The name of a model's folder in the image.

    Raises:
        Refused: It is no model.
    """
    if (path / METADATA).is_file():
        given = _object(METADATA, (path / METADATA).read_text).get("name", "")
    elif (path / PLANS).is_file():
        given = _object(PLANS, (path / PLANS).read_text).get("dataset_name", path.resolve().name)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            plans = _members(archive)[PLANS]
            given = _object(PLANS, lambda: archive.read(plans).decode()).get("dataset_name", path.stem)
    else:
        raise Refused(f"{path} has neither {METADATA} nor {PLANS}, and is no zip of a model that nnU-Net trained")
    return re.sub(r"[^a-z0-9]+", "_", str(given).lower()).strip("_")[:_LONGEST] or "model"


def copy(path: Path, target: Path) -> None:
    """Copy the files of a model, with their times.

    Args:
        path: A bundle's folder, or a model of nnU-Net as a folder or zip.
        target: The folder to make.

    Raises:
        Refused: It holds something that is no file.
    """
    if (path / METADATA).is_file():
        odd = [each for each in path.rglob("*") if each.is_symlink() or not (each.is_file() or each.is_dir())]
        if odd:
            raise Refused(f"{path} holds links or other things that are no files, such as {odd[0].name}")
        shutil.copytree(path, target)
    elif path.is_dir():
        found = [each for each in sorted(path.rglob("*")) if _OF_NNUNET.fullmatch(each.relative_to(path).as_posix())]
        if any(each.is_symlink() or each.parent.is_symlink() or not each.is_file() for each in found):
            raise Refused(f"{path} holds links or other things that are no files")
        for each in found:
            (target / each.relative_to(path)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(each, target / each.relative_to(path))
    else:
        with zipfile.ZipFile(path) as archive:
            for name, member in _members(archive).items():
                _unpack(archive, member, target / name)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The model's files in a zip, by their names in its folder."""
    plans = [
        each.filename for each in archive.infolist() if re.fullmatch(rf"(?:.*/)?{re.escape(PLANS)}", each.filename)
    ]
    if len(plans) != 1:
        raise Refused(f"{archive.filename} holds {len(plans)} folders with {PLANS}, not one model that nnU-Net trained")
    prefix = plans[0].removesuffix(PLANS)
    inside = [each for each in archive.infolist() if each.filename.startswith(prefix)]
    found = [each for each in inside if _OF_NNUNET.fullmatch(each.filename.removeprefix(prefix))]
    is_plain = all(stat.S_IFMT(each.external_attr >> 16) in (0, stat.S_IFREG) for each in found)
    members = {each.filename.removeprefix(prefix): each for each in found}
    if not is_plain or len(members) < len(found) or any(each.file_size > _LARGEST for each in found):
        raise Refused(f"{archive.filename} holds links, a file twice, or one that is too large")
    return members


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as copied:
        shutil.copyfileobj(source, copied)
    made = time.mktime((*member.date_time, 0, 0, -1))
    os.utime(target, (made, made))


def _object(name: str, read: Callable[[], str]) -> dict[str, Any]:
    try:
        document = json.loads(read())
    except (OSError, ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Refused(f"its {name} is damaged")
    return document


def main() -> int:
    """`name PATH` prints the name, `copy PATH TARGET` copies; 3 with the reason where PATH is no model."""
    verb, path = sys.argv[1], Path(sys.argv[2])
    try:
        if verb == "name":
            sys.stdout.write(name_of(path) + "\n")
        else:
            copy(path, Path(sys.argv[3]))
    except (Refused, OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        sys.stderr.write(f"MAP/build.sh: --model: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
