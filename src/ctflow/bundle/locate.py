"""Locate the bundle."""

from __future__ import annotations

from pathlib import Path

import ctflow
from ctflow.bundle.nnunet.folder import is_trained_folder, is_zip
from ctflow.core.errors import BundleInvalid

INFERENCE = "configs/inference.json"
CONFIGURATIONS = (INFERENCE, "configs/inference.yaml", "configs/inference.yml")
METADATA = "configs/metadata.json"
WEIGHTS = "models/model.pt"
_SUFFIXES = (".json", ".yaml", ".yml")


def demonstration_bundle() -> Path:
    """The bundle shipped with ctflow: inside the package in a wheel, next to src in a checkout.

    Raises:
        BundleInvalid: Neither exists.
    """
    package = Path(ctflow.__file__).resolve().parent
    for folder in (package / "demonstration", package.parent.parent / "bundle"):
        if _is_bundle(folder):
            return folder
    raise BundleInvalid("this installation has no demonstration bundle: name a bundle with -m", reason="no-bundle")


def find_bundle(path: Path) -> Path:
    """Find the bundle at `path`.

    Args:
        path: A bundle's folder, a trained-model folder of nnU-Net or a zip of one, or a folder that holds exactly one
            of these.

    Raises:
        BundleInvalid: There is no bundle, or more than one; the message lists what was found.
    """
    try:
        if not path.exists():
            raise BundleInvalid(
                f"{path.name or path}: no such file or folder; -m takes the folder of a MONAI bundle, an nnU-Net model "
                "as a folder or zip, or a folder that contains one",
                reason="no-bundle",
            )
        if not path.is_dir() and is_zip(path):
            return path
        if not path.is_dir():
            raise BundleInvalid(
                f"{path.name} is a file and no zip: -m takes the folder of a MONAI bundle (a TorchScript file is read "
                "only as part of one), or an nnU-Net model as a folder or zip",
                reason="no-bundle",
            )
        if _is_bundle(path):
            return path
        inside = sorted(folder for folder in path.iterdir() if folder.is_dir())
        found = [folder for folder in inside if _is_bundle(folder)] or _zips_in(path)
    except OSError as error:
        raise BundleInvalid(f"{path.name or path} cannot be read: {error.strerror}", reason="no-bundle") from None
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(folder.name for folder in found[:5])
        raise BundleInvalid(
            f"{path.name or path} contains {len(found)} models ({names}): name one of them with -m",
            reason="several-bundles",
        )
    names = ", ".join(folder.name for folder in inside[:5]) or "no folders"
    raise BundleInvalid(
        f"{path.name or path} is no model and contains none: a MONAI bundle has {INFERENCE} and {METADATA}, a "
        f"folder that nnU-Net trained has plans.json; found {names}",
        reason="no-bundle",
    )


def _is_bundle(folder: Path) -> bool:
    # One of the two is enough to identify a bundle: read_bundle then names what is missing.
    return any((folder / name).is_file() for name in (*CONFIGURATIONS, METADATA)) or is_trained_folder(folder)


def _zips_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.zip")) if path.is_file() and is_zip(path)]


def is_of_nnunet(path: Path) -> bool:
    """Whether what `find_bundle` found is a trained-model folder of nnU-Net, or a zip of one."""
    return path.is_file() or is_trained_folder(path)


def configuration_files(folder: Path, given: str | None) -> list[str]:
    """The configuration's files, as paths inside the bundle.

    Args:
        folder: The bundle.
        given: Names of files in `configs` (or paths in the bundle) joined by commas, each overriding those before it;
            None takes inference.json or inference.yaml.

    Raises:
        BundleInvalid: A name is empty, leads out of the bundle or is not there; the message lists what is.
    """
    if given is None:
        return [next((name for name in CONFIGURATIONS if (folder / name).is_file()), INFERENCE)]
    found = []
    for word in given.split(","):
        names = [name for name in (f"configs/{word.strip()}", word.strip()) if _is_inside(folder, name)]
        if not names:
            have = sorted(path.name for path in folder.glob("configs/*") if path.suffix in _SUFFIXES)
            raise BundleInvalid(
                f"the bundle has no configuration {word.strip()[:80]!r}; it has {', '.join(have[:12]) or 'none'}",
                reason="missing-file",
            )
        found.append(names[0])
    return found


def _is_inside(folder: Path, name: str) -> bool:
    if not name.lower().endswith(_SUFFIXES) or "\0" in name:
        return False
    path = (folder / name).resolve()
    return path.is_relative_to(folder.resolve()) and path.is_file()
