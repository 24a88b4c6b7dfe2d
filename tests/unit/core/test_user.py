"""A user without an entry in passwd, a name or a home (OpenShift, `docker run --user`) is made up for."""

from __future__ import annotations

import getpass
import os
import pwd

import pytest

from ctflow.core import user

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@pytest.fixture
def nobody(monkeypatch):
    """A process whose user has no entry in passwd, no name and no home."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in (*NAMES, "HOME", "TRITON_HOME", "CUPY_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set in the test is undone
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_process_of_ctflow_gets_a_name_and_a_folder_for_what_libraries_compile(nobody, tmp_path):
    nobody.setattr(user.tempfile, "tempdir", str(tmp_path))
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    user.name_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    (folder,) = tmp_path.iterdir()
    assert os.environ["TRITON_HOME"] == os.environ["CUPY_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert "HOME" not in os.environ  # no cache of engines is kept for one process
    user._remove(str(folder), os.getpid() + 1)
    assert folder.exists(), "a fork's end is not the process's"
    user._remove(str(folder), os.getpid())
    assert not folder.exists()


@pytest.mark.parametrize("home", ["/", "/proc", "/no/such/folder", ""], ids=["root", "read only", "absent", "empty"])
def test_a_home_that_cannot_be_written_is_none(nobody, tmp_path, home):
    nobody.setenv("HOME", home)
    nobody.setattr(user.tempfile, "tempdir", str(tmp_path))
    nobody.setattr(user.os, "access", lambda path, _: str(path).startswith(str(tmp_path)))  # root may write anywhere
    user.name_user()
    assert os.environ["TRITON_HOME"].startswith(str(tmp_path))


def test_where_nothing_can_be_written_a_name_is_enough(nobody):
    def full(**_):
        raise FileNotFoundError("no usable temporary directory")

    nobody.setattr(user.tempfile, "mkdtemp", full)
    user.name_user()
    assert getpass.getuser()
    assert "TRITON_HOME" not in os.environ


def test_a_user_who_is_known_keeps_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TRITON_HOME", "CUPY_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    user.name_user()
    with user.named_user():
        assert dict(os.environ) == before
    assert dict(os.environ) == before


def test_somebody_else_s_process_has_a_name_only_meanwhile(nobody):
    before = dict(os.environ)
    with pytest.raises(ValueError, match="import"), user.named_user():
        assert getpass.getuser() == f"uid-{os.getuid()}"
        raise ValueError("of the import")
    assert dict(os.environ) == before
