"""Calls that must be refused, and what is asked of every refusal's message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Bad:
    """A call with one bad argument; those that are not given are good."""

    id: str
    error: type[Exception]
    parts: tuple[str, ...]  # of the message
    arguments: dict[str, Any] = field(default_factory=dict)

    def assert_refused(self, call: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> None:
        """That `call` refuses the arguments, which are the bad one and others beside it."""
        with pytest.raises(self.error) as raised:
            call(arguments)
        text = str(raised.value)
        assert type(raised.value) is self.error
        assert text.startswith("fastattn: ")
        assert "\n" not in text, "a C++ trace, or more than one sentence's worth"
        assert text.endswith(".")
        for part in self.parts:
            assert part in text


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)
