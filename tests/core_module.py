"""_fastattn_core, the torch-free engines as a Python module: finds it, or skips the tests that need it."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_core() -> ModuleType:
    """The module from $FASTATTN_CORE_DIR, where that is set, or from build/cmake."""
    named = os.environ.get("FASTATTN_CORE_DIR")
    folder = Path(named) if named else Path(__file__).resolve().parent.parent / "build" / "cmake"
    if not list(folder.glob("_fastattn_core*.so")):
        if named:
            raise FileNotFoundError(f"FASTATTN_CORE_DIR is {named}, which has no _fastattn_core*.so")
        pytest.skip("_fastattn_core is not built; `make core` builds it", allow_module_level=True)
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("_fastattn_core")
    finally:
        sys.path.remove(str(folder))
