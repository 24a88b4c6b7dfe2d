"""A transform of labels -> its step, each argument checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ctflow.bundle.config import short
from ctflow.bundle.transforms import Transform
from ctflow.core.steps import FillHoles, FilterLabels, KeepLargest, LabelStep, MapLabels, RemoveSmall

LARGEST_LABEL = 255


def _labels(transform: Transform, name: str, value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    found = []
    for each in values:
        number = int(each) if isinstance(each, float) and each.is_integer() else each
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= LARGEST_LABEL:
            raise transform.refused(name, f"must be labels from 0 to {LARGEST_LABEL}, not {short(value)}")
        found.append(number)
    return tuple(found)


def _chosen(transform: Transform) -> tuple[int, ...] | None:
    value = transform.get("applied_labels", None)
    return None if value is None else _labels(transform, "applied_labels", value)


def _connectivity(transform: Transform) -> int:
    return 3 if transform.get("connectivity", None) is None else transform.integer("connectivity", 1, 3)


def _keep_largest(transform: Transform) -> KeepLargest:
    independent, count = transform.flag("independent", True), transform.integer("num_components", 1, 1000, 1)
    return KeepLargest(_chosen(transform), independent, _connectivity(transform), count)


def _remove_small(transform: Transform) -> RemoveSmall:
    in_mm3 = transform.flag("by_measure", False)
    least = transform.number("min_size", 64) if in_mm3 else transform.integer("min_size", 0, 10**9, 64)
    connectivity, independent = transform.integer("connectivity", 1, 3, 1), transform.flag("independent_channels", True)
    return RemoveSmall(least, connectivity, independent, in_mm3)


def _fill_holes(transform: Transform) -> FillHoles:
    labels = _chosen(transform)
    return FillHoles(labels or None, _connectivity(transform))  # MONAI takes no labels for all


def _filter(transform: Transform) -> FilterLabels:
    return FilterLabels(_labels(transform, "applied_labels", transform.get("applied_labels")))


def _map(transform: Transform) -> MapLabels:
    old = _labels(transform, "orig_labels", transform.get("orig_labels"))
    new = _labels(transform, "target_labels", transform.get("target_labels"))
    if len(old) != len(new) or len(set(old)) < len(old):
        raise transform.refused("target_labels", "must be one for each of orig_labels, and these different")
    pairs = dict(zip(old, new, strict=True))
    if pairs.pop(0, 0):
        raise transform.refused("orig_labels", "gives the background a label; ctflow keeps it as 0")
    return MapLabels(tuple(pairs.items()))


LABEL_MAKERS: Mapping[str, Callable[[Transform], LabelStep]] = {
    "KeepLargestConnectedComponentd": _keep_largest,
    "RemoveSmallObjectsd": _remove_small,
    "FillHolesd": _fill_holes,
    "LabelFilterd": _filter,
    "MapLabelValued": _map,
}
