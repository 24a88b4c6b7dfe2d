from __future__ import annotations

import pytest

from ctflow.node.access.attempts import ADDRESS_S, OF_ADDRESS, OF_NAME, Attempts, network_of
from node_support import Clock


def test_an_address_that_fails_often_waits_and_others_do_not():
    clock = Clock()
    attempts = Attempts(clock)
    for number in range(OF_ADDRESS):
        assert attempts.begin(f"user{number}", "10.0.0.1") == 0
    assert attempts.begin("anna", "10.0.0.1") == ADDRESS_S
    assert attempts.begin("anna", "10.0.0.2") == 0
    clock.now += ADDRESS_S
    assert attempts.begin("anna", "10.0.0.1") == 0


def test_a_success_is_no_failure():
    attempts = Attempts(Clock())
    for _ in range(5 * OF_ADDRESS):
        assert attempts.begin("anna", "10.0.0.1") == 0
        attempts.succeeded("anna", "10.0.0.1")


def test_who_tries_a_name_from_everywhere_locks_nobody_out_who_has_signed_in_before():
    attempts = Attempts(Clock())
    attempts.begin("anna", "10.0.0.1")
    attempts.succeeded("anna", "10.0.0.1")
    for number in range(OF_NAME):
        assert attempts.begin("anna", f"10.1.{number}.1") == 0
    assert attempts.begin("anna", "10.2.0.1") > 0
    assert attempts.begin("bert", "10.2.0.1") == 0
    assert attempts.begin("anna", "10.0.0.1") == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::2:3", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_ipv6_host_counts_with_its_network(address, network):
    assert network_of(address) == network


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr("ctflow.node.access.attempts._MOST_KEPT", 100)
    attempts = Attempts(Clock())
    for number in range(500):
        attempts.begin(f"user{number}", f"10.1.{number // 250}.{number % 250}")
        attempts.succeeded(f"user{number}", f"10.1.{number // 250}.{number % 250}")
    assert len(attempts._of_address) <= 100
    assert len(attempts._of_name) <= 100
    assert len(attempts._known) <= 100
