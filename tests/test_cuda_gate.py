"""The compile gate of the CUDA kernels: what it reads out of logs and listings, and what it lets pass."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_gate  # noqa: E402
from cuda_gate import ARCHS, Constants, Entry, Kernel, Table, Usage  # noqa: E402
from cuda_listing import parse_listing  # noqa: E402

COMBINE = "_ZN8fastattn4cuda12kernel_entryINS0_13CombineKernelILNS_5DTypeE1EEEEEvNT_6ParamsE"
FORWARD = (
    "_ZN8fastattn4cuda12kernel_entryINS0_13ForwardKernelILNS_5DTypeE1ELi64ELi128ELi128ELi4ELb0ELb1EEEEEvNT_6ParamsE"
)

# As nvcc 13.0 prints it, architectures in no order.
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{COMBINE}' for 'sm_120'
ptxas info    : Function properties for {COMBINE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 44 registers, used 0 barriers
ptxas info    : Compile time = 57.032 ms
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_120'
ptxas info    : Function properties for {FORWARD}
    48 bytes stack frame, 68 bytes spill stores, 72 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compile time = 432.229 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{COMBINE}' for 'sm_80'
ptxas info    : Function properties for {COMBINE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 840 bytes cmem[0]
"""


def test_log() -> None:
    log = cuda_gate.parse_log(LOG)
    assert log.usages == {
        (COMBINE, 120): Usage(44),
        (FORWARD, 120): Usage(255, stack=48, spill_stores=68, spill_loads=72, static_shared=16),
        (COMBINE, 80): Usage(38),
    }
    assert log.warnings == []
    assert log.spilling_functions == []


def test_log_of_a_kernel_that_two_files_have() -> None:
    twice = LOG + LOG.replace("Used 44", "Used 40").replace("Used 38", "Used 39")
    usages = cuda_gate.parse_log(twice).usages
    assert usages[COMBINE, 120].registers == 44
    assert usages[COMBINE, 80].registers == 39


def test_log_with_warnings_and_with_a_function_that_is_called() -> None:
    called = """\
ptxas info    : Function properties for some_function
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
"""
    head, tail = LOG.split("ptxas info    : Used 255", 1)
    warnings = [
        'csrc/cuda/forward.cuh(7): warning #177-D: variable "x" was declared but never referenced',
        "ptxas warning : Value of threads per SM for entry function f is out of range. .minnctapersm will be ignored",
    ]
    log = cuda_gate.parse_log(head + called + "ptxas info    : Used 255" + tail + "\n".join(warnings))
    assert log.usages[FORWARD, 120].spill_stores == 68  # its own, not those of the function that it calls
    assert log.spilling_functions == ["some_function"]
    assert log.warnings == warnings
    faults = cuda_gate.find_faults(log, Table("13.0", {}))
    assert [fault.split(",")[0] for fault in faults] == [*(f"warning: {w}" for w in warnings), "some_function"]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt (binutils) is not installed")
def test_names() -> None:
    types = {name: cuda_gate.kernel_type(text) for name, text in cuda_gate.demangle([COMBINE, FORWARD]).items()}
    assert types == {
        COMBINE: "fastattn::cuda::CombineKernel<(fastattn::DType)1>",
        FORWARD: "fastattn::cuda::ForwardKernel<(fastattn::DType)1, 64, 128, 128, 4, false, true>",
    }
    headers = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]
    parameters = cuda_gate.template_parameters(headers)
    assert parameters["CombineKernel"] == [("DType", "kType", None)]
    forward = Constants("attention_forward", 128, 2, 49152, 128, 64)
    assert cuda_gate.describe(types[FORWARD], forward, parameters) == "attention_forward bf16 D64 128x64 plain"
    combine = Constants("attention_combine", 128, 1, 0)
    assert cuda_gate.describe(types[COMBINE], combine, parameters) == "attention_combine bf16"
    with pytest.raises(cuda_gate.Trouble, match="no kernel_entry"):
        cuda_gate.kernel_type("some_kernel(int)")


def test_names_of_variants() -> None:
    header = """
template <DType kType_, int kDim, bool kModified, bool kWantsDk, bool kSwizzled_ = true, bool kIsTransposed = false>
struct SomeKernel {
struct PlainKernel {
struct DerivedKernel : Base<true> {
"""
    parameters = cuda_gate.template_parameters([header])
    constants = Constants("some", 128, 1, 0)

    def describe(arguments: str) -> str:
        return cuda_gate.describe(f"f::SomeKernel<{arguments}>", constants, parameters)

    assert describe("(f::DType)2, 32, true, true, true, false") == "some fp16 D32 modified"
    assert describe("(f::DType)0, 32, false, true, false, true") == "some fp32 D32 plain not swizzled istransposed"
    assert cuda_gate.describe("f::PlainKernel", constants, parameters) == "some"
    assert {"SomeKernel", "PlainKernel", "DerivedKernel"} == set(parameters)


def on_all(*usages: Usage) -> tuple[Usage, ...]:
    """The last one stands for all further architectures."""
    return usages + usages[-1:] * (len(ARCHS) - len(usages))


def entry(*registers: int, **more: Any) -> Entry:
    return Entry(128, 2, 49152, on_all(*(Usage(count, **more) for count in registers)))


BUILT = Table("13.0", {"forward bf16 D64": entry(168, 168, 160), "forward bf16 D128": entry(255)})


def test_table_survives_writing() -> None:
    entries = {**BUILT.entries, "odd": Entry(64, 1, 0, on_all(Usage(40), Usage(40, 16), Usage(255, 8, 4, 12)))}
    text = cuda_gate.format_table(Table("13.0", entries))
    assert cuda_gate.parse_table(text) == Table("13.0", entries)
    labels = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert labels == ["kernel", "---", "forward bf16 D64", "forward bf16 D128", "odd"]  # 64 before 128
    assert "| 255 +8 stack +4/12 spilt |" in text
    with pytest.raises(cuda_gate.Trouble, match="no entry"):
        cuda_gate.parse_table(text.replace("| 168 | 168 |", "| 168 | 1 6 8 |"))
    with pytest.raises(cuda_gate.Trouble, match=f"4 cells, not {4 + len(ARCHS)}"):
        cuda_gate.parse_table(text + "| a | 1 | 2 | 3 |\n")
    with pytest.raises(cuda_gate.Trouble, match="of which CUDA"):
        cuda_gate.parse_table("")


def compare(changed: dict[str, Entry], toolkit: str = "13.0") -> cuda_gate.Findings:
    return cuda_gate.compare(Table(toolkit, {**BUILT.entries, **changed}), BUILT)


def test_what_is_as_it_was_passes() -> None:
    assert compare({}) == cuda_gate.Findings()


def test_growth_fails() -> None:
    findings = compare({"forward bf16 D64": entry(168, 169, 160)})
    assert findings.failures == ["forward bf16 D64 takes 169 registers on sm_90, 168 before"]
    findings = compare({"forward bf16 D128": entry(255, stack=8)})
    assert len(findings.failures) == len(ARCHS)
    assert findings.failures[0] == "forward bf16 D128 takes 8 bytes of stack on sm_80, 0 before"
    findings = compare({"forward bf16 D64": dataclasses.replace(entry(168, 168, 160), shared=65536)})
    assert len(findings.failures) == 1
    assert "65536 bytes of shared memory; the table says 128, 2 and 49152" in findings.failures[0]


def test_less_is_remarked_upon() -> None:
    findings = compare({"forward bf16 D64": entry(168, 128, 160)})
    assert findings.failures == []
    assert findings.remarks == ["forward bf16 D64 takes less on sm_90: 128, before 168; --update records it"]


def test_kernels_come_and_go_by_the_table_alone() -> None:
    assert compare({"backward": entry(255)}).failures == ["backward is not in the table"]
    smaller = Table("13.0", {"forward bf16 D64": BUILT.entries["forward bf16 D64"]})
    failures = cuda_gate.compare(smaller, BUILT).failures
    assert failures == ["forward bf16 D128 is in the table, but was not built"]


def test_another_ptxas_may_take_more_registers() -> None:
    findings = compare({"forward bf16 D64": entry(200, 168, 160)}, toolkit="13.1")
    assert findings.failures == []
    assert findings.remarks == [
        "the table is of CUDA 13.0, the build of 13.1: growth does not fail",
        "forward bf16 D64 takes 200 registers on sm_80, 168 before",
    ]
    assert compare({"forward bf16 D64": entry(168, 168, 160, stack=8)}, toolkit="13.1").failures


def test_no_table_excuses_a_spill() -> None:
    spilling = Table("13.0", {"a": Entry(128, 2, 0, on_all(Usage(255, 16, 4, 8), Usage(255)))})
    faults = cuda_gate.find_faults(cuda_gate.Log(), spilling)
    assert faults == ["a spills on sm_80: 4 bytes of stores, 8 bytes of loads"]


def test_a_kernel_is_there_for_every_architecture() -> None:
    kernels = {COMBINE: Kernel("attention_combine bf16", Constants("attention_combine", 128, 1, 0))}
    log = cuda_gate.parse_log(LOG)
    others = [arch for arch in ARCHS if arch not in (80, 120)]
    names = ", ".join(f"sm_{arch}" for arch in others)
    with pytest.raises(cuda_gate.Trouble, match=f"not compiled for {names}: build without FASTATTN_CUDA_ARCHS"):
        cuda_gate.make_table(log, kernels, "13.0")
    usages = {80: Usage(38), **dict.fromkeys(others, Usage(40, static_shared=512)), 120: Usage(44)}
    log.usages |= {(COMBINE, arch): usages[arch] for arch in others}
    table = cuda_gate.make_table(log, kernels, "13.0")
    assert table.entries == {"attention_combine bf16": Entry(128, 1, 512, tuple(usages[arch] for arch in ARCHS))}


def test_a_build_for_fewer_architectures_is_held_to_those(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Table("13.0", {"a": Entry(128, 1, 0, (Usage(50), Usage(61)))}, archs=(80, 120))
    kept = Table("13.0", {"a": Entry(128, 1, 0, tuple(Usage(60 if arch == 120 else 50) for arch in ARCHS))})
    assert cuda_gate.compare(few, kept).failures == ["a takes 61 registers on sm_120, 60 before"]
    log = cuda_gate.parse_log(LOG)
    kernels = {COMBINE: Kernel("attention_combine bf16", Constants("attention_combine", 128, 1, 0))}
    table = cuda_gate.make_table(log, kernels, "13.0", (80, 120))
    assert table.entries["attention_combine bf16"].usages == (Usage(38), Usage(44))
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", "80;120")
    assert cuda_gate.chosen_architectures() == (80, 120)
    monkeypatch.delenv("FASTATTN_CUDA_ARCHS")
    assert cuda_gate.chosen_architectures() == ARCHS
    monkeypatch.setenv("FASTATTN_CUDA_ARCHS", "80;86")
    with pytest.raises(cuda_gate.Trouble, match="FASTATTN_CUDA_ARCHS asks for sm_86"):
        cuda_gate.chosen_architectures()


def test_build_time(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).touch()
    lines = ["# ninja log v7", f"0\t4000\t1\t{tmp_path}/a\tf00", f"0\t1500\t1\t{tmp_path}/b\tf00"]
    lines += [f"1500\t4500\t1\t{tmp_path}/c\tf00", f"0\t9000\t1\t{tmp_path}/gone\tf00"]
    lines += [f"10000\t12000\t1\t{tmp_path}/a\tf00"]  # made again: the last time counts
    seconds = cuda_gate.read_ninja_log("\n".join(lines))
    assert {Path(name).name: value for name, value in seconds.items()} == {"a": 2, "b": 1.5, "c": 3}
    assert cuda_gate.build_seconds(seconds.values(), 1) == 6.5
    assert cuda_gate.build_seconds(seconds.values(), 2) == 4.5  # a on one; b, then c on the other
    assert cuda_gate.build_seconds([], 2) == 0


def test_compressed_size(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(bytes(5_000_000))
    assert cuda_gate.compressed_bytes(path) < 10_000


LISTING = f"""\
	code for sm_90
		Function : {FORWARD}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;  /* 0x0 */
        /*0020*/                   LDSM.16.M88.4 R4, [R5] ;                   /* 0x0 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;      /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;      /* 0x0 */
		Function : {COMBINE}
        /*0000*/             @!UP1 LDL.LU R3, [R1+0x4] ;                      /* 0x0 */
        /*0010*/                   STL [R1], R3 ;                             /* 0x0 */
"""


def test_machine_code() -> None:
    listings = parse_listing(LISTING.splitlines())
    counts = {name: listing.counts for name, listing in listings.items()}
    assert counts == {FORWARD: {"LDGSTS": 1, "LDSM": 1, "HMMA": 2}, COMBINE: {"LDL": 1, "STL": 1}}
    kernels = {
        FORWARD: Kernel("forward", Constants("attention_forward", 128, 2, 49152, 128, 64)),
        COMBINE: Kernel("combine", Constants("attention_combine", 128, 1, 0)),
        "absent": Kernel("absent", Constants("absent", 128, 1, 0)),
    }
    table = Table("13.0", {})
    assert cuda_gate.find_listing_faults(listings, kernels, table, 90) == [
        "absent has no machine code for sm_90",
        "combine has 1 loads from local memory (LDL) on sm_90",
        "combine has 1 stores to local memory (STL) on sm_90",
    ]
    del listings[FORWARD].counts["LDSM"], kernels["absent"]
    table.entries["combine"] = Entry(128, 1, 0, on_all(Usage(38), Usage(40, stack=8)))
    assert cuda_gate.find_listing_faults(listings, kernels, table, 90) == [
        "forward has no matrix loads (LDSM) on sm_90"
    ]


def test_machine_code_of_whole_warps() -> None:
    """Not under a predicate of a lane's own, and not between a lane's own jump and the place where all meet again."""
    lines = """\
        /*0010*/                   SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
        /*0020*/             @!UP0 BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/              @!P0 LDSM.16.M88.4 R4, [R5] ;
        /*0040*/               @PT HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0050*/                   BSSY.RECONVERGENT B0, 0x100 ;
        /*0054*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0058*/              @UP1 BRA 0xf0 ;
        /*005c*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P1 BRA 0xf0 ;
        /*0070*/                   BSSY B1, 0x90 ;
        /*0080*/                   BSYNC B1 ;
        /*0090*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*00a0*/               @P2 SHFL.BFLY PT, R4, R4, 0x1, 0x1f ;
        /*00f0*/                   BSYNC B0 ;
        /*0100*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
"""
    listings = parse_listing([f"Function : {COMBINE}", *lines.splitlines()])
    assert listings[COMBINE].predicated == Counter(LDSM=1, SHFL=1)
    assert listings[COMBINE].parted == Counter(HMMA=1, SHFL=1)
    kernels = {COMBINE: Kernel("combine", Constants("attention_combine", 128, 1, 0))}
    assert cuda_gate.find_listing_faults(listings, kernels, Table("13.0", {}), 80) == [
        "combine has 1 HMMA where lanes have parted on sm_80",
        "combine has 1 LDSM under a predicate on sm_80",
        "combine has 1 SHFL under a predicate on sm_80",
        "combine has 1 SHFL where lanes have parted on sm_80",
    ]
    # What one function ends in says nothing of the next.
    after = ["Function : next", "        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;"]
    cut = [f"Function : {COMBINE}", *lines.splitlines()[:9], *after]
    assert not parse_listing(cut)["next"].parted.total()


def test_without_nvcc_it_says_that_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise cuda_gate.cuda_build.Missing("nvcc was not found")

    monkeypatch.setattr(cuda_gate.cuda_build, "find_toolkit", missing)
    monkeypatch.setattr(sys, "argv", ["cuda_gate.py"])
    monkeypatch.delenv("FASTATTN_CUDA", raising=False)
    assert cuda_gate.main() == 0
    assert capsys.readouterr().out == "cuda-gate: skipped, the CUDA kernels are not built here: nvcc was not found\n"
    monkeypatch.setenv("FASTATTN_CUDA", "0")
    assert cuda_gate.main() == 0
    assert "FASTATTN_CUDA=0" in capsys.readouterr().out


def test_the_kept_table_is_as_the_gate_writes_it() -> None:
    text = cuda_gate.TABLE.read_text(encoding="utf-8")
    table = cuda_gate.parse_table(text)
    assert cuda_gate.format_table(table) == text
    assert not cuda_gate.find_faults(cuda_gate.Log(), table)
