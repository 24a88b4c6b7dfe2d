"""`ctflow node user`: the local users of a node's page."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctflow.core.errors import SettingsInvalid, counted
from ctflow.core.requirements import check_requirements
from ctflow.settings.run import read_environment

if TYPE_CHECKING:
    from ctflow.node.access.users import User

CONFIG = click.option(
    "-c", "--config", type=click.Path(path_type=Path), help="The node's YAML file, which names web.users_file."
)
FILE = click.option("--file", type=click.Path(path_type=Path), help="The file of users, instead of -c.")


@click.group()
def user() -> None:
    """The local users of a node's page (web.sign_on: local)."""


@user.command("add")
@click.argument("name")
@click.option(
    "--role", type=click.Choice(("view", "operate", "admin", "send")), required=True,
    help="view looks, operate also retries and discards, admin may do everything; send only sends images (STOW-RS).",
)  # fmt: skip
@CONFIG
@FILE
def add(name: str, role: str, config: Path | None, file: Path | None) -> int:
    """Add user NAME, or give it another password or role; the password is read from the terminal or standard input."""
    check_requirements("serve")
    from ctflow.node.access.users import (  # noqa: PLC0415  # argon2
        NAME,
        ROLES,
        User,
        hash_of_password,
        users_locked,
        write_users,
    )

    if not NAME.fullmatch(name):
        raise SettingsInvalid(
            "a user's name has 1 to 64 letters, digits, or . _ @ -: give another", reason="invalid-value"
        )
    place, _ = _users(config, file)
    chosen = next(each for each in ROLES if each == role)
    hashed = hash_of_password(_password())
    with users_locked(place):
        _, users = _users(config, place)
        is_new = name not in users
        users[name] = User(name, chosen, hashed)
        write_users(place, users)
    click.echo(f"{'added' if is_new else 'changed'} {name} ({role}); {place} now has {counted(len(users), 'user')}")
    return 0


@user.command("remove")
@click.argument("name")
@CONFIG
@FILE
def remove(name: str, config: Path | None, file: Path | None) -> int:
    """Remove user NAME; open sessions of it end."""
    check_requirements("serve")
    from ctflow.node.access.users import users_locked, write_users  # noqa: PLC0415  # argon2

    place, _ = _users(config, file)
    with users_locked(place):
        _, users = _users(config, place)
        if users.pop(name, None) is None:
            raise SettingsInvalid("there is no such user: ctflow node user list", reason="invalid-value")
        write_users(place, users)
    click.echo(f"removed {name}; {place} now has {counted(len(users), 'user')}")
    return 0


@user.command("list")
@CONFIG
@FILE
def list_(config: Path | None, file: Path | None) -> int:
    """List the users with their roles."""
    check_requirements("serve")
    _, users = _users(config, file)
    for each in users.values():
        click.echo(f"{each.name} {each.role}")
    return 0


def _users(config: Path | None, file: Path | None) -> tuple[Path, dict[str, User]]:
    """The file of users and what is in it; none of a file that does not exist yet."""
    from ctflow.node.access.users import read_users  # noqa: PLC0415  # argon2
    from ctflow.node.settings.service import read_settings  # noqa: PLC0415  # slow to import

    place = file.absolute() if file else None
    if place is None and config is not None:
        place = read_settings(config, read_environment()).web.users_file
    if place is None:
        raise SettingsInvalid("give the file of users: --file, or -c with web.users_file", reason="usage")
    return place, read_users(place) if os.path.lexists(place) else {}


def _password() -> str:
    """A password that is typed twice, or the first line of standard input; never an argument, which others can see."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise SettingsInvalid("the two passwords differ: try again", reason="invalid-value")
    return password
