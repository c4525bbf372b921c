"""Holds wheels and sdists to what a release promises: `python scripts/wheel_gates.py dist/*`.

Every gate looks at the finished file and prints what offends: a symbol, a dependency, a file. The gates of the compiled
libraries are in library_gates.py. Needs auditwheel and twine (`pip install .[release]`), readelf and nm.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import library_gates

ROOT = Path(__file__).resolve().parent.parent
MB = 1_000_000
LIMIT_MB = {"with CUDA": 60.0, "without CUDA": 3.0, "sdist": 5.0}
PLATFORM = re.compile(r"manylinux_2_28_(x86_64|aarch64)")
OLDEST_PYTHON, OLDEST_TORCH = "3.10", "2.10"
# What of the repository an sdist does without.
NOT_IN_SDIST = re.compile(r"\.gitignore|\.(ci|github)/.*")
# What the build tools add.
ADDED_TO_SDIST = re.compile(r"PKG-INFO|setup\.cfg|fastattn\.egg-info/.*")


def version() -> str:
    """Ours, without importing torch."""
    text = (ROOT / "fastattn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    assert found
    return found[1]


def repository_files() -> set[str] | None:
    """The files that git tracks; None where there is no repository to ask."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=False, capture_output=True, text=True)
    return set(listing.stdout.split("\0")) - {""} if listing.returncode == 0 else None


# ---- Of both --------------------------------------------------------------------------------------------------------


def metadata_offences(metadata: Message) -> list[str]:
    """What pip goes by."""
    wanted = {"Name": "fastattn", "Version": version(), "Requires-Python": f">={OLDEST_PYTHON}"}
    wrong = [f"{key} is {metadata[key]!r} and not {value!r}" for key, value in wanted.items() if metadata[key] != value]
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    if required != [f"torch>={OLDEST_TORCH}"]:
        wrong.append(f"it requires {required}: one torch>={OLDEST_TORCH} without an upper bound is wanted")
    wrong += [f"{key} is missing" for key in ("Summary", "License-Expression", "License-File") if not metadata[key]]
    if not metadata.get_payload():
        wrong.append("it has no description: the README is missing")
    return wrong


def twine_offences(path: Path) -> list[str]:
    """What the package index would refuse."""
    checked = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(path)], check=False, capture_output=True, text=True
    )
    return [] if checked.returncode == 0 else [f"twine check: {checked.stdout.strip()}{checked.stderr.strip()}"]


# ---- Wheels ---------------------------------------------------------------------------------------------------------


def name_offences(path: Path) -> list[str]:
    """The tag says for whom it is: every Python 3, one platform."""
    parts = path.name.removesuffix(".whl").split("-")
    if len(parts) != 5 or parts[:4] != ["fastattn", version(), "py3", "none"]:
        return [f"its name is {path.name}, not fastattn-{version()}-py3-none-<platform>.whl"]
    if not PLATFORM.fullmatch(parts[4]):
        return [f"its platform is {parts[4]}, not {PLATFORM.pattern}: auditwheel has not repaired it"]
    return []


def size_offences(path: Path, limit_mb: float) -> list[str]:
    size_mb = path.stat().st_size / MB
    return [f"it has {size_mb:.1f} MB, more than {limit_mb:g}"] if size_mb > limit_mb else []


def content_offences(names: list[str], python_files: set[str]) -> list[str]:
    """The package, its libraries, its metadata, and nothing else; ``python_files`` are those of the source tree."""
    allowed = re.compile(r"fastattn/(.*\.py|py\.typed|_C_cpu\.so|_C_cuda\.so)|fastattn-[^/]+\.dist-info/.*")
    wrong = [f"it holds {name}" for name in names if not allowed.fullmatch(name)]
    packaged = {name for name in names if name.startswith("fastattn/") and not name.endswith(".so")}
    wrong += [f"it lacks {name}" for name in sorted(python_files - packaged)]
    wrong += [f"it holds {name}, which the source tree does not" for name in sorted(packaged - python_files)]
    if "fastattn/_C_cpu.so" not in names:
        wrong.append("it lacks fastattn/_C_cpu.so")
    if not any(re.fullmatch(r"[^/]+\.dist-info/licenses/LICENSE", name) for name in names):
        wrong.append("it lacks a licence")
    return wrong


def wheel_file_offences(text: str, path: Path) -> list[str]:
    """The file WHEEL: pip installs by what it says, not by the name."""
    content = Parser().parsestr(text)
    wrong = [] if content["Root-Is-Purelib"] == "false" else ["WHEEL calls it a wheel of Python files alone"]
    tags = content.get_all("Tag", [])
    expected = "-".join(path.name.removesuffix(".whl").split("-")[2:])
    return wrong + ([] if tags == [expected] else [f"WHEEL has the tags {tags}, the name has {expected}"])


def auditwheel_offences(report: dict[str, object], path: Path) -> list[str]:
    """Of auditwheel's report: symbols of libraries newer than the tag promises, and libraries beside torch's."""
    wrong = []
    promised, needed = _glibc(path.name), _glibc(str(report["sym_tag"]))
    if promised is None or needed is None or needed > promised:
        versions = report["versioned_symbols"]
        wrong.append(f"its symbols are those of {report['sym_tag']}, later than its name says: {versions}")
    external = report["external_libs"]
    assert isinstance(external, dict)
    wrong += [f"it needs {name}" for name in external if not library_gates.ALLOWED_LIBRARIES.fullmatch(name)]
    if report.get("unsupported_isa"):
        wrong.append("it says that it needs more than the processor's baseline")
    return wrong


def _glibc(tag: str) -> tuple[int, int] | None:
    found = re.search(r"manylinux_(\d+)_(\d+)_", tag)
    return (int(found[1]), int(found[2])) if found else None


def run_auditwheel(path: Path) -> dict[str, object]:
    command = [sys.executable, "-m", "auditwheel", "show", "--json", str(path)]
    found: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def wheel_offences(path: Path, needs_cuda: bool) -> list[str]:
    """Everything that any gate has against a wheel."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        tracked = repository_files() or set()
        python_files = {name for name in tracked if name.startswith("fastattn/")}
        has_cuda = "fastattn/_C_cuda.so" in names
        wrong = name_offences(path)
        wrong += size_offences(path, LIMIT_MB["with CUDA" if has_cuda else "without CUDA"])
        wrong += content_offences(names, python_files)
        wrong += metadata_offences(Parser().parsestr(wheel.read(f"{info}/METADATA").decode()))
        wrong += wheel_file_offences(wheel.read(f"{info}/WHEEL").decode(), path)
        wrong += [] if has_cuda or not needs_cuda else ["it lacks fastattn/_C_cuda.so, which was asked for"]
        for name in names:
            if name.endswith(".so"):
                library = Path(wheel.extract(name, folder))
                wrong += [f"{PurePosixPath(name).name}: {text}" for text in library_gates.offences(library)]
        return wrong + auditwheel_offences(run_auditwheel(path), path) + twine_offences(path)


# ---- Sdists ---------------------------------------------------------------------------------------------------------


def sdist_content_offences(names: set[str], tracked: set[str] | None) -> list[str]:
    """Every file of the repository, but for what only the repository needs; nothing else."""
    if tracked is None:
        return ["there is no git repository here to compare its files with"]
    wanted = {name for name in tracked if not NOT_IN_SDIST.fullmatch(name)}
    surplus = {name for name in names - wanted if not ADDED_TO_SDIST.fullmatch(name)}
    return [
        *(f"it lacks {name}: see MANIFEST.in" for name in sorted(wanted - names)),
        *(f"it holds {name}, which is not in the repository" for name in sorted(surplus)),
        *([] if "LICENSE" in names else ["it lacks a licence"]),
    ]


def sdist_offences(path: Path) -> list[str]:
    """Everything that any gate has against an sdist."""
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        root = f"fastattn-{version()}"
        outside = [member.name for member in members if not member.name.startswith(root + "/")]
        names = {member.name.removeprefix(root + "/") for member in members} - set(outside)
        info = archive.extractfile(f"{root}/PKG-INFO")
        assert info
        metadata = Parser().parsestr(info.read().decode())
    return [
        *([] if path.name == f"{root}.tar.gz" else [f"its name is {path.name}, not {root}.tar.gz"]),
        *(f"it holds {name}, outside of {root}" for name in outside),
        *size_offences(path, LIMIT_MB["sdist"]),
        *sdist_content_offences(names, repository_files()),
        *metadata_offences(metadata),
        *twine_offences(path),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .whl or a .tar.gz")
    parser.add_argument("--needs-cuda", action="store_true", help="a wheel without the CUDA library is an error")
    options = parser.parse_args()
    assert sysconfig.get_platform().startswith("linux"), "readelf, nm and auditwheel know Linux alone"
    failed = False
    for path in options.files:
        if path.suffix == ".whl":
            found = wheel_offences(path, options.needs_cuda)
        elif path.name.endswith(".tar.gz"):
            found = sdist_offences(path)
        else:
            found = ["it is neither a wheel nor an sdist"]
        failed |= bool(found)
        print(f"{path.name}: {path.stat().st_size / MB:.2f} MB, {'refused' if found else 'passed'}")
        for offence in found:
            print(f"  {offence}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
