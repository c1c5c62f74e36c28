"""Brings the pages of the repository's root into the site: links between them and docs/ are written for readers of the repository."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config) -> Files:
    for page in PAGES:
        files.append(File.generated(config, page, content=(ROOT / page).read_text()))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links as they are inside the site. What lies neither in docs/ nor among PAGES has no page here, and is left as text."""
    pages = "|".join(map(re.escape, PAGES))
    markdown = re.sub(rf"\]\(\.\./({pages})", r"](\1", markdown)
    if page.file.src_path in PAGES:
        markdown = re.sub(r"\]\(docs/", "](", markdown)
    return re.sub(
        r"\[([^\]]*)\]\((?:LICENSE|\.\./[^)]*|(?:opsd_kernels|benchmarks|tests|csrc|examples|\.ci)/?[^)]*)\)",
        r"\1",
        markdown,
    )
