"""List the real CTs that the demonstration model is trained on and those held out to test it, and check them.

    python training/backgrounds.py FOLDER

Reports for every CT of backgrounds.json whether FOLDER holds it unchanged, and where to get the missing ones. The
files of a DICOM series are in FOLDER/<name>/, under any names; a NIfTI file is FOLDER/<name>.nii.gz. The CTs are not
part of this repository. Their licences require attribution: name the collection and its DOI.

Exit code 0: all are there and unchanged; 1: a CT is missing or differs; 2: backgrounds.json is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from ctflow.core.errors import CtflowError
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import require_selected, select_series

CATALOGUE = Path(__file__).with_suffix(".json")
# These licences allow training; non-commercial licences (CC BY-NC) do not suit a free model.
LICENCES = ("CC0 1.0", "CC BY 3.0", "CC BY 4.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MIT")
EVALUATION_ONLY = "LIDC-IDRI-0314"
USES = ("train", "validation", "held-out")
Use = Literal["train", "validation", "held-out"]
Box = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Lesion:
    """A lesion, which must not be taught as background.

    Attributes:
        what: Its kind, and who marked it.
        lps_mm: Two opposite corners of its bounding box, (x, y, z) in mm, the smaller coordinates first.
    """

    what: str
    lps_mm: Box


@dataclass(frozen=True)
class Background:
    """One CT of the catalogue.

    Attributes:
        name: Its folder (DICOM) or file (NIfTI, without the extension).
        patient: PatientID in the collection; one patient is either trained on or held out.
        collection: The collection that published it.
        licence: One of `LICENCES`.
        doi: Of the collection; empty if it has none.
        use: "train", "validation" (to select weights) or "held-out" (to evaluate them).
        repository: GitHub repository, owner/name, that holds the files.
        commit: The repository's commit that holds them.
        path: Folder or file in the repository; empty for the repository's root.
        series_uid: SeriesInstanceUID, to ignore other series in the same folder; empty for NIfTI.
        digest: SHA-256 of voxels and geometry, see `digest_of_volume`.
        lesions: Everything that a reader would call a lung tumour.
    """

    name: str
    patient: str
    collection: str
    licence: str
    doi: str
    use: Use
    repository: str
    commit: str
    path: str
    series_uid: str
    digest: str
    lesions: tuple[Lesion, ...]

    def path_in(self, folder: Path) -> Path:
        """The expected path of its files below `folder`."""
        return folder / self.name if self.series_uid else folder / f"{self.name}.nii.gz"

    @property
    def origin(self) -> str:
        """One sentence on its source and licence."""
        what = "the DICOM files" if self.series_uid else "the file"
        where = f"{self.path!r} in " if self.path else ""
        published = f"{self.collection}, {f'doi {self.doi}, ' if self.doi else ''}{self.licence}"
        return f"{what} of {where}https://github.com/{self.repository}/tree/{self.commit} ({published})"


def read_catalogue(path: Path = CATALOGUE) -> tuple[Background, ...]:
    """The CTs of a catalogue.

    Raises:
        ValueError: A licence does not allow training, a patient is both trained on and held out, a name occurs twice,
            or a CT is for evaluation alone.
    """
    backgrounds = tuple(_background_from_entry(entry) for entry in json.loads(path.read_text())["backgrounds"])
    uses: dict[str, str] = {}
    names: set[str] = set()
    for background in backgrounds:
        if background.name in names:
            raise ValueError(f"{path.name}: {background.name} occurs twice; give each CT a name of its own")
        names.add(background.name)
        if uses.setdefault(background.patient, background.use) != background.use:
            message = f"{path.name}: patient {background.patient} is both trained on and held out; choose one use"
            raise ValueError(message)
    return backgrounds


def _background_from_entry(entry: dict[str, Any]) -> Background:
    name = entry["name"]
    if entry["licence"] not in LICENCES:
        raise ValueError(f"{name}: its licence is {entry['licence']}, not one of {', '.join(LICENCES)}; remove it")
    if entry["use"] not in USES:
        raise ValueError(f'{name}: its use is {entry["use"]!r}; set "train", "validation" or "held-out"')
    if entry["patient"].upper() == EVALUATION_ONLY:
        raise ValueError(f"{name}: {EVALUATION_ONLY} is for evaluation alone; remove it")
    lesions = tuple(Lesion(lesion["what"], _box(lesion["lps_mm"])) for lesion in entry["lesions"])
    fields = {field: entry[field] for field in Background.__dataclass_fields__ if field != "lesions"}
    return Background(**fields, lesions=lesions)


def _box(corners: list[list[float]]) -> Box:
    (x, y, z), (far_x, far_y, far_z) = corners
    return (x, y, z), (far_x, far_y, far_z)


def digest_of_volume(volume: Volume) -> str:
    """SHA-256 of a CT's shape, affine (in steps of 0.001 mm) and HU: independent of file names and encoding."""
    digest = hashlib.sha256(np.array(volume.array.shape, dtype="<i8").tobytes())
    digest.update(np.rint(volume.geometry.affine_mm * 1000).astype("<i8").tobytes())
    for plane in volume.array:
        digest.update(np.ascontiguousarray(plane, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_background(background: Background, folder: Path) -> Volume:
    """Read a CT of the catalogue, whatever its digest.

    Raises:
        FileNotFoundError: It does not exist.
        CtflowError: The series cannot be read.
        ImageFileError: The NIfTI file cannot be read.
    """
    path = background.path_in(folder)
    if not path.exists():
        raise FileNotFoundError(path)
    if not background.series_uid:
        return _volume_from_nifti(path)
    scan = scan_folder(path)
    # Forced, since backgrounds may have any region and slice thickness.
    selection = select_series(scan, series_uid=background.series_uid, force=True)
    require_selected(selection, scan)
    return assemble_series(selection.selected[0].series).volume


def _volume_from_nifti(path: Path) -> Volume:
    image = nib.load(path)
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine
    values = np.asarray(image.dataobj).transpose(2, 1, 0)  # NIfTI's (i, j, k) are our (w, h, d)
    whole = np.rint(values)
    fits = np.array_equal(whole, values) and np.abs(whole).max() < 2**15
    array = np.ascontiguousarray(values, dtype=np.int16 if fits else np.float32)
    depth, height, width = array.shape
    return Volume(array, Geometry((depth, height, width), to_lps[:, [2, 1, 0, 3]]))


def checked_background(background: Background, folder: Path) -> Volume:
    """Read a CT of the catalogue from `folder`, and check its digest.

    Raises:
        ValueError: It is missing, unreadable or differs from the catalogue; the message says what to do.
    """
    path = background.path_in(folder)
    try:
        volume = read_background(background, folder)
    except FileNotFoundError:
        raise ValueError(f"missing; put {background.origin} to {path}") from None
    except (CtflowError, ImageFileError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"unreadable ({error}); replace {path} with {background.origin}") from error
    digest = digest_of_volume(volume)
    if digest != background.digest:
        found = f"digest {digest}, not {background.digest}"
        raise ValueError(f"differs from the catalogue ({found}); replace {path} with {background.origin}")
    return volume


def load_backgrounds(
    folder: Path, use: Use, catalogue: tuple[Background, ...] | None = None
) -> Iterator[tuple[Background, Volume]]:
    """Read every CT of one use, one at a time.

    Args:
        folder: Holds the CTs.
        use: "train", "validation" (to select weights) or "held-out" (to evaluate them).
        catalogue: All CTs; by default those of backgrounds.json.

    Yields:
        The entry, and the CT in HU with its LPS affine.

    Raises:
        ValueError: A CT is missing, unreadable or differs from the catalogue.
    """
    for background in read_catalogue() if catalogue is None else catalogue:
        if background.use != use:
            continue
        try:
            volume = checked_background(background, folder)
        except ValueError as error:
            raise ValueError(f"{background.name}: {error}") from error
        yield background, volume


def main() -> None:
    """Report on every CT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with the CTs")
    parser.add_argument(
        "--catalogue", type=Path, default=CATALOGUE, help="list of CTs (default: backgrounds.json beside this script)"
    )
    words = parser.parse_args()
    try:
        backgrounds = read_catalogue(words.catalogue)
    except (OSError, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    problems = 0
    for background in backgrounds:
        report = "there and unchanged"
        try:
            checked_background(background, words.folder)
        except ValueError as error:
            problems, report = problems + 1, str(error)
        print(f"{background.name} ({background.use}): {report}", flush=True)
    print(f"{len(backgrounds) - problems} of {len(backgrounds)} CTs are there and unchanged")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
