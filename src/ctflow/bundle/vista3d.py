"""The zoo's bundle vista3d with automatic prompts: its classes, windows and labels, without its own code.

Its `scripts.inferer.Vista3dInferer` and `scripts.evaluator.Vista3dEvaluator` handle points that a user sets. Without
points they do what can be said in a few words: the network gets the evaluator's `everything_labels` as class prompts,
MONAI's sliding windows have their default overlap and blend, and a voxel belongs to the class of the largest logit
above 0.

Source: bundle vista3d 0.5.4, scripts; MONAI 1.6.1 `monai.apps.vista3d.transforms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ctflow.bundle.config import Component, Config, ConfigValue, short
from ctflow.bundle.config.signatures import EVALUATOR, VISTA_INFERER, VISTA_NETWORK, Signature
from ctflow.bundle.expressions.calls import component_of_call
from ctflow.core.model import NetworkSpec
from ctflow.networks import vista3d

_PACKAGE = "monai.networks.nets"
_INFERER, _EVALUATOR = "Vista3dInferer", "Vista3dEvaluator"
_LAST_CLASS = 132  # those behind have no class prompts: `vista3d132` is trained on these
_PROMPTS = "everything_labels"


def network_place(config: Config) -> ConfigValue:
    """`network_def`; a call that makes a network as the object that it describes."""
    text = config.raw("network_def").value if "network_def" in config else None
    called = component_of_call(text) if isinstance(text, str) and text.startswith("$") else None
    return config.top("network_def") if called is None else ConfigValue("network_def", called)


def is_vista(place: ConfigValue) -> bool:
    """Whether a `network_def` is MONAI's VISTA-3D."""
    target = place.value.get("_target_") if isinstance(place.value, Mapping) else None
    return target in (vista3d.NAME, f"{_PACKAGE}.{vista3d.NAME}", f"{_PACKAGE}.vista3d.{vista3d.NAME}")


def vista_network(config: Config, place: ConfigValue) -> tuple[NetworkSpec, tuple[str, ...]]:
    """The network with its class prompts, and a note on what is not executed.

    Raises:
        BundleInvalid: An argument is unknown, or the classes are.
    """
    definition = Component(config, place, _PACKAGE)
    definition.demand_signature(VISTA_NETWORK)
    classes = vista_classes(config)
    arguments = {"in_channels": 1, "encoder_embed_dim": definition.integer("encoder_embed_dim", 1, 4096, 48)}
    note = (
        f"VISTA-3D marks the {len(classes)} classes of {_PROMPTS} by class prompts; the bundle's own inferer and "
        "evaluator, which are for points, are not executed"
    )
    return NetworkSpec(vista3d.NAME, {"classes": list(classes), "background": True, **arguments}), (note,)


def vista_classes(config: Config) -> tuple[int, ...]:
    """The classes that the evaluator asks for where nobody sets prompts.

    Raises:
        BundleInvalid: It does not say, or asks for something else than different classes.
    """
    evaluator = config.raw("evaluator").value if "evaluator" in config else None
    given = evaluator.get("hyper_kwargs") if isinstance(evaluator, Mapping) else None
    place = config.resolved(ConfigValue("evaluator#hyper_kwargs", given))
    if not isinstance(place.value, Mapping) or _PROMPTS not in place.value:
        raise config.invalid(place.id, f"lacks {_PROMPTS}, the classes that VISTA-3D is asked for", "argument")
    at = ConfigValue(f"{place.id}#user_prompt", place.value.get("user_prompt"))
    if config.plain(at) is not True:
        raise config.invalid(at.id, "must be true; ctflow does not compare with labels", "value")
    at = ConfigValue(f"{place.id}#{_PROMPTS}", place.value[_PROMPTS])
    classes = config.plain(at)
    if not isinstance(classes, list) or not classes or not all(_is_class(each) for each in classes):
        raise config.invalid(at.id, f"must be classes from 1 to {_LAST_CLASS}, not {short(classes)}", "value")
    if len(set(classes)) < len(classes):
        raise config.invalid(at.id, f"names a class twice, {short(classes)}", "value")
    return tuple(classes)


def _is_class(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LAST_CLASS


def vista_inferer(config: Config, place: ConfigValue) -> Component | None:
    """VISTA-3D's inferer, its arguments checked; None for any other.

    Its `overlap` is for points: the class prompts' windows have MONAI's default.
    """
    inferer = _own(config, place, _INFERER)
    if inferer is not None:
        for name in inferer.names:
            if name not in VISTA_INFERER.arguments:
                raise inferer.refused(name, f"is an argument of {_INFERER} that ctflow does not know", "argument")
    return inferer


def vista_signature(evaluator: Component) -> Signature:
    """Of the bundle's own evaluator: that of MONAI's, from which it is derived, and the prompts."""
    return replace(EVALUATOR, module=evaluator.path.rpartition(".")[0], held=EVALUATOR.held | {"hyper_kwargs"})


def vista_evaluator(config: Config, place: ConfigValue) -> Component | None:
    """VISTA-3D's evaluator; None for any other."""
    return _own(config, place, _EVALUATOR)


def _own(config: Config, place: ConfigValue, name: str) -> Component | None:
    """An object of the bundle's own class of this name, where the network is VISTA-3D."""
    target = place.value.get("_target_") if isinstance(place.value, Mapping) else None
    if not isinstance(target, str) or target.rpartition(".")[2] != name or not is_vista(network_place(config)):
        return None
    return Component(config, place, target.rpartition(".")[0])
