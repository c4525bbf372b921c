"""A pytest plugin that runs a part of the tests, so that processes share them: -p tests.shard --shard=2/12."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="N/COUNT", help="every COUNT-th test, from the N-th on")


@pytest.hookimpl(trylast=True)  # of what -k and --deselect leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, config.getoption("--shard").split("/"))
    kept = items[number - 1 :: count]
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept
