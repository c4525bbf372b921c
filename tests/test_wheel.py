"""The gates of wheels and sdists, each with something to refuse; and linking for an older glibc."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import glibc_stubs  # noqa: E402
import library_gates  # noqa: E402
import test_wheel as trial  # noqa: E402
import wheel_gates  # noqa: E402

VERSION = wheel_gates.version()
NAME = f"fastattn-{VERSION}-py3-none-manylinux_2_28_x86_64.whl"
linux_with_a_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not all(map(shutil.which, ("cc", "nm", "readelf"))),
    reason="needs Linux, a compiler and binutils",
)


def metadata(**changes: str | None) -> Message:
    fields = {
        "Name": "fastattn",
        "Version": VERSION,
        "Requires-Python": ">=3.10",
        "Summary": "attention",
        "License-Expression": "BSD-3-Clause",
        "License-File": "LICENSE",
        "Requires-Dist": "torch>=2.10",
    }
    message = Message()
    for name, value in (fields | {name.replace("_", "-"): value for name, value in changes.items()}).items():
        if value is not None:
            message[name] = value
    message["Requires-Dist"] = 'matplotlib; extra == "plot"'
    message.set_payload("# fastattn")
    return message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"Requires_Dist": "torch>=2.10,<2.14"}, "without an upper bound"),
        ({"Requires_Dist": "torch==2.13"}, "without an upper bound"),
        ({"Requires_Dist": None}, "without an upper bound"),
        ({"Requires_Python": ">=3.9"}, "Requires-Python is '>=3.9'"),
        ({"Version": "9.9"}, "Version is '9.9'"),
        ({"License_File": None}, "License-File is missing"),
        ({"Summary": None}, "Summary is missing"),
    ],
)
def test_metadata(changes: dict[str, str | None], said: str | None) -> None:
    found = wheel_gates.metadata_offences(metadata(**changes))
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (NAME, None),
        (NAME.replace("x86_64", "aarch64"), None),
        (NAME.replace("manylinux_2_28", "linux"), "auditwheel has not repaired it"),
        (NAME.replace("manylinux_2_28", "manylinux_2_34"), "auditwheel has not repaired it"),
        (NAME.replace("py3-none", "cp311-cp311"), "its name is"),
        (NAME.replace(VERSION, "9.9"), "its name is"),
    ],
)
def test_names(name: str, said: str | None) -> None:
    found = wheel_gates.name_offences(Path(name))
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_contents_of_a_wheel() -> None:
    python = {"fastattn/__init__.py", "fastattn/nn/__init__.py", "fastattn/py.typed"}
    info = f"fastattn-{VERSION}.dist-info"
    good = [*python, "fastattn/_C_cpu.so", f"{info}/METADATA", f"{info}/licenses/LICENSE"]

    def refused(names: list[str]) -> str:
        return "; ".join(wheel_gates.content_offences(names, python))

    assert refused(good) == ""
    assert refused([*good, "tests/test_parity.py"]) == "it holds tests/test_parity.py"
    assert "holds fastattn.libs/libgomp.so.1" in refused([*good, "fastattn.libs/libgomp.so.1"])
    assert "holds fastattn/_old.py, which the source tree does not" in refused([*good, "fastattn/_old.py"])
    for name in ("fastattn/py.typed", "fastattn/_C_cpu.so"):
        assert f"it lacks {name}" in refused([x for x in good if x != name])
    assert "it lacks a licence" in refused([name for name in good if "LICENSE" not in name])


def test_the_file_wheel() -> None:
    text = "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-manylinux_2_28_x86_64\n"
    assert wheel_gates.wheel_file_offences(text, Path(NAME)) == []
    assert "Python files alone" in wheel_gates.wheel_file_offences(text.replace("false", "true"), Path(NAME))[0]
    assert "the name has" in wheel_gates.wheel_file_offences(text.replace("many", ""), Path(NAME))[0]


def test_size(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(bytes(1_100_000))
    assert wheel_gates.size_offences(path, 2.0) == []
    assert wheel_gates.size_offences(path, 1.0) == ["it has 1.1 MB, more than 1"]


def test_what_auditwheel_reports() -> None:
    report: dict[str, object] = {
        "sym_tag": "manylinux_2_27_x86_64",
        "versioned_symbols": {"libc.so.6": ["GLIBC_2.27"]},
        "external_libs": {"libtorch_cpu.so": None, "libc10.so": None},
        "unsupported_isa": False,
    }
    assert wheel_gates.auditwheel_offences(report, Path(NAME)) == []
    later = report | {"sym_tag": "manylinux_2_34_x86_64", "versioned_symbols": {"libc.so.6": ["GLIBC_2.34"]}}
    assert "GLIBC_2.34" in wheel_gates.auditwheel_offences(later, Path(NAME))[0]
    none = report | {"sym_tag": "linux_x86_64"}
    assert "later than its name says" in wheel_gates.auditwheel_offences(none, Path(NAME))[0]
    more = report | {"external_libs": {"libcudart.so.13": None}}
    assert wheel_gates.auditwheel_offences(more, Path(NAME)) == ["it needs libcudart.so.13"]
    assert len(wheel_gates.auditwheel_offences(report | {"unsupported_isa": True}, Path(NAME))) == 1


def test_contents_of_an_sdist() -> None:
    tracked = {"LICENSE", "setup.py", "csrc/core/mask.h", ".ci/run", ".github/workflows/ci.yml", ".gitignore"}
    good = {"LICENSE", "setup.py", "csrc/core/mask.h", "PKG-INFO", "setup.cfg", "fastattn.egg-info/SOURCES.txt"}
    assert wheel_gates.sdist_content_offences(good, tracked) == []
    assert wheel_gates.sdist_content_offences(good - {"setup.py"}, tracked) == ["it lacks setup.py: see MANIFEST.in"]
    found = wheel_gates.sdist_content_offences(good | {"fastattn/_C_cpu.so"}, tracked)
    assert found == ["it holds fastattn/_C_cpu.so, which is not in the repository"]
    assert "it lacks a licence" in wheel_gates.sdist_content_offences(good - {"LICENSE"}, tracked - {"LICENSE"})
    assert "no git repository" in wheel_gates.sdist_content_offences(good, None)[0]


def test_an_sdist_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_gates, "repository_files", lambda: {"LICENSE"})
    monkeypatch.setattr(wheel_gates, "twine_offences", lambda path: [])

    def make(*names: str) -> list[str]:
        path = tmp_path / f"fastattn-{VERSION}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                data = bytes(metadata()) if name.endswith("PKG-INFO") else b"text"
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        return wheel_gates.sdist_offences(path)

    root = f"fastattn-{VERSION}"
    assert make(f"{root}/PKG-INFO", f"{root}/LICENSE") == []
    assert make(f"{root}/PKG-INFO", f"{root}/LICENSE", "elsewhere") == [f"it holds elsewhere, outside of {root}"]


def test_manifest_is_that_of_the_repository() -> None:
    """MANIFEST.in by its own rules: what git tracks and no rule takes would be missing from the sdist."""
    tracked = wheel_gates.repository_files()
    if not tracked:
        pytest.skip("this is no git checkout")
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    names = {name for rule in rules if rule and rule[0] == "include" for name in rule[1:]}
    folders = {rule[1]: rule[2:] for rule in rules if rule and rule[0] == "recursive-include"}

    def is_taken(name: str) -> bool:
        folder = name.split("/", maxsplit=1)[0]
        patterns = folders.get(folder, []) if "/" in name else []
        return name in names or any(Path(name).match(pattern) for pattern in patterns)

    added = {"pyproject.toml", "setup.py"}  # setuptools takes these itself
    missing = {name for name in tracked - added if not is_taken(name) and not wheel_gates.NOT_IN_SDIST.fullmatch(name)}
    assert not missing


# ---- Libraries ------------------------------------------------------------------------------------------------------


def compile_library(folder: Path, code: str, *flags: str, name: str = "_C_cpu.so") -> Path:
    source, library = folder / "library.c", folder / name
    source.write_text(code, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library), *flags], check=True)
    return library


@linux_with_a_compiler
def test_gates_of_libraries(tmp_path: Path) -> None:
    stable = 'int torch_call(void); int puts(const char*); int needs_libc(void) { return puts(""); } '
    for code, flags, said in (
        ("int GOMP_barrier(void); int f(void) { return torch_call() + GOMP_barrier(); }", [], "it uses GOMP_barrier"),
        (
            "int PyLong_AsLong(void); int f(void) { return torch_call() + PyLong_AsLong(); }",
            [],
            "it uses PyLong_AsLong",
        ),
        ("int _ZN2at5emptyEv(void); int f(void) { return torch_call() + _ZN2at5emptyEv(); }", [], "_ZN2at5emptyEv"),
        (
            "int _ZSt3newv(void); int f(void) { return torch_call() + _ZSt3newv(); }",
            [],
            "csrc/torch/old_systems",
        ),
        ("int f(void) { return torch_call(); }", ["-Wl,-rpath,/a/build/folder"], "PATH is /a/build/folder"),
        ("int f(void) { return torch_call(); }", ["-Wl,-z,execstack"], "executable stack"),
        ("int f(void) { return torch_call(); }", ["-g"], "it was not stripped"),
        ("int fastattn_f(void) { return torch_call(); }", [], "it exports fastattn_f"),
        ("int f(void) { return 0; }", [], "no function of torch's stable interface"),
    ):
        library = compile_library(tmp_path, stable + code, *flags, *([] if "-g" in flags else ["-s"]))
        found = library_gates.offences(library)
        assert len(found) == (1 if "-g" not in flags else len(found)), (code, flags, found)
        assert any(said in text for text in found), (code, flags, found)
    good = compile_library(tmp_path, stable + "int f(void) { return torch_call(); }", "-s")
    assert library_gates.offences(good) == []


@linux_with_a_compiler
def test_a_library_that_not_every_system_has(tmp_path: Path) -> None:
    compile_library(tmp_path, "int other(void) { return 0; }", "-Wl,-soname,libgomp.so.1", name="libgomp.so.1")
    alone = compile_library(tmp_path, "int torch_call(void); int f(void) { return torch_call(); }", "-s", "-nostdlib")
    assert library_gates.offences(alone) == ["it needs no library at all, not even torch's"]
    code = "int torch_call(void); int other(void); int f(void) { return torch_call() + other(); }"
    library = compile_library(tmp_path, code, "-s", str(tmp_path / "libgomp.so.1"))
    assert library_gates.offences(library) == ["it needs libgomp.so.1, which not every system with torch has"]


# As readelf prints it; `old` is there for old programs alone, `later` came after 2.28, `data` is a variable.
LISTING = """
   Num:    Value          Size Type    Bind   Vis      Ndx Name
     1: 0000000000000000     0 FUNC    GLOBAL DEFAULT  UND undefined@GLIBC_2.2.5 (2)
     2: 0000000000012340    50 FUNC    GLOBAL DEFAULT   15 exp@@GLIBC_2.29
     3: 0000000000012350    60 FUNC    GLOBAL DEFAULT   15 exp@GLIBC_2.2.5
     4: 0000000000012360    70 FUNC    WEAK   DEFAULT   15 sin@@GLIBC_2.2.5
     5: 0000000000012370    80 FUNC    GLOBAL DEFAULT   15 old@GLIBC_2.2.5
     6: 0000000000012380    90 FUNC    GLOBAL DEFAULT   15 later@@GLIBC_2.32
     7: 0000000000012390     8 OBJECT  GLOBAL DEFAULT   15 data@@GLIBC_2.2.5
     8: 00000000000123a0    10 FUNC    GLOBAL DEFAULT   15 pthread_create@@GLIBC_2.34
     9: 00000000000123b0    10 FUNC    GLOBAL DEFAULT   15 pthread_create@GLIBC_2.2.5
    10: 00000000000123c0    10 FUNC    GLOBAL DEFAULT   15 private@@GLIBC_PRIVATE
    11: 00000000000123d0    10 IFUNC   GLOBAL DEFAULT   15 memcpy@@GLIBC_2.14
    12: 00000000000123e0    10 IFUNC   GLOBAL DEFAULT   15 memcpy@GLIBC_2.2.5
"""


def test_versions_to_link_with() -> None:
    found = {symbol.name: symbol for symbol in glibc_stubs.symbols_of(LISTING, (2, 28))}
    versions = {name: symbol.version for name, symbol in found.items()}
    assert versions == {
        "exp": (2, 2, 5),
        "sin": (2, 2, 5),
        "data": (2, 2, 5),
        "pthread_create": (2, 2, 5),
        "memcpy": (2, 14),
    }
    assert (found["data"].kind, found["data"].size) == ("OBJECT", 8)
    create, sine = found["pthread_create"], found["sin"]
    assert glibc_stubs.library_of(create, "libc.so.6", (2, 28)) == "libpthread.so.0"
    assert glibc_stubs.library_of(create, "libc.so.6", (2, 35)) == "libc.so.6"
    assert glibc_stubs.library_of(sine, "libc.so.6", (2, 28)) == "libc.so.6"
    everything = {symbol.name for symbol in glibc_stubs.symbols_of(LISTING, (2, 99))}
    assert everything == {*versions, "later"}


@linux_with_a_compiler
def test_a_library_linked_for_an_older_glibc(tmp_path: Path) -> None:
    code = """
    #include <math.h>
    #include <pthread.h>
    static void* body(void* x) { return x; }
    double f(double x) { pthread_t t; return pthread_create(&t, 0, body, &x) ? x : exp(x); }
    """

    def newest(*flags: str) -> glibc_stubs.Version:
        library = compile_library(tmp_path, code, *flags, "-lm", "-lpthread")
        symbols = subprocess.run(["nm", "-D", str(library)], check=True, capture_output=True, text=True).stdout
        versions = re.findall(r"@GLIBC_([0-9.]+)", symbols)
        assert versions or "musl" in symbols
        return max(map(glibc_stubs.parse_version, versions))

    if newest() <= (2, 28):
        pytest.skip("this system's C library is an old one")
    assert newest(*glibc_stubs.make_stubs(["cc"], "2.28", tmp_path / "stubs")) <= (2, 28)


@pytest.mark.parametrize("text", ["3.0", "new", "2.28.1", ""])
def test_a_glibc_that_is_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(f"fastattn: FASTATTN_GLIBC is '{text}'")):
        glibc_stubs.make_stubs(["cc"], text, tmp_path)


# ---- Trying a wheel -------------------------------------------------------------------------------------------------


def test_interpreters() -> None:
    found = trial.pythons()
    assert found[0] == sys.executable
    assert len(found) == len(set(found))


def test_a_wheel_that_does_not_install_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / NAME
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("nothing", "")
    command = [sys.executable, "scripts/test_wheel.py", str(wheel), "--torch", "setuptools", "--python", sys.executable]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "test-wheel: " in done.stderr
    assert shlex.join(["pip", "install"]) in done.stderr


def test_a_file_that_is_no_wheel() -> None:
    command = [sys.executable, "scripts/test_wheel.py", "README.md", "--torch", "torch==2.10.0"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "README.md is not a wheel of fastattn: make wheel builds one" in done.stderr
