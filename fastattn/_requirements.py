"""What must be there before anything of fastattn can be imported, and what to do where it is not.

Imported first of all: the rest uses what an older torch lacks, and would fail in words that help nobody.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "fastattn: torch is not installed; install it first, https://pytorch.org/get-started/locally says how."
    ) from None

# setup.py builds the libraries for its stable ABI, and pyproject.toml requires it.
OLDEST_TORCH = (2, 10)


def check_torch(version: str) -> None:
    """ImportError where torch is too old for the compiled libraries."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        raise ImportError(
            "fastattn: torch is {}, and fastattn needs {}.{} or later: pip install --upgrade torch".format(
                version, *OLDEST_TORCH
            )
        )


def load_library(library: Path) -> None:
    """Load the compiled library, whose operators are in torch.ops.fastattn then. ImportError where that cannot be."""
    if not library.exists():
        raise ImportError(
            f"fastattn: the compiled library {library} is missing; install a wheel, or build it with `pip install"
            " --no-build-isolation .`, or in a source tree with `python setup.py build_ext --inplace`."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"fastattn: the compiled library {library.name} does not load on this machine ({platform.machine()},"
            f" {platform.system()}, torch {torch.__version__}): {' '.join(str(error).split())}. It is damaged, or of"
            " another processor or system: reinstall fastattn with `pip install --force-reinstall --no-deps`, or build"
            " it on this machine with `pip install --no-build-isolation .`"
        ) from None


check_torch(torch.__version__)
