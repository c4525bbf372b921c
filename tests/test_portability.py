"""What keeps the sources portable: intrinsics and what differs between compilers, each in its own place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))

X86_HEADERS = r"\w*intrin|cpuid|x86gprintrin|intrin0?"
SYSTEM_HEADERS = r"sys/auxv|sys/sysctl|asm/hwcap"  # to ask which processor this is
ARM_HEADERS = r"arm_\w+"

# What is included, and where alone. isa.cpp asks for nothing but what its own architecture and system have.
HOMES = [
    (X86_HEADERS, {"cpu/simd/avx2.h", "cpu/simd/avx512.h", "cpu/isa.cpp"}),
    (ARM_HEADERS, {"cpu/simd/neon.h"}),
    (SYSTEM_HEADERS, {"cpu/isa.cpp"}),
]


def name_of(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def files_with(pattern: str) -> set[str]:
    return {name_of(path) for path in SOURCES if re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize(("headers", "homes"), HOMES, ids=["x86", "arm", "system"])
def test_headers_of_a_processor_are_included_in_their_place_alone(headers: str, homes: set[str]) -> None:
    assert files_with(rf"^\s*#\s*include\s*[<\"](?:{headers})\.h[>\"]") == homes


def test_headers_of_a_processor_are_included_for_it_alone() -> None:
    """In isa.cpp, which every architecture compiles, each of them stands under a condition."""
    depth = 0
    for line in (CSRC / "cpu" / "isa.cpp").read_text(encoding="utf-8").splitlines():
        depth += bool(re.match(r"\s*#\s*if", line)) - bool(re.match(r"\s*#\s*endif", line))
        if re.match(rf"\s*#\s*include\s*<(?:{X86_HEADERS}|{SYSTEM_HEADERS})\.h>", line):
            assert depth > 0, line


def test_intrinsics_are_called_in_the_vocabularies_alone() -> None:
    x86, arm = r"\b_mm\d*_\w+\(|\b__m(128|256|512)\w*\b", r"\bv\w+q(_lane)?_[fusb]\w+\("
    assert files_with(x86) == {"cpu/simd/avx2.h", "cpu/simd/avx512.h"}
    assert files_with(arm) == {"cpu/simd/neon.h"}


def test_one_header_asks_which_compiler_it_is() -> None:
    compilers = (
        r"\b(_MSC_VER|__clang__|__clang_major__|__GNUC__|__apple_build_version__|__has_feature|__SANITIZE_\w+)\b"
    )
    assert files_with(compilers) == {"core/macros.h"}
    assert files_with(r"\b_MSC_VER\b") == {"core/macros.h"}
    assert files_with(r"__attribute__\(\((always_inline|target)\b") <= {
        "core/macros.h",
        "testing/emulator/fragments.cpp",
    }


def test_every_level_has_its_files() -> None:
    """csrc/cpu/levels.h is the one list: what it names is compiled, and its vocabulary is tested."""
    levels = set(re.findall(r"level\(k\w+, (\w+)\)", (CSRC / "cpu" / "levels.h").read_text(encoding="utf-8")))
    listed = (CSRC / "sources.txt").read_text(encoding="utf-8").split()
    assert levels == {"baseline", "avx2", "avx512", "avx512_bf16", "neon", "neon_bf16"}
    for level in levels:
        assert f"cpu/isa_{level}.cpp" in listed
        assert f"testing/simd/{level}.cpp" in listed
