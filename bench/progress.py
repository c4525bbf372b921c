"""How far a run is: a bar on a terminal; elsewhere a line for each result as it comes, for whoever reads the log."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """Used as a context. Everything goes to stderr, so that stdout has the tables alone."""

    def __init__(self, unit: str, total: int | None = None) -> None:
        self.total = total
        self.done = 0
        self.on_terminal = sys.stderr.isatty()
        self.bar: Any = None
        if not self.on_terminal:
            return
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed", file=sys.stderr)
        else:
            self.bar = tqdm(total=total, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, step: str) -> None:
        """What is being done."""
        if self.bar is not None:
            self.bar.set_postfix_str(step)

    def advance(self, to: int | None = None) -> None:
        """By one, or to this many of the total."""
        before = self.done
        self.done = before + 1 if to is None else max(before, to if self.total is None else min(to, self.total))
        if self.bar is not None:
            self.bar.update(self.done - before)

    def result(self, line: str) -> None:
        """One that has come."""
        if not self.on_terminal:
            print(line, file=sys.stderr, flush=True)
