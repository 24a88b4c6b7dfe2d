"""The bundle's transforms after the network -> how logits become labels, and on which grid."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ctflow.bundle.config import Config, ConfigValue, is_number, short
from ctflow.bundle.config.ensemble import ensemble_from_config
from ctflow.bundle.config.signatures import FLOAT32, HELD, INTEGERS, POST, STEPS
from ctflow.bundle.expressions.interpreter import sole_reference
from ctflow.bundle.expressions.lambdas import is_nan_to_num
from ctflow.bundle.metadata import MOST_CHANNELS
from ctflow.bundle.steps.label_steps import LABEL_MAKERS
from ctflow.bundle.transforms import IMAGE, PREDICTION, Transform, check_held, transforms_from_config
from ctflow.bundle.vista3d import is_vista, network_place, vista_classes
from ctflow.core.model import Activation, Combined
from ctflow.core.steps import LabelStep, MapLabels, Restored

_DONE = {**POST, "Lambdad": STEPS["Lambdad"]}
_NEVER = frozenset({"LoadImaged", "EnsureChannelFirstd"})
_AT_THE_END = frozenset({"FromMetaTensord", "ToMetaTensord", "ToTensord"})  # earlier, MONAI would lose the geometry
_Kind = Literal["logits", "probabilities", "labels"]
_COMBINING = {"MeanEnsembled": "takes the mean of", "VoteEnsembled": "votes among"}
_LEAST_SUM = 1e-3  # of weights, as a share of the sum without signs: MONAI divides by it


@dataclass
class Postprocessing:
    """What `postprocessing` says; see `ModelSpec`.

    Attributes:
        activation: "none" if there is no Activationsd.
        threshold: None for the argmax.
        restored: What is brought back to the source grid.
        before: Steps on labels before that, and
        after: after it.
        combined: What is combined of an ensemble's predictions; see `NetworkSpec`.
        shares: Each network's share of the mean.
        voted_classes: How many VoteEnsembled says that there are.
    """

    activation: Activation = "none"
    threshold: float | None = None
    restored: Restored = "probabilities"
    before: list[LabelStep] = field(default_factory=list)
    after: list[LabelStep] = field(default_factory=list)
    combined: Combined = "logits"
    shares: tuple[float, ...] = ()
    voted_classes: int | None = None


def postprocessing_from_config(config: Config) -> Postprocessing:
    """Read `postprocessing`.

    Args:
        config: The bundle's configuration.

    Raises:
        BundleInvalid: A transform, an order or an argument that ctflow does not support.
    """
    ensemble = ensemble_from_config(config)
    return _PostReader(ensemble.keys if ensemble else (PREDICTION,)).read(config)


class _PostReader:
    """Walks through the list and tracks what the prediction is, and on which grid."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._predictions = keys  # of an ensemble there are several, until they are combined
        self._present = {IMAGE, *keys, "label"}  # MONAI's evaluator has a label, even if empty
        self._kind: _Kind = "logits"
        self._inverted: Transform | None = None
        self._found = Postprocessing()

    @property
    def _is_done(self) -> bool:
        return self._kind == "labels" and self._inverted is not None and len(self._predictions) == 1

    def read(self, config: Config) -> Postprocessing:
        for transform in transforms_from_config(config, "postprocessing"):
            if transform.target in _DONE:
                self._do(transform)
            elif transform.target in HELD and transform.target not in _NEVER:
                self._hold(transform)
            else:
                known = ", ".join(POST)
                raise transform.refused("_target_", f"is {transform.target}; ctflow implements {known}", "target")
        if not self._is_done:
            missing = "AsDiscreted" if self._kind != "labels" else "Invertd, without which labels stay on another grid"
            if len(self._predictions) > 1:
                missing = " and ".join(_COMBINING).replace("and", "or") + ", which combine an ensemble's predictions"
            raise config.invalid("postprocessing", f"lacks {missing}", "order")
        return self._found

    def _hold(self, transform: Transform) -> None:
        if transform.target in _AT_THE_END and not self._is_done:
            raise transform.refused(
                "_target_", f"is {transform.target}, but comes before the labels are final", "order"
            )
        check_held(transform, self._present, FLOAT32 + INTEGERS if self._kind == "labels" else FLOAT32)
        for key in (*self._predictions, *(() if self._inverted else (IMAGE,))):
            if key not in self._present:
                raise transform.refused("keys", f"removes {key!r}, which is still needed", "keys")
        if transform.target != "DeleteItemsd" and "label" in transform.acts_on:
            raise transform.refused("keys", "names 'label', which a CT does not have", "keys")

    def _do(self, transform: Transform) -> None:
        transform.read_keys(_DONE[transform.target], self._present)
        if transform.target in _COMBINING and len(keys := transform.key_list("keys")) == 1:
            does = f"MONAI then {_COMBINING[transform.target]} the channels of that one prediction"
            raise transform.refused("keys", f"names only {short(keys[0])}: {does}", "keys")
        if set(transform.acts_on) != set(self._predictions):
            raise self._of_others(transform)
        if transform.target in _COMBINING:
            self._combine(transform)
        elif transform.target == "Activationsd":
            self._activate(transform)
        elif transform.target == "AsDiscreted":
            self._discretize(transform)
        elif transform.target == "Invertd":
            self._invert(transform)
        elif transform.target == "VistaPostTransformd":
            self._mark_classes(transform)
        elif transform.target == "Lambdad":
            self._replace_nan(transform)
        else:
            if self._kind != "labels" or len(self._predictions) > 1:
                later = "AsDiscreted" if self._kind != "labels" else "VoteEnsembled"
                raise transform.refused("_target_", f"is {transform.target}, but comes before {later}", "order")
            steps = self._found.before if self._inverted is None else self._found.after
            steps.append(LABEL_MAKERS[transform.target](transform))

    def _of_others(self, transform: Transform) -> Exception:
        others = [key for key in transform.acts_on if key not in self._predictions]
        lacking = [key for key in self._predictions if key not in transform.acts_on]
        problem = f"names {short(others[0])}" if others else f"does not name {short(lacking[0])}"
        whole = " and ".join(map(repr, self._predictions[:4])) + (" ..." if len(self._predictions) > 4 else "")
        return transform.refused("keys", f"{problem}; ctflow applies {transform.target} only to {whole}", "keys")

    def _combine(self, transform: Transform) -> None:
        """The mean commutes with Invertd; with an activation it does not, and labels can only vote."""
        is_vote = transform.target == "VoteEnsembled"
        if is_vote != (self._kind == "labels"):
            where = "before AsDiscreted" if is_vote else "after it: labels have no mean"
            raise transform.refused("_target_", f"is {transform.target}, but comes {where}", "order")
        output = transform.get("output_key", None)
        if not isinstance(output, str) or not output or output in (IMAGE, "label"):
            raise transform.refused("output_key", f"must be a key for the result, not {short(output)}", "keys")
        if is_vote:
            self._found.combined = "votes"
            if transform.get("num_classes", None) is not None:
                self._found.voted_classes = transform.integer("num_classes", 1, MOST_CHANNELS)
        else:
            self._found.combined = "logits" if self._kind == "logits" else "probabilities"
            self._found.shares = self._shares(transform)
        self._predictions = (output,)
        self._present.add(output)

    def _shares(self, transform: Transform) -> tuple[float, ...]:
        """MONAI multiplies each prediction by its weight, and divides by the mean of the weights."""
        given = transform.get("weights", None)
        if given is None:
            return ()
        count = len(self._predictions)
        if not isinstance(given, list) or len(given) != count or not all(map(is_number, given)):
            raise transform.refused("weights", f"must be a number for each of {count} networks, not {short(given)}")
        if abs(sum(given)) <= _LEAST_SUM * sum(map(abs, given)):
            raise transform.refused("weights", f"sum to about 0, by which MONAI divides: {short(given)}")
        by_key = dict(zip(transform.key_list("keys"), given, strict=True))
        return tuple(by_key[key] / sum(given) for key in self._predictions)

    def _activate(self, transform: Transform) -> None:
        if self._kind != "logits":
            raise transform.refused("_target_", "is Activationsd, but the prediction has been activated", "order")
        softmax, sigmoid = transform.flag("softmax", False), transform.flag("sigmoid", False)
        if softmax == sigmoid:
            raise transform.refused("softmax", "or sigmoid must be true, and not both")
        self._found.activation = "softmax" if softmax else "sigmoid"
        self._kind = "probabilities"
        if self._found.restored == "labels":
            self._check_outside()

    def _discretize(self, transform: Transform) -> None:
        if self._kind == "labels":
            raise transform.refused("_target_", "is AsDiscreted, but comes after another one", "order")
        argmax, threshold = transform.flag("argmax", False), transform.number_or_none("threshold", None)
        activation = self._found.activation
        if activation == "softmax" or (activation == "none" and argmax):
            fits = argmax and threshold is None
        else:
            fits = not argmax and threshold is not None
        if not fits:
            raise transform.refused(
                "argmax", "and threshold: ctflow implements softmax with argmax, and sigmoid with a threshold"
            )
        if activation == "sigmoid" and threshold is not None and not 0 < threshold < 1:
            raise transform.refused("threshold", f"must lie between 0 and 1, not {threshold:g}")
        self._found.threshold, self._kind = threshold, "labels"
        if activation == "none" and threshold is not None and threshold <= 0:
            raise transform.refused("threshold", f"must be above 0 without Activationsd, not {threshold:g}")

    def _mark_classes(self, transform: Transform) -> None:
        """The argmax over the classes and a background of zeros, which `AutomaticVista3d` adds; then their numbers."""
        if self._kind != "logits" or self._found.activation != "none" or not is_vista(network_place(transform.config)):
            raise transform.refused("_target_", "is VistaPostTransformd, but this is no logit of VISTA-3D", "order")
        steps = self._found.before if self._inverted is None else self._found.after
        steps.append(MapLabels(tuple(enumerate(vista_classes(transform.config), start=1))))
        self._kind = "labels"

    def _replace_nan(self, transform: Transform) -> None:
        (place,) = transform.given("func")
        if self._kind != "labels" or not isinstance(place.value, str) or not is_nan_to_num(place.value[1:]):
            known = "lambda x: torch.nan_to_num(x, ...) on labels, which have no NaN"
            raise transform.refused("func", f"is {short(place.value)}; ctflow takes only {known}", "expression")

    def _invert(self, transform: Transform) -> None:
        if self._inverted is not None:
            raise transform.refused("_target_", "is Invertd, but comes after another one", "order")
        _check_invert(transform)
        is_nearest = transform.flag("nearest_interp", True)
        if self._kind == "labels" and not is_nearest:
            raise transform.refused(
                "nearest_interp", "must be true after AsDiscreted: labels between two classes would be a third"
            )
        self._inverted = transform
        # Taking the nearest voxel's probability, then its label, is taking the nearest voxel's label.
        self._found.restored = "labels" if is_nearest else self._kind
        if self._kind == "logits":
            self._check_outside()

    def _check_outside(self) -> None:
        """Where MONAI restored zeros outside a crop, and a sigmoid makes 0.5 of them, which may be marked."""
        if self._inverted is not None and self._found.activation == "sigmoid":
            raise self._inverted.refused("_target_", "is Invertd before a sigmoid: put Activationsd before it", "order")


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


def is_the_same(config: Config, place: ConfigValue, key: str) -> bool:
    """Whether a value refers to the object at `key` (also as an expression, `$@key`)."""
    value = place.value
    if not isinstance(value, str):
        return False
    if value == f"@{key}" or (value.startswith("$") and sole_reference(value[1:]) == key):
        return True
    return value.startswith("@") and config.resolved(place).value is config.top(key).value
