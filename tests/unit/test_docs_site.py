"""The documentation site: `make docs` fails where a link or an anchor leads nowhere, and only there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def command_of_make_docs() -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        ["make", "--dry-run", "--assume-old=install", "docs"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if "mkdocs" in line)
    return [sys.executable, *line.split("/python ")[1].split()]


def test_a_link_that_leads_nowhere_fails_the_build_and_no_other_does(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    for path in (*REPOSITORY.glob("*.md"), REPOSITORY / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    for folder in REPOSITORY.iterdir():  # what documents link to
        if folder.is_dir() and folder.name not in {"docs", "build"}:
            (tmp_path / folder.name).symlink_to(folder)
    broken = "\n[a page](nothing.md), [an anchor](dicom.md#nothing), [a source](../src/nothing.py)\n"
    with (tmp_path / "docs" / "report.md").open("a") as stream:
        stream.write(broken)
    done = subprocess.run(
        command_of_make_docs(), cwd=tmp_path, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    warnings = re.findall(r"^WARNING -  (.*)$", done.stderr, re.MULTILINE)
    assert len(warnings) == 3, done.stderr
    assert all("report.md" in each and "nothing" in each for each in warnings)
    assert "<code>--pick all|best</code>" in (tmp_path / "build" / "docs" / "index.html").read_text()


def test_the_site_loads_nothing_from_elsewhere():
    settings = (REPOSITORY / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "http" not in (REPOSITORY / "docs" / "site" / "site.css").read_text()


def test_every_row_of_a_table_belongs_to_one():
    """A blank line in front of a row makes text of it."""
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", path.read_text(encoding="utf-8"), re.MULTILINE):
            first, second, *_ = [*table.splitlines(), ""]
            assert re.fullmatch(r"\|[-|: ]+", second), f"{path.name}: {first}"
