"""The examples in the docstrings of the public names run, and give what they say."""

from __future__ import annotations

import doctest
import inspect
from typing import Any

import pytest

import fastattn
import fastattn.nn


def public() -> dict[str, Any]:
    """Functions and classes, by the name that users write."""
    found = {f"fastattn.{name}": getattr(fastattn, name) for name in fastattn.__all__}
    found |= {f"fastattn.nn.{name}": getattr(fastattn.nn, name) for name in fastattn.nn.__all__}
    return {name: x for name, x in found.items() if inspect.isfunction(x) or inspect.isclass(x)}


def examples(name: str, x: Any) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(inspect.getdoc(x) or "", {}, name, None, None)


@pytest.mark.parametrize("name", [name for name, x in public().items() if examples(name, x).examples])
def test_examples_run(name: str) -> None:
    fastattn.sdpa_calls(reset=True)  # examples elsewhere have made some
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(examples(name, public()[name]), out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_functions_and_modules_have_examples() -> None:
    plain = {"fastattn.Info", "fastattn.SdpaCalls", "fastattn.ServedModules", "fastattn.nn.ProjectedKeys"}  # results
    plain |= {"fastattn.info", "fastattn.restore_sdpa", "fastattn.sdpa_calls"}
    lacking = {name for name, x in public().items() if not examples(name, x).examples}
    assert {name for name in lacking if not name.endswith(("Output", "Summary"))} <= plain
