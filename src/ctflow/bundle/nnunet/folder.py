"""The files of a trained-model folder of nnU-Net, or of a zip of one, which is read without unpacking it.

A zip comes from anywhere. Nothing of it is ever written: three kinds of files are read, each bounded in size. A name
that leads out of the archive, a link, a name that occurs twice or an encrypted file makes the whole archive invalid,
because nnU-Net writes none of them.
"""

from __future__ import annotations

import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ctflow.bundle.config.documents import LARGEST_BYTES
from ctflow.core.errors import BundleInvalid

PLANS, DATASET, CHECKPOINT = "plans.json", "dataset.json", "checkpoint_final.pth"
# What may stand beside plans.json: a site's own facts, and steps of nnUNetv2_find_best_configuration that are wanted.
SIDECAR, POSTPROCESSING = "metadata.json", "postprocessing.json"
_DOCUMENTS = (PLANS, DATASET, SIDECAR, POSTPROCESSING)
_FOLD = re.compile(r"fold_([0-9]{1,3}|all)", re.ASCII)
_MOST_MEMBERS = 20_000
_LARGEST_CHECKPOINT = 2**33  # 8 GB; a ResidualEncoderUNet of 24 GB of GPU memory has 1.2 GB with its optimizer's state
_MOST_COMPRESSION, _OF_SMALL = 3, 50  # weights hardly shrink, except in networks of a few zeros; deflate reaches 1000
_SMALL = 2**24
_DAMAGES = (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
_ZIP = b"PK\x03\x04"


class TrainedFolder:
    """A trained-model folder, in a file system or a zip.

    Args:
        path: The folder, or the zip.

    Attributes:
        name: The folder's name.
        files: Paths inside the folder, of those that a model consists of.
        validated: Folders in it of a cross-validation that has found steps on labels.

    Raises:
        BundleInvalid: The zip is damaged or hostile, or holds no trained-model folder or several.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._prefix = path, ""
        try:
            if path.is_dir():
                self.name = path.resolve().name
                self.files = [*_DOCUMENTS, *(f"{fold.name}/{CHECKPOINT}" for fold in sorted(path.glob("fold_*")))]
                self.validated = [each.parent.name for each in sorted(path.glob(f"crossval_*/{POSTPROCESSING}"))]
                self.files = [name for name in self.files if (path / name).is_file()]
                return
            with zipfile.ZipFile(path) as archive:
                members = _checked(archive, path.name)
            if sum(member.compress_size for member in members) > path.stat().st_size:
                raise BundleInvalid(f"{path.name} has files that overlap: nnU-Net writes no such zip", reason="archive")
            names = [member.filename for member in members]
        except _DAMAGES as error:
            raise _unreadable(path.name, error) from None
        self._prefix = _only_folder(names, path.name)
        self.name = PurePosixPath(self._prefix).name or path.stem
        inside = [name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix)]
        self.files = [name for name in sorted(inside) if name in _DOCUMENTS or PurePosixPath(name).name == CHECKPOINT]
        self.validated = [str(PurePosixPath(name).parent) for name in inside if name.endswith(f"/{POSTPROCESSING}")]

    @property
    def folds(self) -> list[str]:
        """Folders with a finished checkpoint; that of all cases only where there is no other, as in nnU-Net."""
        found = [name.rpartition("/")[0] for name in self.files if name.endswith(f"/{CHECKPOINT}")]
        found = [name for name in found if _FOLD.fullmatch(name)]
        numbered = sorted((name for name in found if name != "fold_all"), key=lambda name: int(name.rpartition("_")[2]))
        return numbered or found

    def document(self, name: str) -> bytes:
        """The bytes of a JSON file.

        Raises:
            BundleInvalid: It is absent, too large, or cannot be read.
        """
        if name not in self.files:
            raise BundleInvalid(
                f"{name} is missing: a trained-model folder of nnU-Net has {DATASET}, {PLANS} and fold_*/{CHECKPOINT}",
                reason="missing-file",
            )
        with self.opened(name, LARGEST_BYTES) as stream:
            try:
                return stream.read()
            except OSError as error:
                raise _unreadable(name, error) from None

    @contextmanager
    def opened(self, name: str, largest: int = _LARGEST_CHECKPOINT) -> Iterator[BinaryIO]:
        """A file, open for reading at any position.

        Args:
            name: One of `files`.
            largest: Most bytes that it may have.

        Raises:
            BundleInvalid: It is larger, compressed as no honest file is, or cannot be read.
        """
        try:
            if self._path.is_dir():
                stream: BinaryIO = (self._path / name).open("rb")
                size = (self._path / name).stat().st_size
            else:
                stream, size = self._member(name, largest), 0
        except _DAMAGES as error:
            raise _unreadable(name, error) from None
        with stream:
            if size > largest:
                raise _too_large(name, largest)
            yield stream

    def _member(self, name: str, largest: int) -> BinaryIO:
        with zipfile.ZipFile(self._path) as archive:
            member = archive.getinfo(self._prefix + name)
            if member.file_size > largest:
                raise _too_large(name, largest)
            most = _OF_SMALL if member.file_size <= _SMALL else _MOST_COMPRESSION
            if largest == _LARGEST_CHECKPOINT and member.file_size > most * member.compress_size:
                raise BundleInvalid(
                    f"{name} is compressed more than {most} times, which weights never are", reason="archive"
                )
            with archive.open(member) as stream:
                return io.BytesIO(stream.read(member.file_size))


def is_trained_folder(path: Path) -> bool:
    """Whether a folder is one that nnU-Net trained: only these have a file called plans.json."""
    return (path / PLANS).is_file()


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip does."""
    with path.open("rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def _checked(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    members = archive.infolist()
    if len(members) > _MOST_MEMBERS:
        raise BundleInvalid(f"{name} holds {len(members)} files; a trained model has fewer", reason="archive")
    seen: set[str] = set()
    for member in members:
        problem = _problem(member)
        if member.filename in seen:
            problem = "occurs twice"
        if problem:
            raise BundleInvalid(
                f"{name}: {member.filename[:120]!r} {problem}: nnU-Net writes no such zip", reason="archive"
            )
        seen.add(member.filename)
    return members


def _problem(member: zipfile.ZipInfo) -> str:
    name = member.filename
    if name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in PurePosixPath(name).parts:
        return "leads out of the archive"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed in another format"
    return "is encrypted" if member.flag_bits & 0x1 else ""


def _only_folder(names: list[str], zip_name: str) -> str:
    """The prefix of the only trained-model folder of a zip."""
    found = sorted(name.removesuffix(PLANS) for name in names if PurePosixPath(name).name == PLANS)
    if len(found) == 1:
        return found[0]
    if not found:
        is_bundle = any(name.endswith("configs/metadata.json") for name in names)
        problem = "is a zip of a MONAI bundle: unpack it and give -m its folder"
        otherwise = f"holds no trained-model folder of nnU-Net: no {PLANS} in it"
        raise BundleInvalid(f"{zip_name} {problem if is_bundle else otherwise}", reason="no-bundle")
    listed = ", ".join(prefix.rstrip("/") or "." for prefix in found[:5])
    raise BundleInvalid(
        f"{zip_name} holds {len(found)} trained-model folders ({listed}): unpack it and name one of them with -m",
        reason="several-bundles",
    )


def _too_large(name: str, largest: int) -> BundleInvalid:
    return BundleInvalid(f"{name} is larger than {largest // 1_000_000} MB", reason="unreadable-file")


def _unreadable(name: str, error: Exception) -> BundleInvalid:
    what = error.strerror if isinstance(error, OSError) and error.strerror else "the zip is damaged"
    return BundleInvalid(f"{name} cannot be read: {what}", reason="unreadable-file")
