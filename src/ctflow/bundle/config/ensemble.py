"""A bundle of several networks: MONAI's EnsembleEvaluator, its networks, and where their predictions go."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from ctflow.bundle.config import Component, Config, ConfigValue, short
from ctflow.bundle.config.signatures import ENSEMBLE_EVALUATOR
from ctflow.bundle.expressions.calls import component_of_call, dotted
from ctflow.bundle.expressions.interpreter import with_marks, without_marks
from ctflow.bundle.expressions.values import NotUnderstood

MOST_NETWORKS = 50
RUN_BY_MONAI = "`python -m monai.bundle run` runs it"
EVALUATOR = "EnsembleEvaluator"
_DATA = frozenset({"image", "label"})
_MOST_STEPS = 16  # between keys
_COPY, _SAME = "copy.deepcopy", frozenset({"torch.compile"})
_OF_NETWORK = frozenset({"to", "eval", "cuda", "cpu", "float"})  # methods that return the network itself


@dataclass(frozen=True)
class Member:
    """One of the evaluator's networks.

    Attributes:
        place: Where the evaluator names it.
        definition: Its class and arguments.
        made_at: Where MONAI makes it: other references to that place mean the same network, with the same weights.
    """

    place: str
    definition: ConfigValue
    made_at: str


@dataclass(frozen=True)
class Ensemble:
    """The evaluator's networks, and the key of the prediction of each."""

    members: tuple[Member, ...]
    keys: tuple[str, ...]


def is_ensemble(config: Config) -> bool:
    """Whether the configuration's evaluator is MONAI's for several networks."""
    evaluator = config.raw("evaluator").value if "evaluator" in config else None
    target = evaluator.get("_target_") if isinstance(evaluator, Mapping) else None
    if not isinstance(target, str) or target.rpartition(".")[2] != EVALUATOR:
        return False
    return target == EVALUATOR or target.startswith("monai.")


def ensemble_from_config(config: Config) -> Ensemble | None:
    """The networks of an EnsembleEvaluator; None if the configuration has another evaluator or none.

    Raises:
        BundleInvalid: Which networks these are, or where their predictions go, cannot be known.
    """
    if not is_ensemble(config):
        return None
    evaluator = Component(config, config.raw("evaluator"), "monai.engines")
    evaluator.demand_signature(ENSEMBLE_EVALUATOR)
    places = _listed(config, evaluator.place("networks"))
    if not 1 <= len(places) <= MOST_NETWORKS:
        raise evaluator.refused("networks", f"has {len(places)} networks; ctflow runs 1 to {MOST_NETWORKS}")
    members = tuple(member_at(config, place) for place in places)
    made: dict[str, str] = {}
    for member in members:
        if member.made_at in made:
            raise config.invalid(
                member.place,
                f"is the same network as {made[member.made_at]}: MONAI makes it once, at {member.made_at}. Give each a "
                "definition of its own, or a copy.deepcopy under a key of its own",
                "workflow",
            )
        made[member.made_at] = member.place
    return Ensemble(members, _prediction_keys(evaluator, len(members)))


def member_at(config: Config, place: ConfigValue) -> Member:
    """The network that a value means: an object, a reference to one, or an expression of one.

    Raises:
        BundleInvalid: It cannot be known without executing the bundle.
    """
    found, made_at = place, ""
    for _ in range(_MOST_STEPS):
        value = found.value
        called = component_of_call(value) if isinstance(value, str) and value.startswith("$") else None
        if called is not None or isinstance(value, Mapping):
            definition = found if called is None else ConfigValue(found.id, called)
            return Member(place.id, definition, made_at or found.id)
        named = _named(value) if isinstance(value, str) else None
        if named is None:
            break
        path, is_copy = named
        made_at = made_at or (found.id if is_copy else "")
        found = config.referred(found.id, path)
    raise config.invalid(
        place.id,
        f"is {short(place.value)}; ctflow understands networks, references to them, @network.to(@device) and "
        "copy.deepcopy(@network)",
        "expression",
    )


def _listed(config: Config, place: ConfigValue) -> list[ConfigValue]:
    """The items of a list of networks, which may be referred to or written as an expression."""
    found = place
    for _ in range(_MOST_STEPS):
        value = found.value
        items = _items_of_expression(value) if isinstance(value, str) else value
        if isinstance(items, list):
            return [ConfigValue(f"{found.id}#{number}", item) for number, item in enumerate(items)]
        named = _named(value) if isinstance(value, str) else None
        if named is None or named[1]:
            break
        found = config.referred(found.id, named[0])
    raise config.invalid(place.id, f"is {short(place.value)}; ctflow reads a list of networks", "expression")


def _prediction_keys(evaluator: Component, count: int) -> tuple[str, ...]:
    given = evaluator.get("pred_keys", None)
    if given is None:
        return tuple(f"pred_{number}" for number in range(count))
    keys = given if isinstance(given, list) else [given]
    if not all(isinstance(key, str) and key for key in keys):
        raise evaluator.refused("pred_keys", f"must be a list of keys, not {short(given)}", "keys")
    if len(keys) != count:
        raise evaluator.refused("pred_keys", f"has {len(keys)} keys for {count} networks", "keys")
    if len(set(keys)) < count or _DATA.intersection(keys):
        raise evaluator.refused("pred_keys", f"must be different keys without data, not {short(given)}", "keys")
    return tuple(keys)


def _parsed(text: str) -> tuple[ast.expr, str, list[str]] | None:
    """An expression's tree, its source with marks, and the references that these stand for."""
    source = text[1:].strip() if text.startswith("$") else text
    if text[:1] not in ("$", "@"):
        return None
    try:
        marked, references = with_marks(source)
        return ast.parse(marked, mode="eval").body, marked, references
    except (NotUnderstood, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _items_of_expression(text: str) -> list[str] | None:
    """`$[@a, @b.to(@device)]` as a list of expressions."""
    parsed = _parsed(text)
    if parsed is None:
        return None
    node, source, references = parsed
    if not isinstance(node, ast.List | ast.Tuple):
        return None
    parts = [ast.get_source_segment(source, item) or "" for item in node.elts]
    return [f"${without_marks(part, references)}" for part in parts]


def _named(text: str) -> tuple[str, bool] | None:
    """The path of the network that a text means, and whether it is a copy of that; None for anything else."""
    parsed = _parsed(text)
    if parsed is None:
        return None
    node, _, references = parsed
    is_copy, behind = False, ""
    while True:
        if isinstance(node, ast.Name):
            name = without_marks(node.id, references)
            return (f"{name}{behind}", is_copy) if name.startswith("@") else None
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
            behind = f"::{node.slice.value}{behind}"
            node = node.value
        elif behind or not isinstance(node, ast.Call):
            return None
        elif dotted(node.func) in (_COPY, "deepcopy", *_SAME):
            if not node.args:
                return None
            is_copy = is_copy or dotted(node.func) not in _SAME
            node = node.args[0]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in _OF_NETWORK:
            node = node.func.value
        else:
            return None
