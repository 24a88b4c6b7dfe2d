"""`make test` tries the same examples everywhere; the random search says what it tried."""

from __future__ import annotations

import os
import subprocess

from hypothesis import given, settings
from hypothesis import strategies as st

import random_search

FAILS = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_fails(number):
    assert False, f"seen {number}"
"""


def test_the_profile_of_every_test_run_is_derandomized():
    assert settings.default.derandomize
    assert settings.default.database is None


def test_a_property_draws_the_same_examples_twice():
    drawn: list[int] = []

    @settings(max_examples=20)
    @given(st.integers())
    def property_of(number):
        drawn.append(number)

    property_of()
    first = drawn.copy()
    drawn.clear()
    property_of()
    assert len(first) >= 20
    assert drawn == first


def test_the_search_prints_its_seed_and_how_to_repeat_a_failure(tmp_path, capfd):
    (tmp_path / "test_it.py").write_text(FAILS)
    (tmp_path / "conftest.py").write_text("from hypothesis import settings\nsettings.register_profile('random')\n")
    assert random_search.main(["--seed", "5", "--minutes", "1", str(tmp_path)]) == 1
    shown = capfd.readouterr().out
    assert shown.startswith("random search: seed 5\n")
    assert "seen 0" in shown
    assert shown.endswith("random search: seed 5 failed; try it again with --seed 5\n")


def test_the_search_goes_on_with_the_next_seed_until_its_time_is_over(monkeypatch, capfd):
    now, seeds = [0.0], []

    def round_of_25_seconds(command, **_):
        now[0] += 25
        seeds.append(next(word for word in command if "hypothesis-seed" in word))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(random_search.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(random_search.subprocess, "run", round_of_25_seconds)
    assert random_search.search(1.5, 7, ["tests"]) == 0
    assert seeds == [f"--hypothesis-seed={n}" for n in (7, 8, 9)], "a fourth would end after 90 seconds"
    assert capfd.readouterr().out.count("random search: seed ") == 3


def test_without_a_seed_another_one_is_drawn_each_time(monkeypatch):
    seeds = []
    monkeypatch.setattr(random_search, "search", lambda minutes, seed, paths: seeds.append((minutes, seed, paths)) or 0)
    assert (random_search.main([]), random_search.main([])) == (0, 0)
    assert seeds[0][1] != seeds[1][1]
    assert {(minutes, *paths) for minutes, _, paths in seeds} == {(10.0, "tests")}


def made_by(*words: str) -> str:
    """The last command that make would run."""
    # As of a shell of its own, also where make has started the tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=lint", "--assume-old=install", *words],
        cwd=random_search.REPOSITORY, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def test_make_has_the_search():
    assert made_by("test-random", "SEARCH=--seed 5").endswith("python tests/random_search.py --seed 5")


def test_ci_runs_everything_that_make_test_runs_and_measures_coverage():
    some, everything = made_by("test"), made_by("test-all")
    assert '-m "not gpu and not map and not viewers and not exhaustive"' in some
    assert "--cov" not in some
    assert everything.startswith(some.split(" -m ")[0])
    assert '-m "not gpu and not map and not viewers" --cov ' in everything
    assert "\nmake test-all WORKERS=$((" in (random_search.REPOSITORY / ".ci" / "run").read_text()
