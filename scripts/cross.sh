#!/usr/bin/env bash
# The engine and its C++ tests for 64-bit ARM, built with Debian's cross compiler and run under qemu-user: as a processor
# with bfloat16 dot products, and as one without, where the level for them must not be chosen.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v "$tool" >/dev/null; then
    echo "fastattn: no $tool; on Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user" >&2
    exit 1
  fi
done

folder=build/cross
cmake -S . -B "$folder" -G Ninja -DCMAKE_TOOLCHAIN_FILE="$PWD/cmake/aarch64-linux-gnu.cmake" \
  -DFASTATTN_PYTHON_MODULE=OFF
cmake --build "$folder" --parallel "${MAX_JOBS:-2}"

run_as() {
  local wanted="$2"
  export QEMU_CPU="$1"
  printf '\n-- as %s\n' "$QEMU_CPU"
  levels=$(qemu-aarch64 -L /usr/aarch64-linux-gnu "$folder/simd_test") || true  # ctest says what failed
  if ! grep -q "^neon_bf16: $wanted" <<<"$levels"; then
    printf 'fastattn: level neon_bf16 should be %s as %s, but:\n%s\n' "$wanted" "$QEMU_CPU" "$levels" >&2
    exit 1
  fi
  ctest --test-dir "$folder" --output-on-failure --no-tests=error --parallel "${MAX_JOBS:-2}"
}
run_as max tested
run_as cortex-a72 SKIPPED
