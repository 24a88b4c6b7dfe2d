"""mkdocs: pages and files of the repository that lie outside docs/, and links that work here and on GitHub alike.

The documents link to each other by relative paths, as GitHub follows them. README.md, ARCHITECTURE.md and the others of
the root become pages; another file that a document links to is copied into the site; a link to a folder becomes text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")}
PAGES["README.md"] = "index.md"
# Sources are shown as text: a browser would run or download others.
COPIED = "files/"
_LINK = re.compile(r"(?P<shown>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s#]*)(?P<anchor>#[^()\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root, and the files outside docs/ that any document links to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    documents = [file for file in files if file.src_uri.endswith(".md")]
    for file in documents:
        where = _place_of(file.src_uri)
        for match in _LINK.finditer(_CODE.sub("", file.content_string)):
            path = _path_of(where, match["target"])
            copied = f"{COPIED}{path}.txt"
            if path and _is_outside(path) and (ROOT / path).is_file() and files.get_file_from_path(copied) is None:
                files.append(File.generated(config, copied, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at their targets in the site, and show pipes in tables without GitHub's backslash."""
    where = _place_of(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        path = _path_of(where, match["target"])
        if not path:
            return match[0]
        if (ROOT / path).is_dir():
            return match["shown"][1:-1]
        target = posixpath.relpath(_target_of(path), here or ".")
        return f"{match['shown']}({target}{match['anchor'] or ''})"

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(led, part) for part in parts[::2]]
    # GitHub needs a backslash before a pipe in a table, also in code, where Python-Markdown shows it.
    parts[1::2] = [part if part.startswith("```") else part.replace("\\|", "|") for part in parts[1::2]]
    return "".join(parts)


def _place_of(src_uri: str) -> str:
    """Folder of a document in the repository."""
    return "." if src_uri in PAGES.values() else posixpath.dirname(f"docs/{src_uri}")


def _path_of(where: str, target: str) -> str:
    """The path in the repository that a link means; empty for a link to elsewhere or within the page."""
    return "" if not target or re.match(r"[a-z]+:", target) else posixpath.normpath(posixpath.join(where, target))


def _is_outside(path: str) -> bool:
    return not path.startswith("docs/") and path not in PAGES


def _target_of(path: str) -> str:
    """Path in the site of a file of the repository; a file that does not exist keeps its own, and fails the build."""
    if path in PAGES:
        return PAGES[path]
    if path == "docs/README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{COPIED}{path}.txt"
