#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: the kernels' numbers, repeats and memory accesses, and their speed. Takes the
# libraries that are in fastattn/, or builds them. One JSON file is left in bench/results, the logs in build/gpu-check;
# OUT, a folder or a path that ends in .json, takes both. Exit status: 0; 1 where a step failed; 2 where there is no GPU.
# Under 8 minutes; no network.
#
#   scripts/gpu_check.sh                       all steps
#   scripts/gpu_check.sh --steps sizes,bench   some of them; --help lists them
#   PYTHON=python3.12 scripts/gpu_check.sh     with this interpreter's torch
set -euo pipefail
started=$(date +%s)
[[ -z "${OUT:-}" || "$OUT" == /* ]] || export OUT="$PWD/$OUT"
cd "$(dirname "$0")/.."

has_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x .venv/bin/python ]] && { has_gpu .venv/bin/python || ! has_gpu python3; } && PYTHON=.venv/bin/python
fi
exec "$PYTHON" scripts/gpu_check.py --started="$started" "$@"
