"""`python -m fastattn info` and `python -m fastattn selftest`: what this installation is and does on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command: `info` or `selftest`, which exits with 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Fused attention kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="print version, instruction set levels, threads, CUDA and build flags")
    commands.add_parser("selftest", help="check every function on every level and GPU of this machine: up to a minute")
    command = parser.parse_args(arguments).command

    import fastattn

    if command == "info":
        print(fastattn.info())
    else:
        from fastattn import _selftest

        sys.exit(not _selftest.run())


if __name__ == "__main__":
    main()
