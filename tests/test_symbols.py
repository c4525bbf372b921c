"""What the compiled files contain: one wheel has to run on every processor of its architecture, every Python and torch.

The linker keeps one copy of a function that several files define weakly. Were it the copy of an AVX-512 file, the
program would end with an illegal instruction on a lesser machine, so the files of the instruction sets must define
nothing weak; and no other file may use more than the baseline.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("_C_cpu.so", "_C_cuda.so")
LEVELS = ("avx2", "avx512", "avx512_bf16")
ARM_LEVELS = ("neon", "neon_bf16")
HERE = platform.machine()
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-fvisibility=hidden"]

pytestmark = pytest.mark.skipif(HERE not in ELF_MACHINES, reason="object files of Linux on x86-64 or 64-bit ARM")
on_x86 = pytest.mark.skipif(HERE != "x86_64", reason="instruction sets of x86-64")


def machine_of(level: str) -> str:
    return "x86_64" if level in LEVELS else "aarch64" if level in ARM_LEVELS else HERE


def tool(*command: str | Path, machine: str = HERE) -> str:
    """A tool of binutils, the cross compiler's for object files of another machine."""
    name = str(command[0]) if machine == HERE else f"{machine}-linux-gnu-{command[0]}"
    command = (name, *command[1:])
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def sources(*groups: str) -> list[str]:
    lines = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if line.split() and line.split()[0] in groups]


def isa_source(level: str) -> str:
    return f"cpu/isa_{level}.cpp"


BASELINE_CPU_SOURCES = [path for path in sources("cpu") if path not in map(isa_source, (*LEVELS, *ARM_LEVELS))]


def dependencies(source: str) -> set[Path]:
    """The file and what of csrc/ it includes, directly or not."""
    found: set[Path] = set()
    pending = [ROOT / "csrc" / source]
    while pending:
        path = pending.pop()
        if path not in found:
            found.add(path)
            included = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
            pending += [ROOT / "csrc" / name for name in included]
    return found


def is_for(path: Path, machine: str) -> bool:
    with path.open("rb") as file:
        return int.from_bytes(file.read(20)[18:], "little") == ELF_MACHINES[machine]


def built_objects(source: str, machine: str = HERE) -> list[Path]:
    """The object files that setup.py and CMake made of a source for a machine, where they are up to date."""
    stem = source.removesuffix(".cpp")
    changed = max(path.stat().st_mtime for path in dependencies(source))
    return [
        path
        for pattern in (f"build/**/{stem}.o", f"build/**/{source}.o")
        for path in ROOT.glob(pattern)
        # Instrumented code has symbols of its own.
        if "sanitize" not in path.relative_to(ROOT).parts and path.stat().st_mtime >= changed and is_for(path, machine)
    ]


@functools.cache
def compile_object(source: str) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip(f"{source} has no object file that is up to date, and there is no compiler to make one")
    target = Path(tempfile.mkdtemp(prefix="fastattn-symbols-")) / (Path(source).stem + ".o")
    subprocess.run([compiler, *FLAGS, "-I", ROOT / "csrc", "-c", ROOT / "csrc" / source, "-o", target], check=True)
    return target


def objects(source: str, machine: str = HERE) -> list[Path]:
    built = built_objects(source, machine)
    if not built and machine != HERE:
        pytest.skip(f"{source} has no object file for {machine} that is up to date; `make cross` makes those of ARM")
    return built or [compile_object(source)]


def objects_of(level: str) -> list[Path]:
    return objects(isa_source(level), machine_of(level))


@functools.cache
def instructions(path: Path, machine: str = HERE) -> list[tuple[str, str, str]]:
    """(function, mnemonic, operands) of every instruction in an object file."""
    function, found = "", []
    for line in tool("objdump", "-d", "--no-show-raw-insn", "-w", path, machine=machine).splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif match := re.match(r"\s+[0-9a-f]+:\t(?:(?:rep[a-z]*|lock|bnd|notrack|data16|cs) )*(\S+)\s*(.*)", line):
            found.append((function, match[1], match[2]))
    assert found, f"objdump shows no instructions in {path}"
    return found


# Instructions beyond x86-64-v1 that do not begin with a v, as all of AVX's do. tzcnt is not among them: older
# processors run it as bsf, and compilers use it so.
BEYOND_BASELINE = re.compile(
    r"popcnt|lzcnt|crc32|movbe|andn|bextr|blsi|blsmsk|blsr|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lddqu|movddup|movshdup"
    r"|movsldup|h?addsub\w+|haddp[sd]|hsubp[sd]|phadd\w+|phsub\w+|pabs[bwd]|palignr|pshufb|psign[bwd]|pmaddubsw|pmulhrsw"
    r"|blendv?p[sd]|pblend\w+|dpp[sd]|extractps|insertps|mpsadbw|packusdw|pcmpeqq|pcmpgtq|pextr[bdq]|pinsr[bdq]|pmaxs[bd]"
    r"|pmaxu[wd]|pmins[bd]|pminu[wd]|pmovsx\w+|pmovzx\w+|pmuldq|pmulld|ptest|round[ps][sd]|pcmp[ei]str[im]|cmpxchg16b"
)


def is_vector_extension(mnemonic: str) -> bool:
    return mnemonic.startswith("v") and mnemonic not in ("verr", "verw")


@pytest.mark.parametrize("level", ["baseline", *LEVELS, *ARM_LEVELS])
def test_a_level_defines_its_table_and_nothing_weak(level: str) -> None:
    for path in objects_of(level):
        defined = [line.split() for line in tool("nm", "--defined-only", path, machine=machine_of(level)).splitlines()]
        weak = [name for _, kind, name in defined if kind in "WwVvu"]
        assert not weak, f"{path} defines weak symbols: {weak}"
        visible = [name for _, kind, name in defined if kind.isupper() and not name.startswith("$")]
        assert visible == [f"_ZN8fastattn3cpu{len(level)}{level}7kernelsE"], path


@pytest.mark.parametrize("level", [*LEVELS, *ARM_LEVELS])
def test_a_level_needs_only_plain_c_functions(level: str) -> None:
    """Anything of the C++ library would bring inline functions along; memcpy and the like choose for themselves.

    What a level adds nothing to, it may leave to another one's table.
    """
    allowed = {"memcpy", "memset", "memmove", "expf", "logf", "exp", "log", "_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail"}
    for path in objects_of(level):
        needed = {
            line.split()[-1] for line in tool("nm", "--undefined-only", path, machine=machine_of(level)).splitlines()
        }
        tables = {f"_ZN8fastattn3cpu{len(other)}{other}7kernelsE" for other in (*LEVELS, *ARM_LEVELS) if other != level}
        assert needed - tables <= allowed, path
        assert len(needed & tables) <= 1, path


@pytest.mark.parametrize("level", [*LEVELS, *ARM_LEVELS])
def test_a_level_runs_nothing_when_the_library_is_loaded(level: str) -> None:
    for path in objects_of(level):
        sections = tool("readelf", "--wide", "--sections", path, machine=machine_of(level))
        assert ".text" in sections, path
        assert not re.search(r"\.(init_array|ctors|init)\b", sections), path


def assert_baseline(path: Path) -> None:
    for function, mnemonic, operands in instructions(path):
        is_beyond = is_vector_extension(mnemonic) or BEYOND_BASELINE.fullmatch(mnemonic) or "%ymm" in operands
        assert not is_beyond, f"{path}: {function} has {mnemonic} {operands}"


@pytest.mark.parametrize("level", [*LEVELS, *ARM_LEVELS])
def test_a_level_of_another_architecture_is_empty(level: str) -> None:
    for machine in ELF_MACHINES:
        if machine != machine_of(level):
            for path in built_objects(isa_source(level), machine):
                assert not tool("nm", "--defined-only", path, machine=machine).strip(), path


@on_x86
@pytest.mark.parametrize("source", BASELINE_CPU_SOURCES)
def test_other_files_stay_within_the_baseline(source: str) -> None:
    for path in objects(source):
        assert_baseline(path)


@on_x86
@pytest.mark.parametrize("source", sources("torch", "cpu_torch", "cuda_torch"))
def test_the_binding_stays_within_the_baseline(source: str) -> None:
    built = built_objects(source)
    if not built:
        pytest.skip("setup.py's object file is not there or not up to date")
    for path in built:
        assert_baseline(path)


# Dot products, SVE's registers, float16 arithmetic and the atomics of ARMv8.1: what 64-bit ARM did not have at first.
BEYOND_NEON = (
    r"([us]|us|su)dot |(s|u|us)mmla |\w+ .*\bz\d+\.|f(add|mul|mla) v\d+\.[48]h|(cas|swp|ld(add|clr|set|eor))\w* "
)
BEYOND_NEON_WITHOUT_BF16 = BEYOND_NEON + r"|bf(dot|mmla|mlal\w?|cvt\w*) "


@pytest.mark.parametrize(
    ("level", "uses", "beyond"),
    [
        # Registers 16 to 31, masks and zmm are AVX-512's.
        ("avx2", r"vfmadd\w+ .*%ymm|vcvtph2ps .*%ymm", r".*(%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01]))"),
        ("avx512", r"vfmadd\w+ .*%zmm", r"(vdpbf16ps|vcvtne\w*bf16|vp2intersect|vpdp\w+|vpopcnt|vpcompressw|\w+ph) "),
        ("avx512_bf16", r"(vdpbf16ps|vpdp\w+) .*%zmm", r"(vp2intersect|vpopcnt|vpcompressw|\w+ph) "),
        ("neon", r"fmla\s+v\d+\.4s", BEYOND_NEON_WITHOUT_BF16),
        ("neon_bf16", r"bfdot ", BEYOND_NEON),
    ],
    ids=[*LEVELS, *ARM_LEVELS],
)
def test_a_level_stays_within_itself(level: str, uses: str, beyond: str) -> None:
    for path in objects_of(level):
        lines = [f"{mnemonic} {operands}" for _, mnemonic, operands in instructions(path, machine_of(level))]
        assert any(re.match(uses, line) for line in lines), f"{path} does not use what it is for"
        excess = [line for line in lines if re.match(beyond, line) and not line.startswith("vcvtps2ph")]
        assert not excess, f"{path}: {excess[:5]}"


# ---- The shipped libraries ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Path:
    path = ROOT / "fastattn" / request.param
    if not path.exists():
        pytest.skip(f"fastattn/{request.param} is not built")
    return path


def dynamic_symbols(library: Path, kind: str) -> list[str]:
    lines = tool("nm", "--dynamic", kind, library).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines]


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "--dynamic", library))


def test_the_library_needs_neither_python_nor_openmp(library: Path) -> None:
    needed = needed_libraries(library)
    assert needed
    # Nor any of CUDA's, whose names and versions differ from torch to torch.
    unwanted = re.compile(
        r"libtorch_python|libpython|libg?omp|libiomp|libtbb|libmkl|libcuda|libcudart|libnv|libtorch_cuda"
    )
    assert not [name for name in needed if unwanted.match(name)]
    assert not re.search(r"\((RPATH|RUNPATH)\)", tool("readelf", "--dynamic", library))


def test_the_library_uses_only_the_stable_interface_of_torch(library: Path) -> None:
    undefined = dynamic_symbols(library, "--undefined-only")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)
    unstable = re.compile(r"_ZNK?(2at|3c10|5torch)|_ZT[IVS]N(2at|3c10|5torch)|Py|_Py|GOMP_|omp_|__kmpc")
    assert not [name for name in undefined if unstable.match(name)]


# What only libtorch_cuda.so defines, among what the CUDA library needs. The linker of a torch without CUDA cannot
# resolve it, so that it may not be told to insist, and anything else that is missing would only come out at a user's.
FROM_CUDA_TORCH = {"aoti_torch_get_current_cuda_stream"}


def test_whatever_is_undefined_is_defined_somewhere(library: Path) -> None:
    folder = Path(torch.__file__).parent / "lib"
    providers = [folder / name for name in needed_libraries(library) if (folder / name).exists()]
    assert providers
    if library.name == "_C_cuda.so":
        assert "libtorch.so" in needed_libraries(library), "it leads to libtorch_cuda.so where torch has CUDA"
    by_torch = {name for provider in providers for name in dynamic_symbols(provider, "--defined-only")}
    # Of the system's libraries every symbol has a version, but for what torch's libraries happen to export as well.
    lines = tool("nm", "--dynamic", "--undefined-only", library).splitlines()
    undefined = {line.split()[-1] for line in lines if line.split()[0] == "U" and "@" not in line}
    undefined = {name for name in undefined if not re.match(r"_ZN[KRO]*St|_ZSt|_ZT[ISV]N?St", name)}
    allowed = FROM_CUDA_TORCH if library.name == "_C_cuda.so" else set()
    assert undefined - by_torch <= allowed
    assert allowed <= undefined


def test_the_library_exports_nothing_of_its_own(library: Path) -> None:
    """Not even the type names of the C++ library would matter; our functions could clash with another build of us."""
    exported = dynamic_symbols(library, "--defined-only")
    assert not [name for name in exported if "fastattn" in name or name.startswith(("PyInit", "cuda", "__cuda"))]


def test_the_library_asks_for_no_executable_stack(library: Path) -> None:
    (stack,) = re.findall(r"GNU_STACK.*", tool("readelf", "--wide", "--program-headers", library))
    assert "RWE" not in stack
