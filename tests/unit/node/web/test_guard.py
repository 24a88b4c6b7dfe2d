from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctflow.node.web.guard import Hosts, Tokens, headers, is_own_form


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost", True),
        ("localhost:8113", True),
        ("LocalHost.:8113", True),
        ("127.0.0.1:8113", True),
        ("10.1.2.3", True),
        ("[::1]:8113", True),
        ("node.example.org:8113", True),
        ("evil.example.org:8113", False),
        ("127.0.0.1.evil.example.org", False),
        ("localhost.evil.example.org", False),
        ("localhost:8113@evil.example.org", False),
        ("localhost:8113:1", False),
        ("::1", False),
        ("[localhost]", False),
        ("2130706433", False),
        ("0x7f.1", False),
        ("", False),
        ("localhost/", False),
        ("local\nhost", False),
    ],
)
def test_only_addresses_and_known_names_are_accepted(host, accepted):
    assert Hosts(["Node.example.org"]).accepts(host) is accepted


def test_a_token_holds_for_its_browser_and_action_only():
    tokens = Tokens()
    session, other = tokens.new_session(), tokens.new_session()
    token = tokens.token(session, "/series/a/retry")
    assert tokens.holds(session, "/series/a/retry", token)
    assert not tokens.holds(session, "/series/a/discard", token)
    assert not tokens.holds(session, "/series/b/retry", token)
    assert not tokens.holds(other, "/series/a/retry", token)
    assert not tokens.holds(None, "/series/a/retry", token)
    assert not Tokens().holds(session, "/series/a/retry", token)


@given(st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_what_is_made_up_never_holds(session, action, token):
    assert not Tokens().holds(session, action, token)


def test_a_session_cannot_be_told_apart_from_its_action():
    """What is signed is not the same for two pairs: a session holds no newline."""
    assert Tokens.is_session(Tokens.new_session())
    assert not Tokens.is_session("a" * 20 + "\n/series")
    assert not Tokens.is_session("a" * 19)
    assert not Tokens.is_session("a" * 65)
    assert not Tokens.is_session(None)


@pytest.mark.parametrize(
    ("asked", "own"),
    [
        ({"host": "localhost:1", "origin": "http://localhost:1"}, True),
        ({"host": "localhost:1", "origin": "https://localhost:1"}, True),
        ({"host": "localhost:1"}, True),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, False),
        ({"host": "localhost:1", "origin": "http://evil.example.org"}, False),
        ({"host": "localhost:1", "origin": "null"}, False),
        ({"host": "localhost:1", "sec-fetch-site": "cross-site"}, False),
        ({"host": "localhost:1", "sec-fetch-site": "same-site"}, False),
        ({"host": "localhost:1", "sec-fetch-site": "same-origin", "origin": "http://localhost:1"}, True),
    ],
)
def test_a_form_of_another_page_is_known_by_what_the_browser_says(asked, own):
    assert is_own_form(asked) is own


def test_no_answer_allows_scripts_but_those_of_a_report_in_its_sandbox():
    assert "script" not in headers()["Content-Security-Policy"]
    assert headers()["Content-Security-Policy"].startswith("default-src 'none'")
    report = headers(report=True)["Content-Security-Policy"]
    assert report.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in report
