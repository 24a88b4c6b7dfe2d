"""A webhook gets each result once, signed, without patient data unless the site says so; rules choose destinations."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import ssl

import pytest

from certificate_support import Authority
from ctflow.core.errors import DestinationDown, PeerRefused, SettingsInvalid
from ctflow.node.deliver import webhook as module
from ctflow.node.deliver.choose import choose_destinations
from ctflow.node.deliver.send import COPY, WHOLE, DeliveryThread
from ctflow.node.deliver.webhook import DOCUMENT, WebhookTarget, body_of_result
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import ObjectRecord, WorkerResult
from ctflow.node.metrics import Metrics
from ctflow.node.settings.groups import Backoff, Destination
from ctflow.node.settings.service import ServiceSettings, read_settings
from ctflow.node.settings.webhooks import Webhook
from ctflow.node.settings.when import Millilitres, NumberOfFindings, When
from reasons import raises_reason
from service_support import instance, result_with_objects, wait_until
from webhook_support import HookReceiver

SECRET = b"a secret of thirty-two bytes ...."


@pytest.fixture
def receiver():
    made = []

    def make(*statuses, **settings) -> HookReceiver:
        made.append(HookReceiver(*statuses, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    file.chmod(0o600)
    return file


def segment(label="tumour", volume_ml=2.5, components=2) -> dict:
    return {"number": 1, "label": label, "volume_ml": volume_ml, "components": components, "findings": [{"x": 1}]}


def document(*segments, **changes) -> dict:
    return {
        "ctflow_version": "0.1.0", "research_only": None, "statement": None, "warnings": [],
        "series": {"digest": "0123456789ab", "series_instance_uid": "1.2.826.0.3"},
        "model": {"name": "lung", "version": "1", "weights_digest": "0"}, "segments": list(segments), **changes,
    }  # fmt: skip


@pytest.fixture
def result(tmp_path):
    folder = tmp_path / "results" / "key" / "set"
    folder.mkdir(parents=True)
    (folder / DOCUMENT).write_text(json.dumps(document(segment())))
    instance(1).save_as(folder / "segmentation.dcm", enforce_file_format=True)
    return folder


def post(receiver, secret, result, **changes) -> str:
    hook = Webhook("hook", f"http://127.0.0.1:{receiver.port}/a?b=c", secret, **changes)
    with WebhookTarget(hook).open() as channel:
        return channel.send(result, DOCUMENT)


def test_a_request_is_signed_and_names_its_result_and_has_no_patient_data(receiver, secret, result):
    told = receiver()
    assert post(told, secret, result) == " (204)"
    post(told, secret, result)
    (headers, body), (again, same) = told.requests
    expected = hmac.new(SECRET, headers["X-Ctflow-Timestamp"].encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["X-Ctflow-Signature"] == f"sha256={expected}"
    assert (headers["Idempotency-Key"], body) == (again["Idempotency-Key"], same)
    found = json.loads(body)
    assert (found["series"], found["model"]) == ("0123456789ab", {"name": "lung", "version": "1"})
    assert found["volumes"][0]["segments"] == [segment()]
    assert found["objects"] == ["segmentation.dcm"]
    for hidden in (b"SECRET", b"1.2.826", SECRET):
        assert hidden not in body
    assert SECRET.decode() not in str(headers)


def test_patient_data_goes_where_it_is_switched_on(receiver, secret, result):
    told = receiver()
    post(told, secret, result, patient_data=True)
    found = json.loads(told.requests[0][1])
    assert found["series_instance_uid"] == "1.2.826.0.3"
    assert found["patient"] == {
        "PatientName": "SECRET^NAME", "PatientID": "SECRET-ID", "AccessionNumber": "", "StudyInstanceUID": "1.2.826.0.2"
    }  # fmt: skip


@pytest.mark.parametrize("status", [302, 400, 404, 500, 503])
def test_what_is_not_taken_is_named_and_redirects_are_not_followed(receiver, secret, result, status):
    told = receiver(status)
    with raises_reason(PeerRefused, "webhook-refused", names=str(status)):
        post(told, secret, result)
    assert len(told.requests) == 1


def test_who_does_not_answer_or_hangs_is_down(secret, result, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr(module, "ANSWER_S", 0.2)
        hook = Webhook("hook", f"http://127.0.0.1:{port}/", secret)
        with WebhookTarget(hook).open() as channel, raises_reason(DestinationDown, "no-answer"):
            channel.send(result, DOCUMENT)
    with raises_reason(DestinationDown, "no-connection"), WebhookTarget(hook).open():
        pass


def test_a_certificate_must_come_from_the_authority_and_be_valid(receiver, secret, result, tmp_path):
    authority = Authority(tmp_path / "known")
    for name, days, ca in (("good", 30, authority.ca), ("expired", -1, authority.ca), ("unknown", 30, None)):
        pair = authority.issue(name, days=days)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate, pair.key)
        told = receiver(tls=context)
        hook = Webhook("hook", f"https://127.0.0.1:{told.port}/", secret, ca=ca)
        if name == "good":
            with WebhookTarget(hook).open() as channel:
                assert channel.send(result, DOCUMENT) == " (204)"
            continue
        with raises_reason(DestinationDown, "tls"), WebhookTarget(hook).open():
            pass
        assert told.requests == []


def test_a_secret_that_will_not_do_is_named_without_its_content(tmp_path, result, receiver):
    told = receiver()
    for content in (b"short", b"x" * 5000):
        (tmp_path / "bad").write_bytes(content)
        (tmp_path / "bad").chmod(0o600)
        with raises_reason(DestinationDown, "webhook-secret"):
            post(told, tmp_path / "bad", result)
    with raises_reason(DestinationDown, "webhook-secret"):
        post(told, tmp_path / "absent", result)
    (tmp_path / "open").write_bytes(SECRET)
    (tmp_path / "open").chmod(0o640)
    with raises_reason(DestinationDown, "webhook-secret"):
        post(told, tmp_path / "open", result)
    assert told.requests == []


def test_a_body_is_bounded_and_says_that_it_was_shortened(result):
    many = segment() | {"findings": [{"text": "x" * 1000}] * 2000}
    (result / DOCUMENT).write_text(json.dumps(document(many)))
    body = body_of_result(result, patient_data=False)
    assert len(body) < module.LARGEST_BODY
    assert json.loads(body)["shortened"]
    (result / DOCUMENT).write_text("{}")
    with raises_reason(PeerRefused, "object-unreadable"):
        body_of_result(result, patient_data=False)


def test_a_delivery_is_tried_again_until_it_is_taken(receiver, secret, tmp_path):
    told = receiver(500, 429, 200)
    journal, results = Journal(tmp_path / "journal.sqlite3"), tmp_path / "data"
    key = result_with_objects(journal, results, 1, [("hook", DOCUMENT)])
    (folder,) = (results / key).iterdir()
    (folder / DOCUMENT).write_text(json.dumps(document(segment())))
    target = WebhookTarget(Webhook("hook", f"http://127.0.0.1:{told.port}/", secret))
    thread = DeliveryThread("hook", target, journal, results, Backoff(0.1, 0.2, 3600.0), Metrics(journal, tmp_path))
    thread.start()
    try:
        wait_until(lambda: journal.find(key).state == "delivered", "it is delivered")
    finally:
        thread.stop()
    texts = [event.text for event in journal.events(key=key)]
    journal.close()
    assert len(told.requests) == 3
    assert len({headers["Idempotency-Key"] for headers, _ in told.requests}) == 1
    assert "result.json to hook (200)" in texts
    assert SECRET.decode() not in " ".join(texts)


@pytest.mark.parametrize(
    "url", ["http://example.org/", "ftp://127.0.0.1/", "https://user:pw@example.org/", "https://", "https://a b/"]
)
def test_an_address_that_will_not_do_is_refused(tmp_path, url):
    config = tmp_path / "node.yaml"
    config.write_text(f"webhooks: [{{name: a, url: '{url}', secret_file: s}}]\n")
    with raises_reason(SettingsInvalid, "invalid-value", names="url"):
        read_settings(config, {"HOME": "/none"})


ANSWER = WorkerResult("key/set", "lung", "1", "w", False, 0.1, (ObjectRecord("segmentation.dcm", "1", "2", ""),))


@pytest.mark.parametrize(
    ("when", "why"),
    [
        (When(volume_ml=Millilitres(min=1)), ""),
        (When(volume_ml=Millilitres(min=5)), "volume_ml is 2.50"),
        (When(findings=NumberOfFindings(min=3)), "findings are 2"),
        (When(findings=NumberOfFindings(max=2)), ""),
        (When(volume_ml=Millilitres(max=1), segments=("lung",)), ""),
        (When(segments=("liver",)), "no such segment is marked"),
        (When(segments=("tumour",)), ""),
        (When(volume_ml=Millilitres(min=1), model=("other",)), "another model"),
    ],
)
def test_conditions_choose_and_the_audit_says_why(tmp_path, result, when, why):
    settings = ServiceSettings(
        data=tmp_path, copy_to=tmp_path / "copies",
        destinations=(
            Destination("pacs", "PACS", "127.0.0.1", 104),
            Destination("follow", "F", "127.0.0.1", 104, when=when),
        ),
        webhooks=(Webhook("hook", "http://127.0.0.1/", tmp_path / "secret", when=when),),
    )  # fmt: skip
    choice = choose_destinations(settings, tmp_path / "results", ANSWER)
    always = [("pacs", "segmentation.dcm"), (COPY, WHOLE)]
    chosen = [("follow", "segmentation.dcm"), ("hook", DOCUMENT)]
    assert list(choice.deliveries) == ([always[0], *([] if why else chosen), always[1]])
    assert choice.text == (f"to pacs; not to follow ({why}), hook ({why})" if why else "to pacs, follow, hook")


def test_a_result_that_cannot_be_read_goes_everywhere_and_one_of_several_volumes_is_enough(tmp_path, result):
    settings = ServiceSettings(
        data=tmp_path, destinations=(Destination("a", "A", "b", 104, when=When(volume_ml=Millilitres(min=5))),)
    )
    volumes = {"series": [document(segment()), document(segment(volume_ml=6.0))], "set_aside": []}
    (result / DOCUMENT).write_text(json.dumps(volumes))
    assert choose_destinations(settings, tmp_path / "results", ANSWER).text == "to a"
    (result / DOCUMENT).write_text("{")
    choice = choose_destinations(settings, tmp_path / "results", ANSWER)
    assert choice.deliveries == (("a", "segmentation.dcm"),)
    assert "no condition was applied" in choice.text
    assert choose_destinations(ServiceSettings(data=tmp_path), tmp_path, ANSWER).text == ""
