"""Several models of a node, and the run options of a model and of a rule, which take the place of the node's own."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from ctflow.node.settings.values import Name
from ctflow.settings.run import Processing, Settings
from ctflow.settings.schema import FilePath, Group, Key, keys_of
from ctflow.settings.viewers import VIEWERS

# How many series a worker has at a time, and where files of engines are, is the same for all that it runs.
_OF_THE_NODE = frozenset({"cases_in_flight", "cache"})


def _optional(annotation: Any) -> Any:
    """A key's type that may also be left out."""
    return Annotated[(annotation.__origin__ | None, *annotation.__metadata__)]


if TYPE_CHECKING:

    class RunOptions(Group):
        """Run options that may be given; None leaves one as it is."""
else:
    RunOptions = make_dataclass(
        "RunOptions",
        [
            (name, _optional(annotation), field(default=None))
            for name, (annotation, _) in keys_of(Processing).items()
            if name not in _OF_THE_NODE
        ],
        bases=(Group,),
        frozen=True,
        namespace={"ALIKE": Processing, "__module__": __name__},
    )


@dataclass(frozen=True, kw_only=True)
class NodeModel(RunOptions):
    """One of several models."""

    name: Annotated[Name, Key("Its name in rules, on the page, in the log and in the names of result folders.")]
    bundle: Annotated[FilePath | None, Key("As `bundle` of the node.", default="`bundle` of the node")] = None


def given_options(options: RunOptions | None) -> dict[str, Any]:
    """The options that are given, with what a viewer chooses of those that are not."""
    if options is None:
        return {}
    names = [each.name for each in fields(RunOptions)]  # type: ignore[arg-type]  # to mypy it is no dataclass
    found = {name: value for name in names if (value := getattr(options, name)) is not None}
    chosen = VIEWERS.get(found.pop("viewer", None) or "", {})
    return {**{name: {"yes": True}.get(word, word) for name, word in chosen.items()}, **found}


def with_options(settings: Settings, *layers: RunOptions | None) -> Settings:
    """Settings of a run with options in their place; the last layer wins.

    Raises:
        SettingsInvalid: Two of them do not go together.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values |= given_options(layer)
    return replace(settings, **values) if values else settings
