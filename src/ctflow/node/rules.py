"""Decides which series run: by the site's rules, then eligibility by `ctflow.dicom.read.select.selection`. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from ctflow.dicom.attributes import number, text
from ctflow.dicom.body_parts import holds_no_other, suits
from ctflow.dicom.read.scan import Scan
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.read.select.series import Candidate, Series
from ctflow.node.settings.models import RunOptions
from ctflow.node.settings.values import Name
from ctflow.settings.schema import Group, Key, Refused, Switch, Text, real

_LONGEST_FACT = 1024  # characters of a compared value; DICOM allows 64
RULE_IGNORE, OTHER_MODELS = "rule-ignore", "other-models"  # reasons of verdicts
_ABSENT = "absent"  # a code string has only capitals, so no BodyPartExamined is this word


@dataclass(frozen=True)
class Range(Group):
    """From `min` to `max`, both included."""

    min: Annotated[float, real(0, 1000), Key("At least this.")] = 0.0
    max: Annotated[float, real(0, 1000), Key("At most this.")] = 1000.0

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")


@dataclass(frozen=True)
class Rule(Group):
    """One rule: its conditions on a series, and its decision."""

    decision: Annotated[
        Literal["run", "ignore"] | None,
        Key("`run`: eligible series run; `ignore`: none does.", default="run, if the key `run` is given"),
    ] = None
    name: Annotated[Text | None, Key("Its name on the page and in the log.")] = None
    modality: Annotated[tuple[Text, ...], Key("Modality is one of these.")] = ()
    body_part: Annotated[
        tuple[Text, ...],
        Key(
            "BodyPartExamined is one of these, also in other terms (dicom.md): `run` applies if it includes such a "
            "part, `ignore` if it includes no other. `absent` means that there is none."
        ),
    ] = ()
    thickness_mm: Annotated[Range | None, Key("SliceThickness in mm, such as `{min: 0.5, max: 2}`.")] = None
    description: Annotated[
        tuple[Text, ...],
        Key("SeriesDescription matches one of these, where `*` is any text and `?` any letter; case is ignored."),
    ] = ()
    calling_ae: Annotated[tuple[Text, ...], Key("AE title of the sender is one of these.")] = ()
    force: Annotated[
        Switch,
        Key(
            "With `run`: also series that are not eligible but possible, as `ctflow run --force` does, with a warning."
        ),
    ] = False
    run: Annotated[
        tuple[Name, ...], Key("Names of the `models` that its series run with; the first of them if omitted.", most=64)
    ] = ()
    options: Annotated[
        RunOptions | None,
        Key("Run options for its series: any key from `volume` on, except `cache`; they win over those of a model."),
    ] = None
    priority: Annotated[Literal["urgent", "routine"], Key("`urgent`: its series run before routine ones.")] = "routine"

    def __post_init__(self) -> None:
        if self.decision is None and not self.run:
            raise Refused("the key decision is missing", reason="missing-key")
        if self.decision is None:
            object.__setattr__(self, "decision", "run")
        if self.decision == "ignore":
            for name, is_given in (("force", self.force), ("run", self.run), ("options", self.options)):
                if is_given:
                    raise ValueError(f"{name} needs the decision run, but this one is ignore")
        twice = {name for name in self.run if self.run.count(name) > 1}
        if twice:
            raise Refused(f"the model {min(twice)} is named twice", "run")

    @property
    def takes_all(self) -> bool:
        """Whether it applies to every series."""
        return not (self.modality or self.body_part or self.thickness_mm or self.description or self.calling_ae)


@dataclass(frozen=True)
class Facts:
    """The facts that rules check.

    Attributes:
        modality: Modality, capitals.
        body_parts: Every BodyPartExamined of the series, capitals; empty if none is given.
        thickness_mm: The largest SliceThickness; None if none is given.
        description: SeriesDescription of the first slice.
        calling_ae: AE title of the sender; None if unknown.
    """

    modality: str = ""
    body_parts: frozenset[str] = frozenset()
    thickness_mm: float | None = None
    description: str = ""
    calling_ae: str | None = None


@dataclass(frozen=True)
class Decision:
    """The decision of the rules.

    Attributes:
        decision: "run" or "ignore".
        force: Whether series that are not eligible but possible also run.
        rule: The deciding rule, for display ("rule 2, scouts"); None if none applied.
        by: The deciding rule itself.
    """

    decision: str
    force: bool
    rule: str | None
    by: Rule | None = None

    def models(self, names: Sequence[str]) -> tuple[str, ...]:
        """The models that it names; the first of all that there are if it names none."""
        return self.by.run if self.by is not None and self.by.run else tuple(names[:1])


@dataclass(frozen=True, eq=False)
class Verdict:
    """The verdict on a series.

    Attributes:
        candidate: The series and its verdict by `ctflow.dicom.read.select.selection`.
        run: Whether it is run.
        force: Whether the eligibility rules were overruled (`Settings.force`).
        reason: Short stable name: `rule-ignore`, or the candidate's.
        message: The same as a sentence, without patient data.
        thickness_mm: The SliceThickness that rules used.
        by: The decision of the rules.
    """

    candidate: Candidate
    run: bool
    force: bool
    reason: str
    message: str
    thickness_mm: float | None
    by: Decision = Decision("run", force=False, rule=None)


def facts_from_series(series: Series, calling_ae: str | None = None) -> Facts:
    """Read the facts for rules from a series' headers.

    Args:
        series: The slices.
        calling_ae: AE title of the sender.
    """
    headers = [instance.header for instance in series.instances]
    thicknesses = [found for header in headers if (found := number(header, "SliceThickness")) is not None]
    return Facts(
        modality=text(headers[0], "Modality").upper()[:_LONGEST_FACT],
        body_parts=frozenset(text(header, "BodyPartExamined").upper()[:_LONGEST_FACT] for header in headers) - {""},
        thickness_mm=max(thicknesses, default=None),
        description=text(headers[0], "SeriesDescription")[:_LONGEST_FACT],
        calling_ae=calling_ae,
    )


def decide(facts: Facts, rules: Sequence[Rule]) -> Decision:
    """The decision of the first rule that applies; without one, every eligible series runs.

    Args:
        facts: Of one series.
        rules: In the file's order.
    """
    for count, rule in enumerate(rules, start=1):
        if _fits(facts, rule):
            named = f"rule {count}, {rule.name}" if rule.name else f"rule {count}"
            return Decision(str(rule.decision), rule.force, named, rule)
    return Decision("run", force=False, rule=None)


def _fits(facts: Facts, rule: Rule) -> bool:
    return (
        (not rule.modality or facts.modality in {word.upper() for word in rule.modality})
        and _fits_body_part(facts, rule)
        and _fits_thickness(facts, rule)
        and (not rule.description or any(_like(facts.description, pattern) for pattern in rule.description))
        and (not rule.calling_ae or facts.calling_ae in rule.calling_ae)
    )


def _fits_body_part(facts: Facts, rule: Rule) -> bool:
    """Whether every value of the series fits the list.

    To run a CT of chest and abdomen, one of them is enough, as for `ctflow run`; to ignore it, both must be listed.
    """
    if not rule.body_part:
        return True
    if not facts.body_parts:
        return _ABSENT in rule.body_part
    words = {word.upper() for word in rule.body_part if word != _ABSENT}
    fits = suits if rule.decision == "run" else holds_no_other
    return all(fits(value, words) for value in facts.body_parts)


def _fits_thickness(facts: Facts, rule: Rule) -> bool:
    wanted = rule.thickness_mm
    return wanted is None or (facts.thickness_mm is not None and wanted.min <= facts.thickness_mm <= wanted.max)


def _like(value: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(value.casefold(), pattern.casefold())


@dataclass(frozen=True)
class Asking:
    """A model for which the rules are asked.

    Attributes:
        name: Its name in the settings; "" for the only one.
        body_parts: BodyPartExamined values that suit it; empty accepts all.
        volume_of: The volumes that are meant (as of `select_series`), by the rule that decides.
    """

    name: str = ""
    body_parts: Collection[str] = ()
    volume_of: Callable[[Rule | None], str] = lambda _rule: "all"


def verdicts_of_scan(
    scan: Scan,
    rules: Sequence[Rule],
    *,
    calling_ae: str | None = None,
    asking: Asking = Asking(),  # a value
    names: Sequence[str] = (),
) -> tuple[Verdict, ...]:
    """A model's verdict on every series of a folder, by UID, and on every volume of a series that holds several.

    Both the node and `ctflow rules test` use this.

    Args:
        scan: The headers.
        rules: The site's.
        calling_ae: AE title of the sender.
        asking: The model.
        names: Of all models; empty for the only one.
    """
    chosen: dict[tuple[str, bool], tuple[Candidate, ...]] = {}

    def candidates(volume: str, *, force: bool) -> tuple[Candidate, ...]:
        if (volume, force) not in chosen:
            found = select_series(scan, body_parts=asking.body_parts, volume=volume, force=force)
            chosen[volume, force] = found.candidates
        return chosen[volume, force]

    verdicts = []
    for place, first in enumerate(candidates("all", force=False)):
        facts = facts_from_series(first.series, calling_ae)
        decision = decide(facts, rules)
        volume = asking.volume_of(decision.by)
        fit, possible = (candidates(volume, force=force)[place] for force in (False, True))
        verdicts.append(_verdict(fit, possible, facts, decision, asking.name in decision.models(names or ("",))))
    return tuple(verdicts)


def _verdict(fit: Candidate, possible: Candidate, facts: Facts, decision: Decision, is_named: bool) -> Verdict:
    if decision.decision == "ignore":
        return Verdict(fit, False, False, RULE_IGNORE, f"{decision.rule} ignores it", facts.thickness_mm, decision)
    if not is_named:
        message = f"{decision.rule or 'without a rule the first model'} runs it with other models"
        return Verdict(fit, False, False, OTHER_MODELS, message, facts.thickness_mm, decision)
    candidate = possible if decision.force else fit
    # The text of select names the command line's switch; here a rule has it.
    message = candidate.message.replace("; --force segments it", "").replace("of --force", "of `force`")
    if decision.rule:
        message = f"{message} ({decision.rule})"
    return Verdict(
        candidate, candidate.selected, candidate.forced, candidate.reason, message, facts.thickness_mm, decision
    )
