#!/usr/bin/env bash
# Formatting, lint, types, and what workflows may do, with no file left out. Runs every check before it fails. --fix rewrites what it can first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

mapfile -t native < <(find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) | sort)

if [[ "${1:-}" == --fix ]]; then
  clang-format -i "${native[@]}"
  ruff check --fix --quiet . || true
  ruff format .
fi

failed=()
check() {
  local name="$1"
  shift
  echo "-- $name"
  "$@" || failed+=("$name")
}

check "clang-format (${#native[@]} files)" clang-format --dry-run -Werror "${native[@]}"
# clang-format leaves comments as they are.
keeps_to_columns() { ! grep -nE '^.{121,}' "${native[@]}"; }
check "120 columns" keeps_to_columns
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "zizmor" zizmor --offline --quiet .github/workflows
for script in .ci/run scripts/*.sh; do check "bash -n $script" bash -n "$script"; done

if ((${#failed[@]})); then
  printf 'lint: %s failed\n' "${failed[@]}" >&2
  exit 1
fi
echo "lint: clean"
