"""Steps on labels that a cross-validation found, from the postprocessing.json of nnUNetv2_find_best_configuration.

`nnUNetv2_predict` does not apply them; `nnUNetv2_apply_postprocessing` is a command of its own. For ctflow, copy the
file from crossval_results_* to beside plans.json. The same steps in postprocessing.pkl are never read: it is code.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ctflow.bundle.config import short
from ctflow.bundle.config.documents import document_from_bytes
from ctflow.bundle.nnunet.folder import POSTPROCESSING, TrainedFolder
from ctflow.core.errors import BundleInvalid
from ctflow.core.steps import KeepLargest

_KEEP_LARGEST = "remove_all_but_largest_component_from_segmentation"
_MOST = 256


def steps_of_folder(folder: TrainedFolder, labels: Collection[int]) -> tuple[tuple[KeepLargest, ...], tuple[str, ...]]:
    """The steps beside plans.json, and what to note of those that are not there.

    Args:
        folder: The model's.
        labels: The values of its segments.

    Raises:
        BundleInvalid: The file is damaged, or names a step or labels that ctflow does not know.

    Source: nnU-Net 2.8.1 `determine_postprocessing`; components touch at corners, as in `skimage.measure.label`.
    """
    if POSTPROCESSING not in folder.files:
        found = folder.validated
        return (), (
            f"{found[0]}/{POSTPROCESSING} is not applied: copy it beside plans.json to apply it",
        ) if found else ()
    document = document_from_bytes(folder.document(POSTPROCESSING), POSTPROCESSING)
    names, arguments = document.get("postprocessing_fns"), document.get("postprocessing_kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not len(names) == len(arguments) <= _MOST:
        raise _invalid("must list postprocessing_fns and as many postprocessing_kwargs", "value")
    steps = tuple(_step(name, given, labels) for name, given in zip(names, arguments, strict=True))
    return steps, (f"{POSTPROCESSING}: {len(steps)} steps keep the largest component of labels",) if steps else ()


def _step(name: Any, given: Any, labels: Collection[int]) -> KeepLargest:
    if name != _KEEP_LARGEST:
        raise _invalid(f"names {short(name)}; ctflow knows {_KEEP_LARGEST}", "target")
    if not isinstance(given, dict) or given.keys() - {"labels_or_regions", "background_label"}:
        raise _invalid(f"gives {_KEEP_LARGEST} the arguments {short(given)}", "argument")
    named = given.get("labels_or_regions")
    found = [value for each in (named if isinstance(named, list) else [named]) for value in _values(each)]
    if not found or given.get("background_label", 0) != 0 or not all(type(value) is int for value in found):
        raise _invalid(f"gives {_KEEP_LARGEST} {short(given)}, not labels", "value")
    # A region also names labels that others paint over, which no voxel has.
    return KeepLargest(tuple(sorted({*found} & {*labels})), independent=False, connectivity=3, count=1)


def _values(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]


def _invalid(problem: str, reason: str) -> BundleInvalid:
    return BundleInvalid(f"{POSTPROCESSING} {problem}", reason=reason)
