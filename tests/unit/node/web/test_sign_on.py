"""Who may look, act, scrape and send, over HTTP."""

from __future__ import annotations

import base64
import http.client
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlencode

import pytest

from ctflow import __version__
from ctflow.core.errors import SettingsInvalid
from ctflow.node.access.sign_on import Asked, SignOn
from ctflow.node.access.users import TooBusy, User, Users, hash_of_password, write_users
from ctflow.node.settings.values import read_network
from ctflow.node.settings.web import Proxy, Web
from node_support import fill_busy
from reasons import raises_reason
from service_support import instance
from stow_support import StowNode, file_of, multipart, post

PASSWORDS = {"vera": "view", "olga": "operate", "adam": "admin", "scan": "send"}
LOOPBACK = (read_network("127.0.0.1"),)


@pytest.fixture(scope="session")
def hashes():
    return {name: hash_of_password(f"password of {name}") for name in PASSWORDS}


@pytest.fixture
def users(tmp_path, hashes):
    file = tmp_path / "users"
    write_users(file, {name: User(name, role, hashes[name]) for name, role in PASSWORDS.items()})
    return file


@pytest.fixture
def opened(tmp_path):
    """Makes nodes whose page listens."""
    made = []

    def make(**web) -> StowNode:
        node = StowNode(tmp_path / f"node{len(made)}", **web)
        context = node.listening()
        context.__enter__()
        made.append((node, context))
        return node

    yield make
    for node, context in made:
        context.__exit__(None, None, None)
        node.close()


@pytest.fixture
def local(opened, users):
    return opened(sign_on="local", users_file=users)


class Visitor:
    """A browser: it keeps cookies and fills in forms."""

    def __init__(self, port: int, **headers) -> None:
        self.port, self.cookie, self.headers, self.status = port, "", headers, 0

    def ask(self, path: str, fields: dict | None = None) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Cookie": self.cookie, **self.headers}
        if fields is None:
            connection.request("GET", path, headers=headers)
        else:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request("POST", path, urlencode(fields), headers)
        self.answer = connection.getresponse()
        text = self.answer.read().decode("utf-8", "replace")
        self.status = self.answer.status
        if (given := self.answer.headers["Set-Cookie"]) is not None:
            self.cookie = given.partition(";")[0]
        connection.close()
        return text

    def sign_in(self, name: str, password: str | None = None, path: str = "/sign-in") -> str:
        page = self.ask(path)
        token = re.search('name="token" value="([0-9a-f]+)"', page)[1]
        following = re.search('name="next" value="([^"]*)"', page)[1]
        fields = {"name": name, "password": password or f"password of {name}", "token": token, "next": following}
        return self.ask("/sign-in", fields)


def token_in(page: str, action: str) -> str:
    """The token of a form."""
    return re.search(f'action="{action}"><input type="hidden" name="token" value="([0-9a-f]+)"', page)[1]


def events(node: StowNode) -> list[tuple[str, str]]:
    return [(event.kind, event.text) for event in reversed(node.journal.events(limit=100))]


def test_without_a_session_nothing_of_the_node_is_shown(local):
    keys = fill_busy(local)
    local.problems.append("SECRET problem")
    visitor = Visitor(local.port)
    for path in ("/", "/events", f"/series/{keys['dead']}", f"/series/{keys['dead']}/results/1/report.html"):
        visitor.ask(path)
        assert visitor.status == 303
        assert visitor.answer.headers["Location"].startswith("/sign-in")
    page = visitor.ask("/sign-in")
    assert visitor.status == 200
    assert "SECRET" not in page
    assert __version__ not in page
    assert "11112" not in page
    assert visitor.ask("/style.css")
    assert visitor.status == 200
    visitor.ask(f"/series/{keys['dead']}/retry", {"token": "x"})
    assert visitor.status == 403


def test_a_user_signs_in_acts_and_signs_out_and_the_trail_names_the_user(local):
    keys = fill_busy(local)
    visitor = Visitor(local.port)
    before = Visitor(local.port)
    before.ask("/sign-in")
    visitor.cookie = before.cookie
    visitor.sign_in("olga", path=f"/sign-in?next=%2Fseries%2F{keys['aside']}")
    assert (visitor.status, visitor.answer.headers["Location"]) == (303, f"/series/{keys['aside']}")
    assert visitor.cookie != before.cookie, "a session that another may know is not signed in"
    assert re.search("HttpOnly.*SameSite=lax", visitor.answer.headers["Set-Cookie"])
    page = visitor.ask(f"/series/{keys['aside']}")
    assert "olga" in page
    before.ask("/")
    assert before.status == 303
    token = re.search(
        f'action="/series/{keys["aside"]}/retry"><input type="hidden" name="token" value="([0-9a-f]+)"', page
    )
    visitor.ask(f"/series/{keys['aside']}/retry", {"token": token[1]})
    assert visitor.status == 303
    kept = visitor.cookie
    visitor.ask("/sign-out", {"token": token_in(page, "/sign-out")})
    visitor.cookie = kept
    visitor.ask("/")
    assert visitor.status == 303
    found = [event for event in events(local) if event[0] in ("signed-in", "retried", "signed-out")]
    assert found == [("signed-in", "olga as operate"), ("retried", "by olga, 127.0.0.1"), ("signed-out", "olga")]


def test_who_may_only_look_has_no_buttons_and_no_use_of_them(opened):
    node = proxied(opened)
    keys = fill_busy(node)
    again = f"/series/{keys['aside']}/retry"
    visitor = Visitor(node.port, **{"X-User": "vera", "X-Roles": "operate"})
    token = token_in(visitor.ask(f"/series/{keys['aside']}"), again)
    visitor.headers["X-Roles"] = "view"
    page = visitor.ask(f"/series/{keys['aside']}")
    assert visitor.status == 200
    assert "Try again" not in page
    assert "Discard" not in page
    assert "Try again" not in visitor.ask("/")
    assert "does not include this" in visitor.ask(again, {"token": token})
    assert visitor.status == 403
    assert node.journal.find(keys["aside"]).state == "aside"
    visitor.headers["X-Roles"] = "operate"
    visitor.ask(again, {"token": token})
    assert node.journal.find(keys["aside"]).state == "complete"


@pytest.mark.parametrize(
    ("name", "password", "status", "said", "event"),
    [
        ("olga", "wrong password", 401, "Name or password is wrong", "wrong password for olga"),
        ("nobody", "wrong password", 401, "Name or password is wrong", "unknown user"),
        ("password of olga", "x", 401, "Name or password is wrong", "unknown user"),
        ("scan", None, 403, "may only send", "scan may only send"),
    ],
)
def test_a_refused_sign_in_says_nothing_about_names_and_is_in_the_trail(local, name, password, status, said, event):
    visitor = Visitor(local.port)
    assert said in visitor.sign_in(name, password)
    assert visitor.status == status
    assert ("sign-in-refused", event) in events(local)
    visitor.ask("/")
    assert visitor.status == 303


def test_many_attempts_are_not_looked_at(local):
    visitor = Visitor(local.port)
    statuses = []
    for _ in range(12):
        visitor.sign_in("olga", "wrong password")
        statuses.append(visitor.status)
    assert statuses == [401] * 10 + [429] * 2
    visitor.sign_in("olga")
    assert visitor.status == 429
    assert [kind for kind, text in events(local) if "too many" in text] == ["sign-in-refused"]


def test_a_password_that_is_not_looked_at_counts_as_no_attempt(local, monkeypatch):
    """Others may keep the node busy with passwords: a user would be locked out by right ones."""
    visitor, statuses = Visitor(local.port), []

    @contextmanager
    def busy(_):
        raise TooBusy
        yield

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Users, "_one_of_few", busy)
        for _ in range(12):
            visitor.sign_in("olga")
            statuses.append(visitor.status)
    assert statuses == [429] * 12
    assert [text for kind, text in events(local) if kind == "sign-in-refused"] == [
        "too many at once: the password was not looked at"
    ]
    visitor.sign_in("olga")
    assert visitor.status == 303


def test_a_session_ends_with_its_user(local, users, hashes):
    visitor = Visitor(local.port)
    visitor.sign_in("olga")
    visitor.ask("/")
    assert visitor.status == 200
    write_users(users, {"olga": User("olga", "view", hashes["olga"])})
    visitor.ask("/")
    assert visitor.status == 303
    assert ("signed-out", "olga: the user was changed") in events(local)


@pytest.mark.parametrize("following", ["https://evil.example.org/", "//evil.example.org", "/\\evil", "javascript:x"])
def test_signing_in_leads_nowhere_else(local, following):
    visitor = Visitor(local.port)
    visitor.sign_in("olga", path=f"/sign-in?{urlencode({'next': following})}")
    assert visitor.answer.headers["Location"] == "/"


def test_a_sign_in_form_of_another_page_is_refused(local):
    visitor = Visitor(local.port, Origin="http://evil.example.org")
    assert "must pass on the Host header" in visitor.sign_in("olga")
    assert visitor.status == 403


def test_health_is_open_and_the_rest_is_for_this_machine_a_token_or_a_session(opened, users, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123\n")
    token.chmod(0o600)
    node = opened(sign_on="local", users_file=users, token_file=token)
    node.problems.append("the disk is nearly full")
    near, far = Visitor(node.port), Visitor(node.port, **{"X-Forwarded-For": "10.0.0.9"})
    scraper = Visitor(node.port, Authorization="Bearer 0123456789abcdef0123", Via="a proxy")
    wrong = Visitor(node.port, Authorization="Bearer 0123456789abcdef0124")
    for visitor, status, tells in ((near, 200, True), (far, 401, False), (scraper, 200, True), (wrong, 401, False)):
        assert visitor.ask("/healthz") == "ok\n"
        visitor.ask("/metrics")
        assert visitor.status == status
        assert ("nearly full" in visitor.ask("/readyz")) is tells
        assert visitor.status == 503


# -- a proxy ----------------------------------------------------------------------------------------------------------


def proxied(opened, **changes) -> StowNode:
    values = {"addresses": LOOPBACK, "header": "X-User", "roles_header": "X-Roles", **changes}
    return opened(sign_on="proxy", proxy=Proxy(**values))


def test_a_user_whom_the_proxy_names_has_the_roles_that_it_names(opened):
    node = proxied(opened)
    keys = fill_busy(node)
    for roles, status, can_act in (
        ("", 200, False),
        ("staff,operate", 200, True),
        ("ADMIN", 200, True),
        ("send", 403, False),
    ):
        visitor = Visitor(node.port, **{"X-User": "vera", "X-Roles": roles, "X-Forwarded-For": "10.1.1.1"})
        page = visitor.ask(f"/series/{keys['aside']}")
        assert (visitor.status, "Try again" in page) == (status, can_act)
    assert ("signed-in", "vera as view, by the proxy") in events(node)
    assert events(node).count(("signed-in", "vera as view, by the proxy")) == 1
    assert "Sign out" not in page


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-User": ""}, {"X-User": "a b"}, {"X-User": "a" * 65}, {"X-User": "vera,adam"}, {"X-User": "<script>"}],
)
def test_without_a_valid_name_nobody_is_signed_on(opened, headers):
    visitor = Visitor(proxied(opened).port, **headers)
    assert "not signed on" in visitor.ask("/")
    assert visitor.status == 403


def test_a_name_from_elsewhere_than_the_proxy_is_refused(opened):
    node = proxied(opened, addresses=(read_network("10.0.0.1"),))
    visitor = Visitor(node.port, **{"X-User": "adam", "X-Roles": "admin"})
    visitor.ask("/")
    assert visitor.status == 403
    assert ("sign-in-refused", "a user's name from an address that is no proxy") in events(node)


def test_a_role_may_be_needed(opened):
    visitor = Visitor(proxied(opened, role="none").port, **{"X-User": "vera"})
    visitor.ask("/")
    assert visitor.status == 403


def test_limits_count_the_address_that_the_proxy_tells(opened, users):
    node = opened(sign_on="local", users_file=users, proxy=Proxy(addresses=LOOPBACK))
    far = Visitor(node.port, **{"X-Forwarded-For": "6.6.6.6, 10.9.9.9"})
    for _ in range(11):
        far.sign_in("olga", "wrong password")
    assert far.status == 429
    other = Visitor(node.port, **{"X-Forwarded-For": "6.6.6.6, 10.9.9.8", "X-Forwarded-Proto": "https"})
    other.sign_in("olga")
    assert other.status == 303
    assert other.cookie.startswith("__Host-ctflow=")
    assert "Secure" in other.answer.headers["Set-Cookie"]
    assert other.answer.headers["Strict-Transport-Security"]
    other.ask("/")
    assert other.status == 200


def test_over_tls_a_session_that_a_neighbour_may_have_set_is_none(opened, users):
    node = opened(sign_on="local", users_file=users, proxy=Proxy(addresses=LOOPBACK))
    attacker = Visitor(node.port)
    attacker.sign_in("vera")
    victim = Visitor(node.port, **{"X-Forwarded-Proto": "https"})
    victim.cookie = attacker.cookie
    victim.ask("/")
    assert victim.status == 303


def test_the_trail_has_the_address_that_the_proxy_tells(opened):
    node = proxied(opened)
    keys = fill_busy(node)
    visitor = Visitor(node.port, **{"X-User": "olga", "X-Roles": "operate", "X-Forwarded-For": "10.7.7.7"})
    again = f"/series/{keys['aside']}/retry"
    visitor.ask(again, {"token": token_in(visitor.ask(f"/series/{keys['aside']}"), again)})
    assert ("retried", "by olga, 10.7.7.7") in events(node)


@pytest.mark.parametrize(
    ("forwarded", "address"),
    [
        ("10.9.9.9", "10.9.9.9"),
        ("6.6.6.6, 10.9.9.9", "10.9.9.9"),
        ("10.9.9.9, 127.0.0.1", "10.9.9.9"),
        ("6.6.6.6, 10.9.9.9:1234", "10.9.9.9"),
        ("6.6.6.6, [2001:db8::1]:1234", "2001:db8::1"),
        ("6.6.6.6, unknown", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
def test_of_a_forwarded_address_only_what_the_proxy_added_is_believed(forwarded, address):
    sign_on = SignOn(Web(proxy=Proxy(addresses=LOOPBACK)), lambda *_args, **_more: None, lambda _title, _host: False)
    assert sign_on.address(Asked("127.0.0.1", {"x-forwarded-for": forwarded})) == address
    assert sign_on.address(Asked("10.0.0.7", {"x-forwarded-for": forwarded})) == "10.0.0.7"


# -- senders ----------------------------------------------------------------------------------------------------------


def basic(name: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{name}:{password}'.encode()).decode()}"


@pytest.mark.parametrize(
    ("name", "password", "status"),
    [
        ("scan", "password of scan", 200),
        ("adam", "password of adam", 200),
        ("vera", "password of vera", 403),
        ("scan", "wrong password", 401),
        ("nobody", "wrong password", 401),
    ],
)
def test_a_user_may_send_by_role(local, name, password, status):
    found, _, headers = post(local.port, multipart(file_of(instance())), Authorization=basic(name, password))
    assert found == status
    assert ("WWW-Authenticate" in headers) is (status == 401)
    if status == 200:
        assert local.journal.series()[0].calling_ae == name
    assert len(local.files) == (status == 200)


def test_a_sender_with_many_connections_at_once_makes_no_failed_attempts(local):
    with ThreadPoolExecutor(24) as pool:
        bodies = [multipart(file_of(instance(number))) for number in range(1, 25)]
        found = pool.map(
            lambda body: post(local.port, body, Authorization=basic("scan", "password of scan"))[0], bodies
        )
        assert set(found) == {200}
        wrong = list(pool.map(lambda body: post(local.port, body, Authorization=basic("scan", "wrong"))[0], bodies))
    assert sorted(wrong) == [401] * 10 + [429] * 14


def test_a_proxy_names_who_may_send_and_lends_nobody_its_own_address(opened):
    node = proxied(opened)
    body = multipart(file_of(instance()))
    assert post(node.port, body)[0] == 403
    assert post(node.port, body, X_User="vera")[0] == 403
    assert post(node.port, body, X_User="router", X_Roles="send", X_Forwarded_For="10.3.3.3")[0] == 200
    (series,) = node.journal.series()
    assert (series.calling_ae, series.peer) == ("router", "10.3.3.3")


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("web", "reason"),
    [
        ({"sign_on": "local"}, "missing-key"),
        ({"sign_on": "proxy"}, "missing-key"),
        ({"bind": "0.0.0.0"}, "no-sign-on"),
        ({"bind": "10.0.0.1", "sign_on": "local", "users_file": "u"}, "no-sign-on"),
        ({"bind": "0.0.0.0", "open": True}, None),
        ({"bind": "0.0.0.0", "enabled": False}, None),
        ({"bind": "::1"}, None),
        ({"bind": "0.0.0.0", "sign_on": "proxy", "proxy": Proxy(LOOPBACK)}, None),
    ],
)
def test_a_page_beyond_this_machine_needs_sign_on_unless_it_is_said(web, reason):
    if reason is None:
        Web(**web)
        return
    with raises_reason(SettingsInvalid, reason):
        Web(**web)


def test_a_wrong_file_of_users_prevents_the_start(tmp_path):
    node = StowNode(tmp_path / "node", sign_on="local", users_file=tmp_path / "absent")
    with raises_reason(SettingsInvalid, "secret-file", names=("web.users_file",)), node.listening():
        pass
    node.node = replace(node.node, settings=replace(node.settings, web=Web(port=0, token_file=tmp_path / "absent")))
    with raises_reason(SettingsInvalid, "secret-file", names=("web.token_file",)), node.listening():
        pass
    node.close()
