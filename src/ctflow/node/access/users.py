"""The file of local users: one a line, `NAME:ROLE:HASH`, with argon2id hashes; only its owner may read it."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from ctflow.core.atomic import output_error_from_oserror, sync_folder
from ctflow.core.errors import SettingsInvalid
from ctflow.node.access.secret import read_secret_file

Role = Literal["view", "operate", "admin", "send"]
Right = Literal["look", "act", "administer", "send"]
ROLES: tuple[Role, ...] = get_args(Role)
RIGHTS: Mapping[Role, frozenset[Right]] = {
    "view": frozenset({"look"}),
    "operate": frozenset({"look", "act"}),
    "admin": frozenset({"look", "act", "administer", "send"}),
    "send": frozenset({"send"}),
}
NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 256
_AT_ONCE = 2  # hashes being computed, of 64 MiB each
_WAIT_S = 20.0
_REMEMBERED, _REMEMBERED_S = 256, 300.0  # a sender has its password in every request, and a hash takes 50 ms

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class User:
    """A local user."""

    name: str
    role: Role
    hash: str


def read_users(file: Path) -> dict[str, User]:
    """Read a file of users.

    Raises:
        SettingsInvalid: It cannot be read, others may read it, or a line is not a user.
    """
    content = read_secret_file(file, "web.users_file", "make it with ctflow node user add")
    users: dict[str, User] = {}
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, role, hashed = [*line.split(":", 2), "", ""][:3]
        is_user = NAME.fullmatch(name) and role in ROLES and _is_hash(hashed)
        if not is_user or name in users:
            raise SettingsInvalid(
                f"web.users_file, line {number}: no user, or a second one of this name: remove the line, then "
                "ctflow node user add",
                reason="users-file",
            )
        users[name] = User(name, cast(Role, role), hashed)
    return users


@contextmanager
def users_locked(file: Path) -> Iterator[None]:
    """While it lasts no other process that asks for the same changes a file of users.

    Raises:
        OutputError: Its folder cannot be opened.
    """
    try:
        handle = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)  # the file itself is replaced
    except OSError as error:
        raise output_error_from_oserror(error, "the file of users", "give a folder that exists") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_users(file: Path, users: Mapping[str, User]) -> None:
    """Replace a file of users, whole or not at all; it keeps its owner.

    Raises:
        OutputError: It cannot be written.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    lines = "".join(f"{each.name}:{each.role}:{each.hash}\n" for each in users.values())
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "w", encoding="utf-8") as stream:  # noqa: PTH123  # a descriptor
                stream.write(lines)
                stream.flush()
                if file.exists() and os.geteuid() == 0:  # root adds a user for the node's own user
                    os.fchown(handle, file.stat().st_uid, file.stat().st_gid)
                os.fsync(handle)
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(file.parent)
    except OSError as error:
        raise output_error_from_oserror(error, "the file of users", "give a folder that exists") from error


def hash_of_password(password: str) -> str:
    """A password's argon2id hash (RFC 9106, the second recommended option: 64 MiB, 3 passes).

    Raises:
        SettingsInvalid: It is too short, or too long.
    """
    from argon2 import PasswordHasher  # noqa: PLC0415  # an optional package: the extra `serve`

    if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise SettingsInvalid(
            f"a password has {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} letters: give another", reason="invalid-value"
        )
    return PasswordHasher().hash(password)


def _is_hash(text: str) -> bool:
    from argon2 import extract_parameters  # noqa: PLC0415  # an optional package: the extra `serve`
    from argon2.exceptions import InvalidHashError  # noqa: PLC0415
    from argon2.low_level import Type  # noqa: PLC0415

    try:
        return extract_parameters(text).type is Type.ID
    except (InvalidHashError, ValueError):
        return False


class TooBusy(Exception):  # no error of a user
    """A password was not looked at: too many are at once."""


class Users:
    """The users of a file, which may change at any time.

    Args:
        file: Of `read_users`.

    Raises:
        SettingsInvalid: As of `read_users`.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._hashing = threading.BoundedSemaphore(_AT_ONCE)
        self._secret = secrets.token_bytes(32)
        self._remembered: OrderedDict[bytes, float] = OrderedDict()
        self._known_as = self._stamp()
        self._users = read_users(file)
        # Verified for a name that nobody has, so that the answer takes as long as for one that somebody has.
        self._nobody = User("", "view", hash_of_password(secrets.token_urlsafe(24)))

    def find(self, name: str) -> User | None:
        """The user of a name, by the file as it is now; none while it is wrong."""
        with self._lock:
            stamp = self._stamp()
            if stamp != self._known_as:
                self._known_as = stamp
                try:
                    self._users = read_users(self._file)
                except SettingsInvalid as error:
                    self._users = {}
                    log.error("nobody can sign in: %s", error)  # noqa: TRY400  # named: no traceback needed
            return self._users.get(name)

    def verified(self, name: str, password: str) -> User | None:
        """The user of a name and password, or None; takes as long for an unknown name as for a wrong password.

        Raises:
            TooBusy: So many others sign in at once that the password was not looked at.
        """
        user = self.find(name)
        digest = self._digest(user or self._nobody, password)
        if self._is_remembered(digest):
            return user
        if len(password) > LONGEST_PASSWORD or not self._holds((user or self._nobody).hash, password) or user is None:
            return None
        with self._lock:
            self._remembered[digest] = time.monotonic() + _REMEMBERED_S
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return user

    def _holds(self, hashed: str, password: str) -> bool:
        from argon2 import PasswordHasher  # noqa: PLC0415  # an optional package: the extra `serve`
        from argon2.exceptions import InvalidHashError, VerificationError  # noqa: PLC0415

        with self._one_of_few():
            try:
                return PasswordHasher().verify(hashed, password)
            except (VerificationError, InvalidHashError):
                return False

    @contextmanager
    def _one_of_few(self) -> Iterator[None]:
        if not self._hashing.acquire(timeout=_WAIT_S):
            raise TooBusy
        try:
            yield
        finally:
            self._hashing.release()

    def _digest(self, user: User, password: str) -> bytes:
        text = f"{user.name}\0{user.hash}\0{password}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, hashlib.sha256).digest()

    def _is_remembered(self, digest: bytes) -> bool:
        with self._lock:
            return self._remembered.get(digest, 0.0) > time.monotonic()

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self._file.stat()
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode
