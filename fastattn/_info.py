"""What this installation of fastattn is and does on this machine: fastattn.info(), `python -m fastattn info`."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import fastattn
from fastattn import _cuda, _ops, _provider, _sdpa

__all__ = ["Info", "info"]


@dataclass(frozen=True)
class Info:
    """The answers of fastattn.info(). `print(info())` shows them one to a line: put that into a bug report."""

    version: str
    torch_version: str
    python_version: str
    processor: str
    isa: str  # the level in use
    isa_levels: tuple[str, ...]  # all levels of the architecture, lowest first
    isas: tuple[str, ...]  # those that the processor and the build support; the last is the default
    isa_forced_by: str | None  # the setting of the environment variable, where there is one
    threads: int  # torch.get_num_threads(), which every call reads anew
    cuda: str  # what CUDA tensors are served on, or all that is missing
    cuda_build: dict[str, str]  # toolkit and architectures of the CUDA library; empty where it is not loaded
    build: dict[str, str]  # compiler, flags, the torch headers and the ABI that the library was built for
    provider: str  # state of torch.nn.attention's provider "fastattn"
    sdpa_replaced: bool  # replace_sdpa() or a `with replaced_sdpa()` block is in force

    def __str__(self) -> str:
        levels = [level if level in self.isas else f"{level} (not here)" for level in self.isa_levels]
        forced = f", forced by {self.isa_forced_by}" if self.isa_forced_by else ""
        rows = {
            "fastattn": self.version,
            "torch": self.torch_version,
            "python": self.python_version,
            "processor": self.processor,
            "ISA in use": f"{self.isa}{forced}",
            "ISA found": self.isas[-1],
            "ISA levels": ", ".join(levels),
            "threads": str(self.threads),
            "CUDA": self.cuda,
            **{f"CUDA {name}": text for name, text in self.cuda_build.items()},
            **self.build,
            "provider": self.provider,
            "SDPA": "replaced" if self.sdpa_replaced else "not replaced",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def info() -> Info:
    """Version, instruction set levels found and in use, threads, CUDA, build flags and the state of the integrations.

    Returns:
        An `Info`, whose str is a table.

    Example:
        >>> import fastattn
        >>> print(fastattn.info())                                                    # doctest: +ELLIPSIS
        fastattn ...
    """
    ops = torch.ops.fastattn
    capability = os.environ.get(_ops.CAPABILITY_VARIABLE)
    return Info(
        version=fastattn.__version__,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        processor=_processor(),
        isa=ops._isa(),
        isa_levels=tuple(ops._all_isas().split(",")),
        isas=tuple(ops._supported_isas().split(",")),
        isa_forced_by=f"{_ops.CAPABILITY_VARIABLE}={capability}" if capability else None,
        threads=torch.get_num_threads(),
        cuda=_cuda_state(),
        cuda_build={} if _cuda.missing else _cuda_build(),
        build=_cuda.parse_build_info(ops._build_info()),
        provider=_provider.state(),
        sdpa_replaced=_sdpa._switch.active,
    )


def _processor() -> str:
    """The processor's name, as the system has it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_build() -> dict[str, str]:
    """The toolkit ("cuda" to the library) and the architectures ("cuda archs")."""
    lines = _cuda.build_info()
    return {"toolkit" if key == "cuda" else key.removeprefix("cuda "): text for key, text in lines.items()}


def _cuda_state() -> str:
    """What CUDA tensors can be served on, or all that is missing for it."""
    missing = []
    if not _cuda.LIBRARY.exists():
        missing.append(f"fastattn was built without its CUDA kernels ({_cuda.LIBRARY.name})")
    if torch.version.cuda is None:
        missing.append("torch was built without CUDA")
    else:
        if _cuda.LIBRARY.exists() and _cuda.missing is not None:
            missing.append(_cuda.missing)
        if not torch.cuda.is_available():
            missing.append(_cuda.why_no_device())
    if missing:
        return ("built, not usable: " if _cuda.LIBRARY.exists() else "not built: ") + "; ".join(missing)
    return "; ".join(_cuda.devices())
