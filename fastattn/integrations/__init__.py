"""fastattn under other libraries: each module is imported when it is used, and the library no earlier than it must."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("flash_attn", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
