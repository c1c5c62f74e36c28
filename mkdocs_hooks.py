"""Add the root's pages to the site and rewrite links, which are written for readers of the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")  # no scheme, no bare anchor


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of PAGES at the top of the site."""
    for page in PAGES:
        file = File.generated(config, page, content=(ROOT / page).read_text())
        # README.md would become index.html and hide docs/index.md
        file.dest_uri = page.replace(".md", ".html")
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page outside its code blocks."""
    source = page.file.src_path
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: site_link(link, source), part) for part in parts[::2]]
    return "".join(parts)


def site_link(link: re.Match[str], source: str) -> str:
    """Return the link as it is inside the site, or its text where the target has no page here."""
    text, target, anchor = link[1], link[2], link[3] or ""
    home = "." if source in PAGES else posixpath.join("docs", posixpath.dirname(source))
    path = posixpath.normpath(posixpath.join(home, target))
    if path in PAGES:
        inside = path
    elif path.startswith("docs/"):
        inside = path.removeprefix("docs/")
    else:
        return text
    return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(source) or '.')}{anchor})"
