"""How docstrings become Markdown, as an extension of griffe (mkdocs.yml names it).

They are written for help() and for doctest, with three habits of reStructuredText: "::" before a block of formulas,
``code`` and :func:`references`. Markdown has only the second.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

# "Name(fields): what they are" under Returns, of which the parser would take "Name(fields" for the type.
RESULT = re.compile(r"^( +[A-Z]\w+)\(([\w, ]+)\): ", flags=re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([^`]+)`")


class DocstringsAsMarkdown(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """For each module, class, function and attribute that is loaded."""
        if obj.docstring is not None:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)
            text = RESULT.sub(r"\1: (\2): ", text)
            obj.docstring.value = ROLE.sub(r"`\1`", text)
