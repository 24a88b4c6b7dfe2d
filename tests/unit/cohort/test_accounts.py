"""A cluster's driver keeps account of each row: none is forgotten, none is with two workers."""

from __future__ import annotations

import random

from ctflow.cohort.cluster.accounts import MOST_LOSSES, RowAccounts
from ctflow.cohort.cluster.tasks import RowTask
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.outcome import RowOutcome
from ctflow.cohort.shares.attempt import MOST_ATTEMPTS


def task(name: str, number: int = 1, *, is_alone: bool = False) -> RowTask:
    return RowTask(CohortRow(name, name), number, is_alone)


def outcome(of: RowTask) -> RowOutcome:
    return RowOutcome(*of.name, "done", "done", "", 0, of.number, 0.1)


def drained(accounts: RowAccounts) -> list[RowTask]:
    """What an idle worker gets, one row at a time."""
    found = []
    while (given := accounts.next(is_idle=True)) is not None:
        accounts.commit(given, outcome(given))
        found.append(given)
    return found


def test_rows_that_failed_come_after_all_others_and_those_that_may_end_a_worker_last():
    accounts = RowAccounts([task("killed", 2, is_alone=True), task("a"), task("b"), task("c")])
    first, second = accounts.next(is_idle=True), accounts.next(is_idle=False)
    assert (first.row.id, second.row.id) == ("a", "b")
    accounts.fail(first)
    accounts.die(second)
    third = accounts.next(is_idle=True)
    accounts.commit(third, outcome(third))
    again = accounts.next(is_idle=True)
    assert (again.row.id, again.number, again.is_alone) == ("a", 2, False)
    assert accounts.next(is_idle=False) is None, "a suspicious row is given to an idle worker only"
    accounts.commit(again, outcome(again))
    assert [(each.row.id, each.number, each.is_alone) for each in drained(accounts)] == [
        ("killed", 2, True),
        ("b", 2, True),
    ]
    assert accounts.is_over
    assert len(accounts.committed) == 4


def test_a_row_whose_workers_end_again_and_again_gets_one_attempt_more_in_which_it_is_set_aside():
    accounts = RowAccounts([task("a")])
    for number in range(1, MOST_ATTEMPTS + 1):
        given = accounts.next(is_idle=True)
        assert (given.number, given.is_alone) == (number, number > 1)
        accounts.die(given)
    assert accounts.next(is_idle=True).number > MOST_ATTEMPTS  # which no worker computes: `RowAttempt.begin`


def test_a_lost_machine_is_no_attempt_until_it_cannot_be_chance():
    accounts = RowAccounts([task("a"), task("b")])
    accounts.lose(accounts.next(is_idle=True))
    given = accounts.next(is_idle=True)
    assert (given.row.id, given.number, given.is_alone, given.losses) == ("a", 1, False, 1)
    accounts.lose(given)
    for losses in range(2, MOST_LOSSES):
        given = next(each for each in iter(lambda: accounts.next(is_idle=True), None) if each.row.id == "a")
        assert (given.number, given.is_alone, given.losses) == (1, True, losses)
        accounts.lose(given)
    assert accounts.next(is_idle=True).number > MOST_ATTEMPTS


def test_whatever_happens_each_row_is_committed_once():
    draws = random.Random(7)
    rows = [task(f"r{number}") for number in range(300)]
    accounts, workers, events = RowAccounts(rows), [set() for _ in range(5)], 0
    while not accounts.is_over:
        tasks = draws.choice(workers)
        if len(tasks) < 4 and not any(each.is_alone for each in tasks):
            given = accounts.next(is_idle=not tasks)
            if given is not None:
                assert not any(given.name == other.name for one in workers for other in one)
                tasks.add(given)
        if not tasks:
            continue
        events += 1
        kind = draws.choices(["commit", "fail", "die", "lose"], [70, 20, 5, 5])[0]
        if kind in {"die", "lose"}:
            for each in tasks:
                accounts.die(each) if kind == "die" else accounts.lose(each)
            tasks.clear()
        else:
            each = sorted(tasks, key=lambda one: one.row.id)[0]
            tasks.discard(each)
            if kind == "commit" or each.number > MOST_ATTEMPTS:
                accounts.commit(each, outcome(each))
            else:
                accounts.fail(each)
    assert sorted(name.id for name in accounts.committed) == sorted(each.row.id for each in rows)
    assert accounts.given == 0
    assert events > 300
