"""What a result was measured on and with: printed above tables, written into JSON and onto plots."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastattn
from bench.cuda import Gpu, describe_gpu
from bench.peak import active_isa
from bench.peers import Peer

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    cpu: str
    logical_cpus: int
    isa: str
    threads: int
    system: str
    date: str
    commit: str  # "" outside a git checkout; ends in "+" where files differ from it
    versions: dict[str, str] = field(default_factory=dict)
    gpu: Gpu | None = None  # where that is what was measured

    def lines(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        commit = f" ({self.commit})" if self.commit else ""
        if self.gpu is not None:
            return [str(self.gpu), f"{self.cpu}; {versions}{commit}; {self.date}"]
        return [
            f"{self.cpu}, {self.logical_cpus} CPUs; instruction set {self.isa}, {self.threads} "
            f"thread{'s' if self.threads != 1 else ''}; {self.system}",
            f"{versions}{commit}; {self.date}",
        ]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cpu_name() -> str:
    """The processor's own name; where it is vague ("AMD EPYC"), family and model say which."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    if not any(letter.isdigit() for letter in name) and "cpu family" in facts:
        name += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    return name


def git_commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def describe(peers: list[Peer], device: str = "cpu") -> Machine:
    gpu = describe_gpu() if device == "cuda" else None
    versions = {"fastattn": fastattn.__version__, "torch": torch.__version__}
    if gpu is not None:
        versions |= {"CUDA": gpu.cuda, "cuDNN": gpu.cudnn}
    versions |= {peer.needs[0]: peer.version() for peer in peers if peer.needs}
    versions["Python"] = platform.python_version()
    return Machine(
        cpu=cpu_name(),
        logical_cpus=len(os.sched_getaffinity(0)),
        isa=active_isa(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        commit=git_commit(),
        versions=versions,
        gpu=gpu,
    )
