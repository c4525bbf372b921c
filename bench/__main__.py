"""The benchmark's command line: `python -m bench`, from the repository root."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

SUITES = {
    "default": "a table of every kind of case, a short sweep, some of the textbook attentions, and the model that "
    "examples/train_vit_digits.py trains",
    "full": "every case of the table in every dtype and direction",
    "targets": "what the library is held to: target, measured, met or missed; --list names its groups",
    "sweep": "hundreds of shapes, and where the advantage over SDPA is smallest",
    "textbook": "additive and hard attention, summaries and a transformer's layer against plain PyTorch, torch.compile "
    "and keras; how time and memory grow with the length",
    "models": "what serving a language model takes: a Llama-shaped model end to end under eager, sdpa and fastattn, "
    "decoding against the machine's memory bandwidth, packed sequences against padding",
    "cuda-targets": "what the kernels for GPUs are held to, against each of PyTorch's own",
}
EXAMPLES = """examples:
  python -m bench --quick                              the default suite, in short
  python -m bench --suite textbook --case additive     against eager PyTorch, torch.compile, keras
  python -m bench --suite targets --case table,memory  two groups of targets
  python -m bench models --case llama --dtype bfloat16 the model alone
  python -m bench --suite full --dtype bfloat16 --direction backward --list
"""
ON_CUDA = ("default", "full", "textbook", "cuda-targets")


def _paragraph(name: str, text: str) -> str:
    return textwrap.fill(text, 79, initial_indent=f"  {name:14}", subsequent_indent=" " * 16)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="fastattn against PyTorch and other engines: checked first, then timed in turns.",
        epilog="\n".join(["suites:", *(_paragraph(name, text) for name, text in SUITES.items()), "", EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite_first", nargs="?", choices=SUITES, metavar="SUITE", help="the same as --suite SUITE")
    parser.add_argument("--suite", choices=SUITES, help="see below; default: default")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cpu, but for cuda-targets; with cuda: " + ", ".join(ON_CUDA)
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases and less time for each: seconds, not minutes")
    parser.add_argument(
        "--case",
        metavar="REGEX",
        help="only cases whose name matches, e.g. 'topleft.*D128'; of models and of a suite of targets: groups, comma "
        "separated",
    )
    dtypes, directions = ["float32", "bfloat16", "float16"], ["forward", "backward", "step"]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=[], help="only cases of these")
    parser.add_argument(
        "--direction", nargs="+", choices=directions, default=[], help="only these; step: forward and backward"
    )
    parser.add_argument("--threads", type=int, help="default: as many as PyTorch uses")
    parser.add_argument(
        "--isa", help="force a level: baseline, avx2, avx512 or avx512_bf16; on ARM baseline, neon or neon_bf16"
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="also time these (sdpa, math, flex, onnxruntime, openvino, zentorch; on a GPU sdpa, flash, cudnn, "
        "efficient, math, flex), or all where none is named, "
        "and say which are not installed; without --peers: whatever is installed, FlexAttention in two cases only, "
        "because it compiles for seconds in each",
    )
    parser.add_argument("--budget", type=float, metavar="S", help="seconds of timing for each case")
    parser.add_argument("--time-limit", type=float, metavar="S", help="cuda-targets: what is not reached is left out")
    parser.add_argument("--sweep-time", type=float, metavar="S", help="seconds for the sweep")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="default: a new file in bench/results/local; rewritten after each row"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG, or none; default: beside the JSON")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and leave")
    parser.add_argument("--no-model", action="store_true", help="do not train the model of the default suite")
    options = parser.parse_args(arguments)
    if options.suite and options.suite_first:
        parser.error("name one suite, with --suite or without")
    options.suite = options.suite or options.suite_first or "default"
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, not {options.threads}")
    if options.device is None:
        options.device = "cuda" if options.suite == "cuda-targets" else "cpu"
    if (options.suite == "cuda-targets") > (options.device == "cuda"):
        parser.error("--suite cuda-targets needs --device cuda")
    if options.device == "cuda" and options.suite not in ON_CUDA:
        parser.error(f"--suite {options.suite} is for the CPU; with --device cuda there are {', '.join(ON_CUDA)}")
    if options.suite in ("textbook", "models") and options.peers is not None:
        parser.error(f"--peers is not for --suite {options.suite}, which has its own")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        from bench import run
    except (ImportError, OSError) as failure:
        print(f"{failure}: build and install first, with `make build`", file=sys.stderr)
        return 2
    return run.run(options)


if __name__ == "__main__":
    sys.exit(main())
