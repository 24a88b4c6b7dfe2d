"""The page's routes: Starlette endpoints, each of which runs in a thread."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydicom.uid import UID

from ctflow import __version__
from ctflow.node.deliver.send import COPY
from ctflow.node.dicomweb.stow import StowIntake
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import SeriesDetail
from ctflow.node.journal.writes import key_of
from ctflow.node.metrics import Metrics
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.values import address_text
from ctflow.node.tls import TlsContext
from ctflow.node.web import views
from ctflow.node.web.guard import Tokens, headers, is_own_form
from ctflow.node.web.listing import SINCE, Listing, label_of_state, place_after
from ctflow.node.web.results import PREVIEW, REPORT, existing, shown_results
from ctflow.node.web.viewer import VIEWER

if TYPE_CHECKING:
    from jinja2 import Environment
    from starlette.requests import Request
    from starlette.responses import Response

ROWS = 50  # a page of the list
_EVENTS = 200
_REFRESH_S = 10


@dataclass(frozen=True, eq=False)
class NodeView:
    """The parts of a node that the page shows.

    Attributes:
        settings: The site's settings.
        journal: Of the same node.
        results: Folder of the results.
        metrics: Of the same node.
        problems: Why the node is not ready to receive and run, as sentences; empty if it is.
        remarks: Other faults, as sentences, with which the node is still ready.
        demonstration: The notice for a demonstration model; None for another, or while that is not known.
        clock: Gives the Unix time.
        stow: Where instances that come by STOW-RS go; None if the node takes none.
        tls: Of the page; None without TLS.
    """

    settings: ServiceSettings
    journal: Journal
    results: Path
    metrics: Metrics
    problems: Callable[[], Sequence[str]] = tuple
    remarks: Callable[[], Sequence[str]] = tuple
    demonstration: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.time
    stow: StowIntake | None = None
    tls: TlsContext | None = None


class Pages:
    """The page's endpoints; requests have the browser's session in their state.

    Args:
        node: The node to show.
        tokens: Makes the tokens of its forms.
    """

    def __init__(self, node: NodeView, tokens: Tokens) -> None:
        # Late: only the node needs it, not the library.
        from starlette import responses  # noqa: PLC0415

        self._node = node
        self._tokens = tokens
        self._responses = responses
        self._templates = _environment()

    # -- pages --------------------------------------------------------------------------------------------------------

    def overview(self, request: Request) -> Response:
        """The list of series, newest first, all or those in a state."""
        journal, now = self._node.journal, self._node.clock()
        wanted = Listing.from_query(request.query_params)
        if wanted is None:
            return self.message(404, "There is no such list", "The address names a state or page that does not exist.")
        found = journal.series(wanted.search(now), limit=ROWS + 1, before=wanted.place or None)
        return self.render(
            "overview.html",
            here="series",
            wanted=wanted,
            since=SINCE,
            models=[each.name for each in self._node.settings.models],
            day=journal.last_day(now),
            refresh_s=_REFRESH_S if wanted.refresh else None,
            refresh={
                "href": wanted.href(refresh="" if wanted.refresh else "1"),
                "label": "Stop refreshing" if wanted.refresh else f"Refresh every {_REFRESH_S} s",
            },
            counts=journal.counts(),
            totals=journal.totals(),
            free=shutil.disk_usage(self._node.results if self._node.results.is_dir() else Path.cwd()).free,
            least_free=self._node.settings.limits.free_disk,
            destinations=self._destinations(),
            tabs=self._tabs(wanted),
            rows=found[:ROWS],
            now=now,
            token=self._token_of(request),
            newest=wanted.href() if wanted.before else None,
            older=wanted.href(before=place_after(found[ROWS - 1])) if len(found) > ROWS else None,
        )

    def series(self, request: Request) -> Response:
        """The page of one series."""
        detail = self._node.journal.detail(request.path_params["key"], events=_EVENTS + 1)
        if detail is None:
            return self._unknown()
        series, now = detail.series, self._node.clock()
        later = key_of(series.study_uid, series.series_uid, series.revision + 1)
        return self.render(
            "series.html",
            here="series",
            series=series,
            now=now,
            token=self._token_of(request),
            retry_label=_retry_label(detail, now),
            earlier=series.previous,
            later=later if self._node.journal.find(later) else None,
            steps=views.steps(series, detail.events, now, has_result=bool(detail.results)),
            results=[
                shown for result in reversed(detail.results) for shown in shown_results(self._node.results, result)
            ],
            none_yet=views.no_result_text(series.state),
            models=[run for run in detail.runs if run.model],
            deliveries=detail.deliveries,
            facts=views.facts(series, _classes(detail), now, patient_data=self._node.settings.web.patient_data),
            events=detail.events[:_EVENTS],
            more_events=len(detail.events) > _EVENTS,
        )

    def events(self, request: Request) -> Response:
        """The events of all series and of the node itself, the newest first, a page at a time."""
        now, before = self._node.clock(), request.query_params.get("before", "")
        if not re.fullmatch("[0-9]{0,15}", before):
            return self.message(404, "There is no such list", "The address names a page that does not exist.")
        more = self._node.journal.events(limit=_EVENTS + 1, before=int(before) if before else None)
        found = more[:_EVENTS]
        keys = {record.series_key for record in found if record.series_key}
        digests = {key: series.digest for key in keys if (series := self._node.journal.find(key))}
        older = f"/events?before={found[-1].id}" if len(more) > _EVENTS else None
        newest = "/events" if before else None
        return self.render(
            "events.html", here="events", events=found, now=now, digests=digests, older=older, newest=newest
        )

    def message(self, status: int, heading: str, message: str, *, back: str = "/", label: str = "Series") -> Response:
        """A page with a single message."""
        return self.render(
            "message.html", status, here="", heading=heading, message=message, back=back, back_label=label
        )

    # -- files of results ---------------------------------------------------------------------------------------------

    def preview(self, request: Request) -> Response:
        """preview.png of a result."""
        file = self._file_of(request, PREVIEW)
        return self._responses.FileResponse(file, media_type="image/png") if file else self._unknown()

    def report(self, request: Request) -> Response:
        """report.html of a result."""
        file = self._file_of(request, REPORT)
        return self._responses.FileResponse(file, headers=headers(report=True)) if file else self._unknown()

    def _file_of(self, request: Request, name: str) -> Path | None:
        """A file of a result of the series in the address, if it exists."""
        number = request.path_params["number"]
        result = self._node.journal.result(int(number)) if re.fullmatch("[0-9]{1,15}", number) else None
        if result is None or result.series_key != request.path_params["key"]:
            return None
        return existing(self._node.results, result, name, request.path_params.get("volume", ""))

    # -- forms --------------------------------------------------------------------------------------------------------

    def retry(self, request: Request) -> Response:
        """Try a series again, and show it."""
        return self._act(request, self._node.journal.retry, "It is already in progress, or was delivered.")

    def discard(self, request: Request) -> Response:
        """Discard a series, and show it."""
        return self._act(request, self._node.journal.discard, "It was delivered, or was already discarded.")

    def _act(self, request: Request, act: Callable[..., bool], why_not: str) -> Response:
        key = request.path_params["key"]
        if self._node.journal.find(key) is None:
            return self._unknown()
        viewer = VIEWER.get()
        by = f"{viewer.name or 'the page'}, {views.plain(viewer.address)}"
        if not act(key, by=by, model=request.path_params.get("model")):
            return self.message(409, "Nothing was changed", why_not, back=f"/series/{key}", label="The series")
        return self.redirect(f"/series/{key}")

    def stale(self, request: Request) -> Response:
        """The answer to a form with an invalid token."""
        message = "The form is outdated, or belongs to another page. Load the page and try again."
        if not is_own_form(request.headers):
            message = "The browser took the form from a server of another name. A proxy must pass on the Host header."
        key = request.path_params.get("key")
        back = f"/series/{key}" if key else "/"
        return self.message(403, "Nothing was changed", message, back=back, label="Load the page")

    # -- for machines -------------------------------------------------------------------------------------------------

    def style(self, _request: Request) -> Response:
        """The style sheet."""
        palette = (resources.files("ctflow.report") / "palette.css").read_bytes()
        return self._responses.Response(palette + _part("style.css"), media_type="text/css")

    def icon(self, _request: Request) -> Response:
        """The icon."""
        return self._responses.Response(_part("icon.svg"), media_type="image/svg+xml")

    def health(self, _request: Request) -> Response:
        """Whether the process answers; restart it if not."""
        return self._responses.PlainTextResponse("ok\n")

    def ready(self, *, whole: bool) -> Response:
        """Whether the node can receive and run; 503 if not, with reasons and remarks only for those who may know."""
        self._node.journal.counts()
        problems = list(self._node.problems())
        document: dict[str, object] = {"ready": not problems}
        if whole:
            document |= {"problems": problems, "remarks": list(self._node.remarks())}
        body = json.dumps(document).encode() + b"\n"
        return self._responses.Response(body, 503 if problems else 200, media_type="application/json")

    def metrics(self, _request: Request) -> Response:
        """The metrics for Prometheus."""
        body, media_type = self._node.metrics.exposition()
        return self._responses.Response(body, media_type=media_type)

    # -- parts --------------------------------------------------------------------------------------------------------

    def render(self, template: str, status: int = 200, **values: Any) -> Response:
        """A page from its template."""
        settings, viewer = self._node.settings, VIEWER.get()
        values.setdefault("refresh_s", None)
        node = {
            "ae_title": settings.ae_title,
            "ae_title_quoted": shlex.quote(settings.ae_title),
            "host": {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.bind, settings.bind),  # noqa: S104
            "port": settings.port,
            "address": address_text(settings.bind, settings.port),
            "problems": self._node.problems() if viewer.can_look else (),
            "remarks": self._node.remarks() if viewer.can_look else (),
            "demonstration": self._node.demonstration() if viewer.can_look else None,
            "version": __version__,
            "zone": views.zone(),
            "patient_data": settings.web.patient_data,
        }
        text = self._templates.get_template(template).render(node=node, viewer=viewer, **values)
        return self._responses.HTMLResponse(text, status)

    def redirect(self, path: str) -> Response:
        """To another page, after a form or instead of a page."""
        return self._responses.RedirectResponse(path, 303)

    def unauthorized(self, scheme: str, text: str) -> Response:
        """The answer to a machine that has not shown who it is."""
        return self._responses.PlainTextResponse(f"{text}\n", 401, {"WWW-Authenticate": scheme})

    def _unknown(self) -> Response:
        return self.message(404, "There is no such page", "The series or result may belong to another data folder.")

    def _token_of(self, request: Request) -> Callable[[str, str], str]:
        """Makes the token of a form that does something with a series."""
        return lambda key, act: self._tokens.token(request.state.session, f"/series/{key}/{act}")

    def _destinations(self) -> list[dict[str, object]]:
        """Destinations and webhooks of the settings, and earlier ones with waiting objects."""
        backlog, settings = self._node.journal.backlog(), self._node.settings
        named = {each.name: each.where for each in settings.destinations}
        # Of a webhook's address the path is left out: with many services it is the secret.
        named |= {each.name: f"webhook at {urlsplit(each.url).netloc}" for each in settings.webhooks}
        if settings.copy_to is not None:
            named[COPY] = str(settings.copy_to)
        gone = [
            name
            for name, states in backlog.items()
            if name not in named and (states.keys() & {"waiting", "stored", "dead"})
        ]
        known = {**named, **dict.fromkeys(gone, "no longer in the settings")}
        return [
            {"name": name, "address": where}
            | {state: backlog.get(name, {}).get(state, 0) for state in ("sent", "stored", "waiting", "dead")}
            for name, where in known.items()
        ]

    def _tabs(self, wanted: Listing) -> list[dict[str, object]]:
        counts = self._node.journal.counts()
        tabs = [("", sum(counts.values())), *((str(state), counts[state]) for state in views.STATES)]
        return [
            {
                "label": label_of_state(name),
                "count": views.thousands(count),
                "here": name == wanted.state,
                "href": wanted.href(state=name),
            }
            for name, count in tabs
            if count or name in ("", wanted.state)
        ]


def _environment() -> Environment:
    # Late: only the node needs it, not the library.
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("ctflow.node.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_printable,
    )
    environment.globals["views"] = views
    filters = [
        views.byte_size, views.day_chart, views.delivered_file, views.destination, views.duration, views.moment,
        views.thousands,
    ]  # fmt: skip
    environment.filters |= {each.__name__: each for each in filters}
    return environment


def _printable(value: object) -> object:
    """A text that any sender may have made, in one line; what a macro made is text already."""
    return views.plain(value) if type(value) is str else value


def _part(name: str) -> bytes:
    return (resources.files("ctflow.node.web") / "templates" / name).read_bytes()


def _retry_label(detail: SeriesDetail, now: float) -> str | None:
    """The button of the series' page: an existing result is sent, never computed again."""
    label = views.retry_label(detail.series, now)
    waits = any(each.state == "waiting" and each.attempts for each in detail.deliveries)
    if detail.series.state == "done" and waits:
        return "Send now"
    return "Send again" if label and detail.results else label


def _classes(detail: SeriesDetail) -> Mapping[str, int]:
    """Number of instances by SOP class and transfer syntax, the most common first."""
    counts = Counter((each.sop_class_uid, each.transfer_syntax) for each in detail.instances)
    return {f"{_uid_name(kind)}, {_uid_name(syntax)}": count for (kind, syntax), count in counts.most_common(10)}


def _uid_name(uid: str) -> str:
    """A name of the DICOM dictionary; an unknown UID may hold anything and stays unnamed."""
    return UID(uid).name if UID(uid).is_valid and UID(uid).name != uid else "another"
