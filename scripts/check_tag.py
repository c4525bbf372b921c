"""Holds a release's tag to the version and the changelog: `python scripts/check_tag.py v0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def offences(tag: str, package: str, changelog: str) -> list[str]:
    """What is wrong with a tag, given fastattn/__init__.py and CHANGELOG.md."""
    found = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)
    if found is None:
        return ["fastattn/__init__.py has no __version__"]
    version = found[1]
    wrong = [] if tag == f"v{version}" else [f"the tag is {tag!r}, and fastattn.__version__ is {version!r}"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        wrong.append(f"CHANGELOG.md has no heading '## [{version}] - <date>'")
    return wrong


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python scripts/check_tag.py TAG")
    package, changelog = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("fastattn/__init__.py", "CHANGELOG.md")
    )
    wrong = offences(sys.argv[1], package, changelog)
    for text in wrong:
        print(f"check-tag: {text}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
