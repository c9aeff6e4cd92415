"""A hook of MkDocs: links of a page of docs/ to files beside that folder become the files' names.

They work where the repository is read, and would lead nowhere on the site, which has the pages alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The Markdown of a page as the site shows it; MkDocs calls it for each."""
    return named(markdown, Path(page.file.abs_src_path).parent, Path(config.docs_dir))


def named(markdown: str, folder: Path, docs: Path) -> str:
    """``markdown`` of a page in ``folder`` with names in place of links that lead out of ``docs``.

    A link to what is not there stays, for MkDocs to complain.
    """

    def name(link: re.Match) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(docs.resolve()) or not target.exists():
            return link[0]
        path = f"`{target.relative_to(docs.resolve().parent).as_posix()}`"
        return path if target.name in link[1] else f"{link[1]} ({path})"

    return LINK.sub(name, markdown)
