"""A pytest plugin that runs a part of the tests, so that processes share them: -p tests.shard --shard=2/12."""

from __future__ import annotations

import zlib

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", metavar="N/COUNT", help="one COUNT-th of the tests")


@pytest.hookimpl(trylast=True)  # of what -k and --deselect leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, config.getoption("--shard").split("/"))
    # By name: every third test is one of the same dtype, and a part must not have those alone.
    parts = {item: zlib.crc32(item.nodeid.encode()) % count + 1 for item in items}
    config.hook.pytest_deselected(items=[item for item in items if parts[item] != number])
    items[:] = [item for item in items if parts[item] == number]
