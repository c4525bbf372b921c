"""What MkDocs needs to know about this repository, as a hook (mkdocs.yml names it).

The pages in docs/ are also read as files of the repository, so their links lead to files: to CONTRIBUTING.md, to a JSON
file in bench/results. In the site these have places of their own: top-level Markdown files are pages, other files that
a page links to are copied, and links follow them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "index.md"}
OUTWARD = re.compile(r"\]\(\.\./([^)#\s]+)")  # a link out of docs/
INTO_DOCS = re.compile(r"\]\(docs/([^)\s]+)")  # a link into it, on a page of the top folder


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the top folder, and the files outside of docs/ that pages link to."""
    for source, name in PAGES.items():
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    linked: set[str] = set()
    for page in files.documentation_pages():
        if page.generated_by is None:
            linked.update(OUTWARD.findall(page.content_string))
    for target in sorted(linked - PAGES.keys()):
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to their places in the site."""
    if page.file.generated_by is None:
        return OUTWARD.sub(lambda match: f"]({PAGES.get(match.group(1), match.group(1))}", markdown)
    markdown = INTO_DOCS.sub(r"](\1", markdown)
    for source, name in PAGES.items():
        markdown = markdown.replace(f"]({source})", f"]({name})")
    return markdown
