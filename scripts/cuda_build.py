"""How fastattn/_C_cuda.so is built: nvcc for the engine, the C++ compiler for the binding, driven by ninja.

torch's own CUDAExtension does not do: it refuses to work under a CPU-only torch, which is all that these sources need,
and it takes every real architecture through a virtual one of its own, which multiplies the front end's time.

    build/cuda/build.ninja      what is compiled, and how; only what has changed is compiled again
    build/cuda/<source>.o.log   what nvcc and `ptxas -v` said about one source
    build/cuda/ptxas.log        all of these, one after the other

setup.py builds with it; the compile gate (cuda_gate.py) reads the logs, and takes toolkit and architectures from here.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
LOG = BUILD / "ptxas.log"

# The first nvcc that knows sm_100 and sm_120.
OLDEST_NVCC = (12, 8)
# Where `pip install fastattn[nvcc]` puts it.
PIP_TOOLKIT = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13"
ARCHS_VARIABLE = "FASTATTN_CUDA_ARCHS"
DEFAULT_ARCHS = "80;90;100;120"
# The one virtual architecture: the kernels use nothing beyond it, and its PTX runs on every later GPU.
VIRTUAL_ARCH = 80


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    version: tuple[int, int]
    library_flags: tuple[str, ...]  # -L..., where its static runtime is


class Missing(Exception):
    """There is no nvcc to build with; the text says why."""


def find_toolkit() -> Toolkit:
    """The nvcc on PATH, in CUDA_HOME (or CUDA_PATH), in /usr/local/cuda or of pip's packages, in this order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [None, *(f"{home}/bin" for home in [*homes, "/usr/local/cuda", PIP_TOOLKIT])]
    found = (shutil.which("nvcc", path=folder) for folder in folders)
    nvcc = next((path for path in found if path), None)
    if nvcc is None:
        raise Missing("nvcc was not found on PATH, in CUDA_HOME, in /usr/local/cuda or among pip's packages")
    # It prints the folders that it would compile and link with.
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        plan = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    except (OSError, subprocess.CalledProcessError) as error:
        raise Missing(f"{nvcc} does not run: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", version)
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
    if release is None or libraries is None:
        raise Missing(f"{nvcc} is not NVIDIA's compiler, or one that nobody knew when this was written")
    number = (int(release[1]), int(release[2]))
    if number < OLDEST_NVCC:
        raise Missing("{} is of CUDA {}.{}; at least {}.{} is needed".format(nvcc, *number, *OLDEST_NVCC))
    # pip's packages have one folder of libraries, where nvcc looks for lib64.
    beside = Path(nvcc).resolve().parent.parent / "lib"
    more = [f"-L{beside}"] if (beside / "libcudart_static.a").exists() else []
    return Toolkit(nvcc, number, (*shlex.split(libraries[1]), *more))


def architectures() -> tuple[int, ...]:
    """The real architectures to compile for: FASTATTN_CUDA_ARCHS, numbers such as 80 or 8.0 between ; , or blanks."""
    text = os.environ.get(ARCHS_VARIABLE) or DEFAULT_ARCHS
    names = re.split(r"[;,\s]+", text.strip())
    wrong = [name for name in names if not re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", name)]
    if wrong:
        raise SystemExit(
            f"fastattn: {ARCHS_VARIABLE} is {text!r}, where {wrong[0]!r} is no architecture; it must be numbers such as"
            f" {DEFAULT_ARCHS!r}. One with a letter runs on no later GPU, and these kernels need none."
        )
    numbers = sorted({int(name.replace(".", "")) for name in names})
    if numbers[0] < VIRTUAL_ARCH:
        raise SystemExit(
            f"fastattn: {ARCHS_VARIABLE} is {text!r}, but the kernels need sm_{VIRTUAL_ARCH} or later: leave out"
            f" {numbers[0]}."
        )
    return tuple(numbers)


def host_compiler_flags() -> list[str]:
    """nvcc's host compiler is CXX, where that is set: the program itself, which a compiler cache may stand before."""
    words = shlex.split(os.environ.get("CXX") or "")
    if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache"):
        del words[0]
    return ["-ccbin", words[0]] if words else []


def architecture_text(archs: Sequence[int]) -> str:
    """What cuda::build_info() says: "80 90 100 120 +ptx80"."""
    return " ".join([*map(str, archs), f"+ptx{VIRTUAL_ARCH}"])


def nvcc_flags(version: tuple[int, int], archs: Sequence[int], optimise: Sequence[str] = ("-O3",)) -> list[str]:
    """Everything but the input and the output, for a .cu file of csrc/cuda."""
    virtual = f"arch=compute_{VIRTUAL_ARCH}"
    host = "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-fno-math-errno,-Wall,-Wextra,-Werror"
    return [
        "-std=c++20",
        *optimise,
        *(flag for arch in archs for flag in ("-gencode", f"{virtual},code=sm_{arch}")),
        *("-gencode", f"{virtual},code=compute_{VIRTUAL_ARCH}"),
        # Drivers of CUDA 12 before 12.4 cannot unpack it; those that CUDA 13 needs all can.
        *(["--compress-mode=size"] if version >= (13, 0) else []),
        *("-Xptxas", "-v"),
        *("-Werror", "all-warnings"),
        *("-Xcompiler", host),
        *host_compiler_flags(),
        f"-I{ROOT / 'csrc'}",
        f'-DFASTATTN_CUDA_ARCHS="{architecture_text(archs)}"',
    ]


def build(
    output: Path,
    toolkit: Toolkit,
    engine: Sequence[str],
    binding: Sequence[str],
    *,
    binding_flags: Sequence[str],
    link_flags: Sequence[str],
    optimise: Sequence[str],
    jobs: str,
) -> None:
    """Compile and link.

    Args:
        output: The library to make.
        toolkit: What to compile the engine with.
        engine: .cu and .cpp files, relative to the project; both are nvcc's.
        binding: .cpp files that include torch, the C++ compiler's.
        binding_flags: For the C++ compiler.
        link_flags: Libraries and their folders.
        optimise: -O3, or what a debug build has instead.
        jobs: Compilers at once.
    """
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if ninja is None:
        raise SystemExit("fastattn: the CUDA kernels are built by ninja, which is missing: pip install ninja.")
    objects = {source: BUILD / f"{source.removeprefix('csrc/')}.o" for source in [*engine, *binding]}
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    cuda = [toolkit.nvcc, *nvcc_flags(toolkit.version, architectures(), optimise)]
    # $$ is ninja's dollar. What nvcc says is kept, and shown where it fails.
    keep = "> $out.log 2>&1 || { cat $out.log; exit 1; }"
    # cudart is linked in: libcudart.so has another name in every major version of CUDA.
    runtime = [*toolkit.library_flags, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    library = BUILD / output.name
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {_escape(str(BUILD))}",
        *_rule("cuda", f"{_join(cuda)} -MD -MF $out.d -c $in -o $out {keep}", depends=True),
        *_rule("cxx", f"{_join([*compiler, *binding_flags])} -MMD -MF $out.d -c $in -o $out", depends=True),
        *_rule("link", f"{_join([*compiler, '-shared'])} $in -o $out {_join([*link_flags, *runtime])}"),
        *(f"build {_escape(str(objects[source]))}: cuda {_escape(str(ROOT / source))}" for source in engine),
        *(f"build {_escape(str(objects[source]))}: cxx {_escape(str(ROOT / source))}" for source in binding),
        f"build {_escape(str(library))}: link {' '.join(_escape(str(path)) for path in objects.values())}",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [ninja, "-f", str(BUILD / "build.ninja"), "-j", jobs, str(library)]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        raise SystemExit("fastattn: the CUDA kernels did not compile; FASTATTN_CUDA=0 builds without them.")
    logs = (Path(f"{objects[source]}.log") for source in engine)
    LOG.write_text("".join(path.read_text(encoding="utf-8") for path in logs), encoding="utf-8")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, output)
    shutil.copymode(library, output)


def _join(command: Sequence[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _escape(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


def _rule(name: str, command: str, *, depends: bool = False) -> list[str]:
    lines = [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
    return [*lines, "  depfile = $out.d", "  deps = gcc"] if depends else lines
