#!/usr/bin/env bash
# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction set that this machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

export ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

cmake -S . -B build/sanitize -G Ninja -DFASTATTN_SANITIZE=address,undefined
cmake --build build/sanitize --parallel "${MAX_JOBS:-2}"
ctest --test-dir build/sanitize --output-on-failure --no-tests=error --parallel "${MAX_JOBS:-2}"
