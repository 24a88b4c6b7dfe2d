from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import StringIO

import argon2
import pytest

from ctflow.cli.main import main
from ctflow.core.errors import SettingsInvalid
from ctflow.node.access.users import User, Users, hash_of_password, read_users, write_users
from reasons import raises_reason

GOOD = "correct horse battery"


@pytest.fixture(scope="module")
def hashed():
    return hash_of_password(GOOD)


@pytest.fixture
def file(tmp_path, hashed):
    path = tmp_path / "users"
    write_users(path, {"anna": User("anna", "operate", hashed)})
    return path


def test_a_password_is_kept_as_argon2id_in_a_file_for_its_owner(file):
    text = file.read_text()
    assert text.startswith("anna:operate:$argon2id$v=19$m=65536,t=3,p=4$")
    assert GOOD not in text
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["users"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(file, mode):
    file.chmod(mode)
    with raises_reason(SettingsInvalid, "secret-file", names=("web.users_file", "chmod 600")):
        Users(file)


@pytest.mark.parametrize(
    "line",
    ["anna", "anna:root:x", "anna:view:plain text", "a b:view:x", "anna:view:$argon2i$v=19$m=8,t=1,p=1$YWFhYWFhYWE$YQ"],
)
def test_a_line_that_is_no_user_is_named(file, line):
    file.write_text(f"# a comment\n{line}\n")
    with raises_reason(SettingsInvalid, "users-file", names=("line 2",)):
        read_users(file)


def test_a_name_that_is_there_twice_is_refused(file):
    file.write_text(file.read_text() * 2)
    with raises_reason(SettingsInvalid, "users-file", names=("line 2",)):
        read_users(file)


@pytest.mark.parametrize(
    ("name", "password", "found"),
    [
        ("anna", GOOD, True),
        ("anna", f"{GOOD} ", False),
        ("bert", GOOD, False),
        ("", "", False),
        ("anna", "x" * 300, False),
    ],
)
def test_only_the_right_password_is_verified(file, name, password, found):
    users = Users(file)
    for _ in range(2):  # the second time from memory
        assert (users.verified(name, password) is not None) is found


def test_an_unknown_name_takes_a_hash_as_a_wrong_password_does(file, monkeypatch):
    """Not measured in seconds: both compute one hash with the same parameters."""
    seen = []
    verify = argon2.PasswordHasher.verify

    def watched(self, hashed, password):
        seen.append(hashed.rpartition("$")[0].rpartition("$")[0])
        return verify(self, hashed, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", watched)
    users = Users(file)
    assert users.verified("anna", "wrong password") is None
    assert users.verified("nobody", "wrong password") is None
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_a_change_of_the_file_holds_at_once(file):
    users = Users(file)
    assert users.verified("anna", GOOD)
    write_users(file, {"anna": User("anna", "view", hash_of_password("another password"))})
    assert users.verified("anna", GOOD) is None
    assert users.find("anna").role == "view"
    file.chmod(0o644)
    assert users.find("anna") is None


def test_the_command_adds_lists_and_removes(tmp_path, monkeypatch, capsys):
    def command(*words: object, given: str = "") -> int:
        monkeypatch.setattr("sys.stdin", StringIO(given))
        return main(["node", "user", *map(str, words)])

    file, config = tmp_path / "users", tmp_path / "node.yaml"
    assert command("add", "anna", "--role", "admin", "--file", file, given=f"{GOOD}\n") == 0
    assert Users(file).verified("anna", GOOD).role == "admin"
    config.write_text("web: {sign_on: local, users_file: users}")
    capsys.readouterr()
    assert command("list", "-c", config) == 0
    assert capsys.readouterr().out == "anna admin\n"
    assert command("add", "bert", "--role", "view", "--file", file, given="short\n") == 64
    assert "12 to 256" in capsys.readouterr().err
    assert command("remove", "anna", "--file", file) == 0
    capsys.readouterr()
    assert command("list", "-c", config) == 0
    assert capsys.readouterr().out == ""
    assert command("remove", "anna", "--file", file) == 64


def add_in_a_process(file, name: str) -> int:
    script = "import sys; from ctflow.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "node", "user", "add", name, "--role", "view", "--file", file]
    return subprocess.run(command, input=f"{GOOD}\n", capture_output=True, text=True, check=False).returncode


def test_users_that_are_added_at_once_are_all_there(tmp_path):
    file = tmp_path / "users"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda name: add_in_a_process(file, name), ("a", "b", "c", "d"))) == [0] * 4
    assert set(read_users(file)) == {"a", "b", "c", "d"}
