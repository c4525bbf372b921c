"""What a compiled library of fastattn may ask of the system that it is loaded on: gates over readelf and nm.

One wheel has to serve every CPython >= 3.10, every torch >= 2.10 and many distributions. A gate returns the offending
symbols or files, in words; nothing is an answer too. wheel_gates.py holds wheels to them, tests/test_symbols.py what is
built in the source tree.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

# Whatever libraries these name are found, by the loader or through torch.
ALLOWED_LIBRARIES = re.compile(r"lib(torch|torch_cpu|c10)\.so|lib(c|m|dl|rt|pthread)\.so\.\d+|ld-linux[\w-]*\.so\.\d+")
# Those of the compiler, too; a newer one must not be needed for them, which auditwheel looks into.
COMPILER_LIBRARIES = re.compile(r"libstdc\+\+\.so\.6|libgcc_s\.so\.1")
# C++ functions of torch, which change from release to release, and those of Python and of an OpenMP.
UNSTABLE_SYMBOLS = re.compile(r"_ZNK?(2at|3c10|5torch)|_ZT[IVS]N(2at|3c10|5torch)|Py|_Py|GOMP_|omp_|__kmpc")
STANDARD_LIBRARY = re.compile(r"_ZN[KRO]*St|_ZSt|_ZT[ISV]N?St|_ZN[KRO]*9__gnu_cxx")
STABLE_SYMBOLS = ("aoti_torch_", "torch_")
OWN_SYMBOLS = re.compile(r".*fastattn|PyInit|_*cuda")


def tool(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--wide", "--dynamic", library))


def dynamic_symbols(library: Path, kind: str) -> list[str]:
    """``kind`` is nm's --defined-only or --undefined-only; names come without versions."""
    return [line.split()[-1].split("@")[0] for line in tool("nm", "--dynamic", kind, library).splitlines()]


def dependencies(library: Path) -> list[str]:
    """No Python, no OpenMP, nothing of CUDA's, whose names and versions differ from torch to torch."""
    needed = needed_libraries(library)
    if not needed:
        return ["it needs no library at all, not even torch's"]
    wrong = [name for name in needed if not (ALLOWED_LIBRARIES.fullmatch(name) or COMPILER_LIBRARIES.fullmatch(name))]
    return [f"it needs {name}, which not every system with torch has" for name in wrong]


def search_paths(library: Path) -> list[str]:
    """A folder of the machine that built it is no place to look for libraries on another."""
    found = re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", tool("readelf", "--wide", "--dynamic", library))
    return [f"its {kind} is {folder}" for kind, folder in found]


def torch_interface(library: Path) -> list[str]:
    """Of torch, the stable C functions alone."""
    undefined = dynamic_symbols(library, "--undefined-only")
    wrong = [f"it uses {name}, which is not part of a stable interface" for name in undefined if unstable(name)]
    if not any(name.startswith(STABLE_SYMBOLS) for name in undefined):
        wrong.append("it uses no function of torch's stable interface")
    return wrong


def unstable(symbol: str) -> bool:
    return UNSTABLE_SYMBOLS.match(symbol) is not None


def cpp_runtime(library: Path) -> list[str]:
    """What the C++ library does not give a version is not in it, but happened to be found in torch's libraries."""
    lines = (line.split() for line in tool("nm", "--dynamic", "--undefined-only", library).splitlines())
    names = [words[-1] for words in lines if words[0] == "U" and "@" not in words[-1]]
    return [
        f"it uses {name}, which only newer C++ libraries have: see csrc/torch/old_systems.cpp"
        for name in names
        if STANDARD_LIBRARY.match(name)
    ]


def exports(library: Path) -> list[str]:
    """Functions of ours could clash with those of another build of us."""
    names = dynamic_symbols(library, "--defined-only")
    return [f"it exports {name}" for name in names if OWN_SYMBOLS.match(name)]


def executable_stack(library: Path) -> list[str]:
    stacks = re.findall(r"GNU_STACK.*", tool("readelf", "--wide", "--program-headers", library))
    return [] if len(stacks) == 1 and "RWE" not in stacks[0] else ["it asks for an executable stack"]


def debug_sections(library: Path) -> list[str]:
    sections = re.findall(r" (\.debug_\w+|\.symtab) ", tool("readelf", "--wide", "--sections", library))
    return [f"it carries {name}: it was not stripped" for name in sections]


GATES: tuple[Callable[[Path], list[str]], ...] = (
    dependencies,
    search_paths,
    torch_interface,
    cpp_runtime,
    exports,
    executable_stack,
)
# A debug build in the source tree is no fault.
GATES_OF_RELEASES = (*GATES, debug_sections)


def offences(library: Path) -> list[str]:
    """Everything that any gate of a release has against the library."""
    return [offence for gate in GATES_OF_RELEASES for offence in gate(library)]
