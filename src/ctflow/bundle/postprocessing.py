"""The bundle's transforms after the network -> how logits become labels."""

from __future__ import annotations

from ctflow.bundle.config import Config, ConfigValue, short
from ctflow.bundle.expressions.interpreter import sole_reference
from ctflow.bundle.signatures import FLOAT32, HELD, INTEGERS, POST
from ctflow.bundle.transforms import IMAGE, PREDICTION, Transform, check_held, transforms_from_config
from ctflow.core.model import Activation

_ORDER = ("Activationsd", "Invertd", "AsDiscreted")
_NEVER = frozenset({"LoadImaged", "EnsureChannelFirstd"})
_AT_THE_END = frozenset({"FromMetaTensord", "ToMetaTensord", "ToTensord"})  # earlier, MONAI would lose the geometry


def activation_from_config(config: Config) -> tuple[Activation, float | None]:
    """Read `postprocessing`: the activation, and the threshold or None for the argmax.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: Not Activationsd, Invertd, AsDiscreted in this order, or not as ctflow supports them.
    """
    present = {IMAGE, PREDICTION, "label"}  # MONAI's evaluator has a label, even if empty
    found: list[Transform] = []
    targets: list[str] = []
    for transform in transforms_from_config(config, "postprocessing"):
        is_done = len(targets) >= len(_ORDER)
        if (
            transform.target in HELD
            and transform.target not in _NEVER
            and (is_done or transform.target not in _AT_THE_END)
        ):
            check_held(transform, present, FLOAT32 + INTEGERS if is_done else FLOAT32)
            _check_kept(transform, present, needs_image="Invertd" not in targets)
            continue
        targets.append(transform.target)
        if transform.target in POST:
            transform.read_keys(POST[transform.target], present)
            _check_keys(transform)
            found.append(transform)
    if tuple(targets) != _ORDER:
        names = ", ".join(targets[:8]) or "none of them"
        raise config.invalid(
            "postprocessing", f"has {names}; ctflow implements {', '.join(_ORDER)}, in this order", "order"
        )
    activate, invert, discrete = found
    activation = _activation(activate)
    _check_invert(invert)
    return activation, _threshold(discrete, activation)


def _check_kept(transform: Transform, present: set[str], *, needs_image: bool) -> None:
    for key in (PREDICTION, *((IMAGE,) if needs_image else ())):
        if key not in present:
            raise transform.refused("keys", f"removes {key!r}, which is still needed", "keys")
    if transform.target != "DeleteItemsd" and "label" in transform.acts_on:
        raise transform.refused("keys", "names 'label', which a CT does not have", "keys")


def _check_keys(transform: Transform) -> None:
    if transform.acts_on != [PREDICTION]:
        others = [key for key in transform.acts_on if key != PREDICTION]
        problem = f"names {short(others[0])}" if others else f"does not name {PREDICTION!r}"
        raise transform.refused("keys", f"{problem}; ctflow applies {transform.target} only to {PREDICTION!r}", "keys")


def _activation(transform: Transform) -> Activation:
    softmax, sigmoid = transform.flag("softmax", False), transform.flag("sigmoid", False)
    if softmax == sigmoid:
        raise transform.refused("softmax", "or sigmoid must be true, and not both")
    return "softmax" if softmax else "sigmoid"


def _check_invert(transform: Transform) -> None:
    original = transform.get("orig_keys", None)
    if original != IMAGE:
        given = "is missing" if original is None else f"is {short(original)}"
        raise transform.refused(
            "orig_keys", f"{given}; it must be {IMAGE!r}, which preprocessing was applied to", "keys"
        )
    if transform.get("meta_keys", None) in (IMAGE, PREDICTION):
        raise transform.refused("meta_keys", "must be a key other than those of the data", "keys")
    if not is_the_same(transform.config, transform.place("transform"), "preprocessing"):
        raise transform.refused("transform", 'must be "@preprocessing", which ctflow inverts', "workflow")
    if transform.flag("nearest_interp", True):
        raise transform.refused(
            "nearest_interp", "must be false (MONAI's default is true): ctflow resamples probabilities linearly"
        )


def is_the_same(config: Config, place: ConfigValue, key: str) -> bool:
    """Whether a value refers to the object at `key` (also as an expression, `$@key`)."""
    value = place.value
    if not isinstance(value, str):
        return False
    if value.startswith("$") and sole_reference(value[1:]) == key:
        return True
    return value.startswith("@") and config.resolved(place).value is config.top(key).value


def _threshold(transform: Transform, activation: Activation) -> float | None:
    argmax, threshold = transform.flag("argmax", False), transform.number_or_none("threshold", None)
    if activation == "softmax" and argmax and threshold is None:
        return None
    if activation == "sigmoid" and not argmax and threshold is not None:
        if not 0 < threshold < 1:
            raise transform.refused("threshold", f"must lie between 0 and 1, not {threshold:g}")
        return threshold
    raise transform.refused(
        "argmax", "and threshold: ctflow implements softmax with argmax, and sigmoid with a threshold"
    )
