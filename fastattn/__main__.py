"""`python -m fastattn info`: what this installation is and does on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command: `info` is the one there is."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description="Fused attention kernels for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="print version, instruction set levels, threads, CUDA and build flags")
    parser.parse_args(arguments)

    import fastattn

    print(fastattn.info())


if __name__ == "__main__":
    main()
