"""The page over HTTP, as a browser and an attacker ask for it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import re
import shutil
import socket
from html.parser import HTMLParser
from urllib.parse import urlencode

import pytest

from ctflow.core.errors import SettingsInvalid
from ctflow.node.deliver.send import COPY, WHOLE
from ctflow.node.journal.records import DecidedRun, Why, WorkerResult
from ctflow.node.journal.runs import QueueRules
from ctflow.node.web import pages
from ctflow.node.web.pages import ROWS
from ctflow.node.web.server import serving
from node_support import PACS, PATIENT, Ward, fill_busy

HOSTILE = "<script>alert(1)</script>\"'&\u202e\x00{{ 7 * 7 }}"


class Visitor:
    """A browser without a window: keeps the cookie, sends forms as browsers do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cookie: str | None = None

    def ask(self, method: str, path: str, body: bytes | None = None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Host": f"localhost:{self.port}", **({"Cookie": self.cookie} if self.cookie else {})}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {name: value for name, value in sent.items() if value is not None})
        answer = connection.getresponse()
        answer.content = answer.read()
        connection.close()
        if cookie := answer.getheader("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        return answer

    def page(self, path: str, status: int = 200) -> str:
        answer = self.ask("GET", path)
        assert answer.status == status, answer.content
        return answer.content.decode()

    def form(self, page: str, action: str, **changed):
        """Send the form of a page that goes to this address."""
        token = re.search(rf'action="{action}"><(?:p>.*?</p><)?input type="hidden" name="token" value="(\w+)"', page)
        assert token, f"no form for {action}"
        return self.post(action, token[1], **changed)

    def post(self, action: str, token: str, **changed):
        headers = {
            "Content_Type": "application/x-www-form-urlencoded",
            "Origin": f"http://localhost:{self.port}",
            "Sec_Fetch_Site": "same-origin",
        }
        return self.ask("POST", action, urlencode({"token": token}).encode(), **{**headers, **changed})


@pytest.fixture
def visitor(ward):
    with serving(ward.node) as port:
        yield Visitor(port)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found |= {value for name, value in attrs if name in ("href", "src", "action") and value}
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: str) -> Links:
    links = Links()
    links.feed(page)
    links.close()
    return links


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(parsed(page).text))


def test_an_empty_node_says_how_to_send(visitor):
    shown = text_of(visitor.page("/"))
    assert "Nothing has come in yet." in shown
    assert "storescu --scan-directories -aec CTFLOW 127.0.0.1 11112 DIR" in shown
    assert "Nothing has happened yet." in text_of(visitor.page("/events"))


def test_the_list_says_what_came_what_runs_and_what_failed_and_why(ward, visitor):
    keys = fill_busy(ward)
    page = visitor.page("/")
    shown = text_of(page)
    for key in keys.values():
        assert f"/series/{key}" in parsed(page).found
        assert ward.journal.find(key).digest in shown
    for words in (
        "17 of 64",
        "Receiving",
        "Running",
        "slices are 2.5 mm apart, but 5 mm at one place",
        "not delivered to pacs: PeerRefused",
        "DeviceOutOfMemory",
        "pacs ARCHIVE at 10.1.2.3:11112 13 sent 1 waiting 2 failed",
        "Need a look 2 1 failed, 1 set aside",
    ):
        assert words in shown


def test_every_link_of_every_page_leads_somewhere(ward, visitor, result_folder):
    fill_busy(ward, result_folder)
    seen, waiting = set(), ["/"]
    while waiting:
        path = waiting.pop()
        answer = visitor.ask("GET", path)
        assert answer.status == 200, path
        seen.add(path)
        if answer.getheader("Content-Type", "").startswith("text/html") and not path.endswith("report.html"):
            links = {link for link in parsed(answer.content.decode()).found if not link.startswith("#")}
            assert all(link.startswith("/") and not link.startswith("//") for link in links), path
            new = {link.replace("&amp;", "&") for link in links if not re.search("/(retry|discard)$", link)}
            waiting += sorted(new - seen - set(waiting))
    assert {"/style.css", "/icon.svg", "/events", "/?state=attention", "/?refresh=1"} <= seen
    assert len([path for path in seen if path.endswith("preview.png")]) == 8
    assert len([path for path in seen if path.endswith("report.html")]) == 8


def test_a_list_of_many_has_pages_that_show_each_once(ward, visitor):
    keys = [ward.receive(str(number)) for number in range(2 * ROWS + 7)]
    path, shown, pages = "/", [], 0
    while path:
        page = visitor.page(path)
        shown += re.findall(r'href="/series/(\w{32})"', page)
        older = re.search(r'href="([^"]+)">Older', page)
        path, pages = older[1].replace("&amp;", "&") if older else "", pages + 1
    assert shown == keys[::-1]
    assert pages == 3
    assert "Newest" in page


def test_series_of_the_same_moment_are_all_shown(ward, visitor):
    ward.clock.now, moment = ward.clock.now, ward.clock.now
    keys = set()
    for number in range(2 * ROWS + 7):
        keys.add(ward.receive(str(number)))
        ward.clock.now = moment
    path, shown = "/", []
    while path:
        page = visitor.page(path)
        shown += re.findall(r'href="/series/(\w{32})"', page)
        older = re.search(r'href="([^"]+)">Older', page)
        path = older[1].replace("&amp;", "&") if older else ""
    assert len(shown) == len(keys)
    assert set(shown) == keys


def test_a_page_of_exactly_all_rows_has_no_older_one(ward, visitor):
    for number in range(ROWS):
        ward.receive(str(number))
    assert "Older" not in visitor.page("/")
    assert "There are no older series." in visitor.page(f"/?before=1_{'0' * 32}")


def test_a_state_is_listed_alone(ward, visitor):
    keys = fill_busy(ward)
    assert re.findall(r'href="/series/(\w{32})"', visitor.page("/?state=aside")) == [keys["aside"]]
    attention = re.findall(r'href="/series/(\w{32})"', visitor.page("/?state=attention"))
    assert set(attention) == {keys["aside"], keys["dead"]}
    ward.journal.retry(keys["aside"])
    assert "No series is in this state." in visitor.page("/?state=aside")


@pytest.mark.parametrize(
    "query",
    [
        "state=gone",
        "state='",
        "before=x",
        "before=nan",
        "before=-1",
        "before=inf",
        "before=1e300",
        "before=1",
        "before=1_a",
    ],
)
def test_a_list_that_does_not_exist_is_not_found(visitor, query):
    assert "There is no such list" in visitor.page(f"/?{query}", 404)


def test_the_list_refreshes_only_if_asked_to(visitor):
    assert 'http-equiv="refresh"' not in visitor.page("/")
    assert '<meta http-equiv="refresh" content="10">' in visitor.page("/?refresh=1")


def test_the_page_of_a_series_shows_its_result_deliveries_and_events(ward, visitor, result_folder):
    keys = fill_busy(ward, result_folder)
    page = visitor.page(f"/series/{keys['late']}")
    shown = text_of(page)
    document = json.loads((result_folder / "result.json").read_text())
    for words in (
        document["segments"][0]["label"],
        f"{document['segments'][0]['volume_ml']:.2f}" if document["segments"][0]["voxels"] else "-",
        "RESEARCH ONLY - NOT FOR CLINICAL USE",
        "eager fp32 on cpu",
        "CT Image Storage, Explicit VR Little Endian",
        "DestinationDown: 10.1.2.3:11112 does not answer",
        "received from ORTHANC",
        "attempt 1, 20 instances",
    ):
        assert words in shown
    assert "Send now" in shown


def test_a_delivery_says_when_it_is_tried_again_and_an_event_what_it_is_called(ward, visitor):
    key = ward.done("1")
    ward.journal.not_sent(1, Why("no-answer", "DestinationDown: x"), 30.0)
    ward.journal.event("dead", "text")
    ward.journal.event("brand-new", "text")
    shown = text_of(visitor.page(f"/series/{key}"))
    assert "again in 30 s" in shown
    assert "DestinationDown: x" in shown
    ward.journal.sent(1, "sent")
    assert "again in" not in text_of(visitor.page(f"/series/{key}"))
    events = text_of(visitor.page("/events"))
    assert "failed text" in events
    assert "brand-new text" in events


def test_only_what_can_be_discarded_has_a_button_for_it(ward, visitor):
    assert "/discard" in visitor.page(f"/series/{ward.done('1')}")
    assert "/discard" not in visitor.page(f"/series/{ward.delivered('2')}")


def test_preview_and_report_are_those_of_the_result(ward, visitor, result_folder):
    key = ward.delivered("1", result=result_folder)
    preview = visitor.ask("GET", f"/series/{key}/results/1/preview.png")
    assert preview.getheader("Content-Type") == "image/png"
    assert preview.content == (result_folder / "preview.png").read_bytes()
    report = visitor.ask("GET", f"/series/{key}/results/1/report.html")
    assert report.content == (result_folder / "report.html").read_bytes()
    assert report.getheader("Content-Security-Policy").startswith("sandbox")


def test_each_volume_of_a_series_has_its_preview_and_report(ward, visitor, result_folder):
    key = ward.delivered("1")
    folder, documents = ward.results / key, []
    for percent in (40, 75):
        shutil.copytree(result_folder, folder / f"phase-{percent}")
        document = json.loads((result_folder / "result.json").read_text())
        document["series"]["volume"] = {"name": f"phase-{percent}", "label": f"phase {percent} %"}
        documents.append(document | {"folder": f"phase-{percent}"})
    (folder / "result.json").write_text(json.dumps({"series": documents}))
    page = visitor.page(f"/series/{key}")
    for percent in (40, 75):
        assert f"Result, phase {percent} %" in page
        where = f"/series/{key}/results/1/phase-{percent}"
        assert f"{where}/report.html" in page
        assert visitor.ask("GET", f"{where}/preview.png").content == (result_folder / "preview.png").read_bytes()
    for volume in ("phase-50", "..", ".", "%2e%2e", "phase-40%2f.."):
        assert visitor.ask("GET", f"/series/{key}/results/1/{volume}/report.html").status == 404


def test_a_result_whose_files_are_gone_or_damaged_says_so(ward, visitor, result_folder):
    key = ward.delivered("1")
    assert "Its files are no longer in the data folder." in visitor.page(f"/series/{key}")
    visitor.page(f"/series/{key}/results/1/preview.png", 404)
    for content in (b"", b"{}", b"[]", b"\xff", b'{"engine": {"backend": 1}}'):
        (ward.results / key).mkdir(exist_ok=True)
        (ward.results / key / "result.json").write_bytes(content)
        assert "result.json cannot be read" in visitor.page(f"/series/{key}")


@pytest.mark.parametrize(
    "path",
    [
        "/series/none",
        "/series/..%2f..%2fetc%2fpasswd",
        "/series/{key}/results/2/preview.png",
        "/series/{key}/results/x/preview.png",
        "/series/{key}/results/-1/preview.png",
        "/series/{key}/results/%D9%A3/preview.png",
        "/series/{key}/results/99999999999999999999/preview.png",
        "/series/{other}/results/1/preview.png",
        "/series/{key}/results/1/result.json",
        "/series/{key}/results/1/../../../journal.sqlite3",
        "/favicon.ico",
        "/templates/base.html",
        "//",
    ],
)
def test_what_is_not_there_is_not_found(ward, visitor, result_folder, path):
    key, other = ward.delivered("1", result=result_folder), ward.receive("2")
    answer = visitor.ask("GET", path.format(key=key, other=other))
    assert answer.status == 404
    assert b"There is no such page" in answer.content


def test_no_patient_data_is_shown_unless_it_is_switched_on(tmp_path, result_folder):
    secrets = ("Doe^Jane", "PID-4711", "19500102", "A-99", "1.2.77", "<bdi>1.2.3<")
    for patient_data in (False, True):
        ward = Ward(tmp_path / str(patient_data), patient_data=patient_data)
        key = ward.delivered("77", 3, patient=PATIENT, result=result_folder)
        with serving(ward.node) as port:
            visitor = Visitor(port)
            pages = [visitor.page(path) for path in ("/", "/events", f"/series/{key}", "/metrics", "/readyz")]
        assert [secret in "".join(pages) for secret in secrets] == [patient_data] * 6
        ward.close()


def test_what_a_sender_says_is_shown_as_text(tmp_path):
    patient = type(PATIENT)(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    ward = Ward(tmp_path / "node", patient_data=True)
    key = ward.undeliverable(
        "1", 2, calling_ae=HOSTILE, peer=HOSTILE, modality=HOSTILE, patient=patient, series_uid=HOSTILE,
        study_uid=HOSTILE, sop_class_uid=HOSTILE, transfer_syntax=HOSTILE,
    )  # fmt: skip
    ward.journal.event("strange", HOSTILE, key=key, peer=HOSTILE)
    ward.journal.not_sent(1, Why(HOSTILE, HOSTILE), None)
    with serving(ward.node) as port:
        visitor = Visitor(port)
        for path in ("/", "/events", f"/series/{key}"):
            page = visitor.page(path)
            links = parsed(page)  # an attribute that was broken out of would fail here
            assert "script" not in links.tags
            assert "<script>alert(1)</script>" in "".join(links.text)
            assert "\u202e" not in page
            assert "\x00" not in page
            assert "{{ 7 * 7 }}" in page
    ward.close()


def test_a_hostile_result_is_shown_as_text(ward, visitor, result_folder):
    key = ward.delivered("1", result=result_folder)
    file = ward.results / key / "result.json"
    document = json.loads(file.read_text())
    document["segments"][0]["label"] = HOSTILE
    document["warnings"] = [HOSTILE]
    document["research_only"] = HOSTILE
    file.write_text(json.dumps(document))
    page = visitor.page(f"/series/{key}")
    assert "script" not in parsed(page).tags
    assert "<script>alert(1)</script>" in "".join(parsed(page).text)


# ------------------------------------------------------------------------------------------------------------ forms


def test_a_series_is_tried_again_by_its_button(ward, visitor):
    key = fill_busy(ward)["aside"]
    answer = visitor.form(visitor.page("/"), f"/series/{key}/retry")
    assert (answer.status, answer.getheader("Location")) == (303, f"/series/{key}")
    assert ward.journal.find(key).state == "complete"
    event = ward.journal.events(key=key, limit=1)[0]
    assert (event.kind, event.text) == ("retried", "by the page, 127.0.0.1")


def test_a_series_is_discarded_by_its_button_and_can_be_tried_again(ward, visitor):
    key = fill_busy(ward)["complete"]
    assert visitor.form(visitor.page(f"/series/{key}"), f"/series/{key}/discard").status == 303
    assert ward.journal.find(key).state == "discarded"
    assert visitor.form(visitor.page(f"/series/{key}"), f"/series/{key}/retry").status == 303
    assert ward.journal.find(key).state == "complete"


def test_a_result_that_was_not_delivered_is_sent_again_and_not_computed_again(ward, visitor):
    key = fill_busy(ward)["dead"]
    page = visitor.page(f"/series/{key}")
    assert "Send again" in page
    visitor.form(page, f"/series/{key}/retry")
    assert ward.journal.find(key).state == "done"
    assert len(ward.journal.due("pacs", ward.clock.now, limit=10)) == 2


def test_a_button_pressed_too_late_changes_nothing_and_says_so(ward, visitor):
    key = fill_busy(ward)["aside"]
    page = visitor.page("/")
    ward.journal.retry(key)
    job = ward.journal.claim()
    while job.key != key:
        job = ward.journal.claim()
    answer = visitor.form(page, f"/series/{key}/retry")
    assert answer.status == 409
    assert b"Nothing was changed" in answer.content
    assert ward.journal.find(key).state == "running"


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "http://evil.example.org"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Cookie": None},
        {"Cookie": "ctflow=" + "a" * 32},
        {"Content_Type": "text/plain"},
        {"Content_Type": "multipart/form-data; boundary=x"},
        {"Content_Type": None},
    ],
)
def test_a_form_of_another_page_changes_nothing(ward, visitor, changed):
    key = fill_busy(ward)["aside"]
    answer = visitor.form(visitor.page("/"), f"/series/{key}/retry", **changed)
    assert answer.status == 403
    assert b"Nothing was changed" in answer.content
    assert ward.journal.find(key).state == "aside"


@pytest.mark.parametrize(
    "body", [b"", b"token=", b"token=x", b"\xff=", b"a=" + b"x" * 100_000, b"&" * 3000 + b"=" * 900]
)
def test_a_form_without_its_token_changes_nothing(ward, visitor, body):
    key = fill_busy(ward)["aside"]
    visitor.page("/")
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    assert visitor.ask("POST", f"/series/{key}/retry", body, **form).status == 403
    assert ward.journal.find(key).state == "aside"


def test_a_token_of_one_action_does_not_do_another(ward, visitor):
    key = fill_busy(ward)["aside"]
    page = visitor.page("/")
    token = re.search(rf'/series/{key}/retry"><input type="hidden" name="token" value="(\w+)"', page)[1]
    assert visitor.post(f"/series/{key}/discard", token).status == 403
    assert ward.journal.find(key).state == "aside"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/"), ("GET", "/series/x/retry"), ("PUT", "/events"), ("DELETE", "/")]
)
def test_a_method_that_an_address_does_not_take_is_refused(visitor, method, path):
    answer = visitor.ask(method, path)
    assert answer.status == 405
    assert b"This action is not possible here" in answer.content


# ---------------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("host", ["evil.example.org", "evil.example.org:8113", "127.0.0.1.evil.example.org", ""])
def test_a_name_that_was_made_to_lead_here_is_refused(ward, visitor, host):
    fill_busy(ward)
    for path in ("/", "/metrics", "/healthz", "/style.css", "/nowhere"):
        answer = visitor.ask("GET", path, Host=host)
        assert answer.status in (400, 421)
        assert b"series" not in answer.content.lower()


def test_names_of_the_settings_are_accepted(tmp_path):
    ward = Ward(tmp_path / "node", hosts=("node.example.org",))
    with serving(ward.node) as port:
        assert Visitor(port).ask("GET", "/", Host=f"node.example.org:{port}").status == 200
    ward.close()


def test_every_answer_has_the_headers_that_keep_it_apart(ward, visitor, result_folder):
    key = ward.delivered("1", result=result_folder)
    for path in ("/", "/nowhere", "/style.css", "/metrics", f"/series/{key}/results/1/preview.png", "/series/none"):
        answer = visitor.ask("GET", path)
        policy = answer.getheader("Content-Security-Policy")
        assert policy.startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in policy
        assert "script" not in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Cache-Control") == "no-store"
        assert answer.getheader("Server") is None


def test_the_cookie_is_kept_from_scripts_and_other_sites(visitor):
    answer = visitor.ask("GET", "/")
    cookie = answer.getheader("Set-Cookie").lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert visitor.ask("GET", "/").getheader("Set-Cookie") is None
    assert visitor.ask("GET", "/style.css", Cookie=None).getheader("Set-Cookie") is None


def test_an_unexpected_error_is_logged_and_shows_nothing_of_itself(ward, visitor, monkeypatch, caplog):
    def fail():
        raise RuntimeError("Doe^Jane")

    monkeypatch.setattr(ward.journal, "counts", fail)
    with caplog.at_level(logging.ERROR):
        answer = visitor.ask("GET", "/")
    assert answer.status == 500
    assert b"Doe" not in answer.content
    assert [record.message for record in caplog.records if record.name.startswith("ctflow")] == [
        "a page could not be rendered"
    ]


# ------------------------------------------------------------------------------------------------------ for machines


def test_health_readiness_and_metrics(ward, visitor):
    assert visitor.page("/healthz") == "ok\n"
    assert json.loads(visitor.page("/readyz")) == {"ready": True, "problems": [], "remarks": []}
    assert "ctflow_series{state=" in visitor.page("/metrics")


def test_a_node_that_is_not_ready_says_why(ward, visitor):
    ward.problems.append("Instances are refused: 3 GB are free")
    assert json.loads(visitor.page("/readyz", 503)) == {"ready": False, "problems": ward.problems, "remarks": []}
    assert visitor.page("/healthz") == "ok\n"
    shown = text_of(visitor.page("/"))
    assert "Not ready" in shown
    assert ward.problems[0] in shown


def test_a_node_without_one_of_its_workers_is_ready_and_says_so(ward, visitor):
    ward.remarks.append("worker 1 is not open")
    assert json.loads(visitor.page("/readyz")) == {"ready": True, "problems": [], "remarks": ["worker 1 is not open"]}
    shown = text_of(visitor.page("/"))
    assert "Not ready" not in shown
    assert "worker 1 is not open" in shown


def test_the_audit_trail_is_shown_in_pages(ward, visitor, monkeypatch):
    monkeypatch.setattr(pages, "_EVENTS", 3)
    for number in range(7):
        ward.journal.event("note", f"note number {number}")
    shown, address = [], "/events"
    while address:
        page = visitor.page(address)
        shown += re.findall("note number [0-9]", text_of(page))
        following = re.search(r'href="(/events\?before=[0-9]+)"', page)
        address = following[1] if following and len(shown) < 9 else None
    assert shown == [f"note number {number}" for number in reversed(range(7))]
    assert 'href="/events"' in page
    visitor.page("/events?before=x", 404)
    assert "There are no older events" in text_of(visitor.page("/events?before=1"))


def test_a_demonstration_model_is_named_on_every_page(tmp_path):
    ward = Ward(tmp_path / "node", demonstration="RESEARCH ONLY: x is a demonstration model.")
    with serving(ward.node) as port:
        for path in ("/", "/events"):
            assert "RESEARCH ONLY: x is a demonstration model." in text_of(Visitor(port).page(path))
    ward.close()


def test_a_destination_that_is_no_longer_in_the_settings_is_shown_while_something_waits_for_it(ward):
    ward.done("1")
    node = dataclasses.replace(ward.node, settings=dataclasses.replace(ward.settings, destinations=(PACS,)))
    with serving(node) as port:
        assert "backup no longer in the settings 0 sent 2 waiting 0 failed" in text_of(Visitor(port).page("/"))
        for number in (3, 4):
            ward.journal.sent(number, "sent")
        assert "backup" not in text_of(Visitor(port).page("/"))


def test_the_folder_of_copies_is_a_destination(ward, tmp_path):
    job = ward.run("1")
    answer = WorkerResult(job.key, "lung", "1.0", "ab", False, 1.0, ())
    ward.journal.commit(job, answer, [(COPY, WHOLE)])
    node = dataclasses.replace(ward.node, settings=dataclasses.replace(ward.settings, copy_to=tmp_path / "copies"))
    with serving(node) as port:
        visitor = Visitor(port)
        assert f"folder of copies {tmp_path / 'copies'} 0 sent 1 waiting" in text_of(visitor.page("/"))
        assert "folder of copies the whole result Waiting" in text_of(visitor.page(f"/series/{job.key}"))


def test_an_address_that_is_taken_is_named(ward):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        web = dataclasses.replace(ward.settings.web, port=port)
        other = dataclasses.replace(ward.node, settings=dataclasses.replace(ward.settings, web=web))
        with pytest.raises(SettingsInvalid, match=rf"cannot listen on 127\.0\.0\.1:{port} ") as caught, serving(other):
            pass
    assert caught.value.reason == "cannot-listen"


def several_models(ward) -> str:
    """A series of which one model has a result and another was set aside; its key."""
    ward.journal.order_by(QueueRules(decides=True))
    key = ward.complete("77", 2)
    why = Why("body-part", "no <abdomen>")
    runs = [DecidedRun("lung_tumour", 1), DecidedRun("body", 0, why)]
    assert ward.journal.decide(ward.journal.claim(), runs)
    answer = WorkerResult(f"{key}/x", "net", "1.0", "ab", False, 1.0, ())
    assert ward.journal.commit(ward.journal.claim(), answer, [("pacs", "segmentation.dcm")])
    return key


def test_a_series_shows_each_models_state_and_each_can_be_retried_alone(ward, visitor):
    key = several_models(ward)
    ward.complete("78")
    page = visitor.page(f"/series/{key}")
    shown = text_of(page)
    assert "lung_tumour urgent Result ready" in shown
    assert "body Set aside no <abdomen>" in shown
    assert "Result of lung_tumour" in shown
    assert visitor.form(page, f"/series/{key}/models/body/retry").status == 303
    assert {run.model: run.state for run in ward.journal.runs(key)} == {"lung_tumour": "done", "body": "complete"}
    page = visitor.page(f"/series/{key}")
    assert visitor.form(page, f"/series/{key}/models/body/discard").status == 303
    assert {run.model: run.state for run in ward.journal.runs(key)} == {"lung_tumour": "done", "body": "discarded"}
    token = re.search(r'models/lung_tumour/discard"><input type="hidden" name="token" value="(\w+)"', page)[1]
    assert visitor.post(f"/series/{key}/models/other/discard", token).status == 403


def test_the_list_can_be_of_one_model(ward, visitor):
    key = several_models(ward)
    other = ward.complete("78")
    assert f"/series/{key}" in visitor.page("/?model=body")
    assert f"/series/{other}" not in visitor.page("/?model=body")
    assert "No series matches" in text_of(visitor.page("/?model=none"))
    assert visitor.page("/?model=" + "a" * 33, 404)
    assert visitor.page("/?model=%27--", 404)


def test_the_page_of_a_node_with_one_model_has_no_table_of_models(ward, visitor):
    assert 'id="models"' not in visitor.page(f"/series/{ward.done('1')}")
