"""The audit: reading machine code, judging a row, and comparing it with the committed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import assembly, audit, catalog_cases
from bench.cases import TARGETS, Case, cases, representative
from fastlayers.catalog import ROWS, Row
from fastlayers.kernels import softmax
from fastlayers.kernels.runtime import launch as _launch
from fastlayers.kernels.runtime import tiles as _tiles
from fastlayers.reporting import dry_run, gpus

# Products on sm_90 (by cuobjdump) and sm_100 (by nvdisasm), and a softmax, with most of the arithmetic left out.
HOPPER = """
		Function : _matmul_kernel
        /*1190*/                   ISETP.GE.AND P6, PT, R2, 0x1, PT ;       /* 0x000000010200780c */
                                                                            /* 0x000fda0003fc6270 */
        /*11a0*/               @P6 BRA 0x1af0 ;                             /* 0x0000000800506947 */
        /*1460*/                   WARPSYNC.ALL ;
        /*1470*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*1480*/                   LDGSTS.E.BYPASS.128 [R3+0x8000], desc[UR16][R8.64], !P1 ;
        /*1490*/                   LDGDEPBAR ;
        /*14a0*/                   IMAD.WIDE R8, R8, 0x2, R4 ;
        /*1ae0*/              @!P6 BRA 0x1460 ;                             /* 0xfffffff8005ce947 */
        /*1af0*/                   LDG.E.U16 R2, desc[UR16][R2.64] ;
        /*1b00*/                   STG.E.128 desc[UR16][R2.64], R4 ;
        /*1b10*/              @!P0 EXIT ;
        /*1b20*/                   EXIT ;
        /*1b30*/                   BRA 0x1b30;                              /* 0xfffffffc00fc7947 */
        /*1b40*/                   NOP;
"""
BLACKWELL = """
        /*1fc0*/                   UMOV UR4, 0x1 ;
.L_x_21:
        /*1fd0*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR16][R8.64] ;
        /*20d0*/                   BRA.U UP1, `(.L_x_19) ;
        /*2250*/                   UTCHMMA gdesc[UR14], gdesc[UR16], tmem[UR8], tmem[UR42], idesc[UR43], UPT ;
        /*2260*/                   UTCHMMA gdesc[UR30], gdesc[UR32], tmem[UR8], tmem[UR42], idesc[UR43], UPT ;
.L_x_18:
.L_x_19:
        /*22b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR13], R2 ;
        /*22c0*/              @!P6 BRA `(.L_x_20) ;
.L_x_29:
        /*22d0*/                   UIADD3 UR4, UPT, UPT, UR4, 0x1, URZ ;
        /*2750*/                   BRA.U !UP3, `(.L_x_21) ;
        /*2760*/                   STG.E.128 desc[UR16][R2.64], R4 ;
        /*39c0*/                   EXIT ;
.L_x_20:
        /*39d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P6, [UR13], R2 ;
        /*39e0*/              @!P6 BRA `(.L_x_20) ;
        /*39f0*/                   BRA `(.L_x_29) ;
.L_x_33:
        /*3a00*/                   BRA `(.L_x_33);
"""
# A persistent kernel: the loop over tiles holds the loop over steps.
NESTED = """
        /*0010*/                   UTMALDG.2D [UR4], [UR6] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   UTMASTG.2D [UR4], [UR6] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0070*/               @P1 BRA 0x10 ;
        /*0080*/                   EXIT ;
"""
MEMORY = """
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FADD R1, R1, R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*0070*/               @P0 BRA 0x40 ;
        /*0080*/                   STL [R1], R4 ;
        /*0090*/                   EXIT ;
"""
AMD = """
	s_branch .LBB0_0
	.p2align 8
.LBB0_0:
	s_load_dwordx4 s[0:3], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; %.lr.ph
	buffer_load_dwordx4 v[42:45], v41, s[28:31], 0 offen
	ds_read_b128 v[0:3], v4
	v_mfma_f32_32x32x8_bf16 v[0:15], v[76:77], v[60:61], v[0:15]
	s_waitcnt lgkmcnt(0)
	s_cbranch_scc1 .LBB0_2
	s_branch .LBB0_4
.LBB0_3:
	v_mov_b32_e32 v0, 0
.LBB0_4:                                ; %._crit_edge
	v_mfma_f32_32x32x8_bf16 v[0:15], v[36:37], v[38:39], v[0:15]
	global_store_short v[0:1], v2, off
	s_endpgm
	.section	.rodata
	v_not_an_instruction_of_the_kernel
"""


def test_main_loop_of_a_pipelined_product() -> None:
    code = assembly.sass(HOPPER)
    assert assembly.main_loop(code) == {"async copy": 1, "control": 1, "integer": 1, "matrix": 1, "sync": 2}
    assert assembly.matrix(code) == {"HGMMA.64x256x16.F32.BF16": 1}
    assert assembly.widths(code, "async copy") == {"128": 1}
    assert assembly.widths(code, "global load") == {"16": 1}
    assert assembly.widths(code, "global store") == {"128": 1}


def test_a_wait_behind_the_end_is_no_loop_around_half_of_the_kernel() -> None:
    """It jumps back, too, but into the middle of the loop that it belongs to."""
    code = assembly.sass(BLACKWELL)
    names = [instruction.name for instruction in code]
    inside = [{names[i] for i in body} for body in assembly.loops(code) if len(body) > 2]
    assert len(inside) == 1
    assert "STG.E.128" not in inside[0]
    loop = assembly.main_loop(code)
    assert loop["matrix"] == 2
    # Its own eight instructions and the three of the wait.
    assert sum(loop.values()) == 11


def test_main_loop_is_the_innermost_one() -> None:
    code = assembly.sass(NESTED)
    assert assembly.main_loop(code) == {"control": 1, "float": 1, "matrix": 1}
    assert [assembly.kind(instruction.name) for instruction in code].count("tma") == 2


def test_without_matrix_instructions_the_longest_loop_counts() -> None:
    code = assembly.sass(MEMORY)
    assert assembly.main_loop(code) == {"control": 1, "global load": 1, "global store": 1, "special": 1}
    assert assembly.widths(code, "global store") == {"16": 1}
    assert [assembly.kind(instruction.name) for instruction in code].count("local") == 1


def test_of_several_products_the_first_counts() -> None:
    """A second one is for the rare case. Where the products are in no loop, the longest loop counts as ever."""
    loop = "/*{0:04x}*/ {1} ; /*{2:04x}*/ FADD R1, R1, R1 ; {3}/*{4:04x}*/ @P0 BRA 0x{0:x} ; "
    first, longer = "HMMA.16816.F32 R4, R4, R8, R4", "/*0080*/ FADD R1, R1, R1 ; "
    products = loop.format(0x10, first, 0x20, "", 0x30) + loop.format(0x60, first, 0x70, longer, 0x90)
    assert assembly.main_loop(assembly.sass(products)) == {"control": 1, "float": 1, "matrix": 1}
    add = "FADD R2, R2, R2"
    none = f"/*0000*/ {first} ; " + loop.format(0x10, add, 0x20, "", 0x30) + loop.format(0x60, add, 0x70, longer, 0x90)
    assert assembly.main_loop(assembly.sass(none)) == {"control": 1, "float": 3}


def test_no_loop() -> None:
    assert assembly.main_loop(assembly.sass("/*0010*/ FADD R1, R1, R1 ; /*0020*/ EXIT ; /*0030*/ BRA 0x30;")) == {}
    assert assembly.main_loop([]) == {}


def test_amd() -> None:
    code = assembly.amdgcn(AMD)
    assert code[-1].name == "s_endpgm"
    loop = assembly.main_loop(code)
    assert loop == {"control": 1, "global load": 1, "matrix": 1, "shared": 1, "sync": 1}
    assert assembly.matrix(code) == {"v_mfma_f32_32x32x8_bf16": 2}
    assert assembly.widths(code, "global load") == {"128": 1}
    assert assembly.widths(code, "global store") == {"16": 1}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32), ("LDG.E.64", 64), ("LDG.E.EL.128", 128), ("LDG.E.U16", 16), ("LDG.E.S8", 8),
        ("LDG.E.CONSTANT", 32), ("LDGSTS.E.BYPASS.LTC128B.128", 128), ("STG.E.U8", 8),
        ("buffer_load_dwordx4", 128), ("global_load_dwordx2", 64), ("global_load_dword", 32), ("buffer_load_ushort", 16),
        ("global_load_short_d16", 16), ("global_store_byte", 8), ("global_load_lds_dwordx4", 128),
    ],
)  # fmt: skip
def test_width(name: str, bits: int) -> None:
    assert assembly.width(name) == bits


# The weight gradient with bias gradient in TF32: threads load %a, which the product under way reads.
TWICE = """
  tt.func public @kernel() {
    %0 = scf.for %i = %c0 to %K step %c32 iter_args(%arg = %cst) -> (tensor<128x64xf32, #mma>) : i32 {
      %a = ttg.memdesc_index %ring[%i] : !ttg.memdesc<2x128x32xf32> -> !ttg.memdesc<128x32xf32>
      %sum = ttg.local_load %a token %t : !ttg.memdesc<128x32xf32> -> tensor<128x32xf32, #blocked1>
      %acc = ttng.warp_group_dot %a, %b, %arg {inputPrecision = 0 : i32, isAsync = true} : !ttg.memdesc<128x32xf32>
      scf.yield %acc : tensor<128x64xf32, #mma>
    }
    %1 = scf.for %i = %c0 to %K step %c32 iter_args(%arg = %cst) -> (tensor<128x64xf32, #mma>) : i32 {
      %acc = ttng.warp_group_dot %a, %b, %arg {inputPrecision = 0 : i32, isAsync = true} : !ttg.memdesc<128x32xf32>
      scf.yield %acc : tensor<128x64xf32, #mma>
    }
    %2 = ttg.local_load %a : !ttg.memdesc<128x32xf32> -> tensor<128x32xf32, #blocked1>
  }
"""


def test_operands_that_threads_read_too() -> None:
    assert assembly.operands_read_twice(TWICE) == ["%a"]
    assert assembly.operands_read_twice(TWICE.replace("%sum = ttg.local_load %a", "%sum = ttg.local_load %c")) == []
    assert assembly.operands_read_twice(TWICE.replace("isAsync = true", "isAsync = false")) == []


ROW: dict[str, Any] = {
    "kernel": "matmul", "target": "sm_90", "registers": 170, "spills": 0, "stack": 0, "shared": 147456,
    "matrix": {"HGMMA.64x256x16.F32.BF16": 8}, "tma": 0, "async": {"128": 24}, "loads": {"32": 8}, "stores": {"128": 16},
    "loop": {"matrix": 4, "integer": 96},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 3}, "spills 3, was 0"),
        ({"stack": 16}, "stack 16, was 0"),
        ({"matrix": {"HMMA.16816.F32.BF16": 32}}, "lost HGMMA"),
        ({"matrix": {}}, "lost HGMMA"),
        ({"async": {}}, "lost its asynchronous copies"),
        ({"async": {"32": 96}}, "async of 32 bits, were 128"),
        ({"loads": {"16": 2, "32": 8}}, "loads of 16 bits, were 32"),
        ({"stores": {"64": 32}}, "stores of 64 bits, were 128"),
        ({"loop": {"matrix": 4, "integer": 107}}, "main loop of 111 instructions, was 100: more {'integer': 11}"),
    ],
)
def test_what_is_worse_than_committed(change: dict[str, Any], message: str) -> None:
    (found,) = audit.compare({**ROW, **change}, ROW)
    assert message in found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 255, "shared": 0},
        {"matrix": {"HGMMA.64x128x16.F32.BF16": 16}},
        {"async": {}, "tma": 3},
        {"loads": {}},
        {"loop": {"matrix": 4, "integer": 106}},
        {"loop": {"matrix": 4}},
    ],
)
def test_what_is_not_worse(change: dict[str, Any]) -> None:
    assert audit.compare({**ROW, **change}, ROW) == []


def test_losing_tma_and_amds_matrix_instructions() -> None:
    assert "TMA" in audit.compare(ROW, {**ROW, "tma": 4})[0]
    amd = {**ROW, "target": "gfx942", "matrix": {"v_mfma_f32_32x32x8_bf16": 8}}
    assert audit.compare({**amd, "matrix": {"v_mfma_f32_16x16x16_bf16": 8}}, amd) == []
    assert "matrix instructions" in audit.compare({**amd, "matrix": {}}, amd)[0]


def test_baseline_is_one_row_a_line_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    other = {**ROW, "target": "sm_80", "seconds": 1.5, "least ms": {"A100": 1.0}}
    audit.write_baseline([ROW, other, {"kernel": "broken", "target": "sm_80", "error": "does not compile"}], path)
    version, rows = audit.read_baseline(path)
    assert version == audit.triton.__version__
    assert rows == {("matmul", "sm_90"): ROW, ("matmul", "sm_80"): {key: other[key] for key in ROW}}
    assert len(path.read_text().splitlines()) == 4
    assert audit.read_baseline(tmp_path / "none.json") == (None, {})


def test_committed_baseline() -> None:
    """It has rows for every target, none of which spills, and every one a place in memory it fits into."""
    _, rows = audit.read_baseline()
    assert {target for _, target in rows} == set(TARGETS)
    for (_, target), row in rows.items():
        assert row["spills"] == 0
        assert row["shared"] <= audit.SHARED_MEMORY[target]
    large = next(row for (name, target), row in rows.items() if "matmul forward 16/large" in name and target == "sm_90")
    assert any(name.startswith("HGMMA.64x256x16") for name in large["matrix"])


EACH_TARGET = [
    pytest.param(target, marks=[] if target in ("sm_90", "gfx942") else pytest.mark.slow) for target in TARGETS
]


@pytest.mark.parametrize("target", EACH_TARGET)
def test_cases_have_names_of_their_own_and_rooflines(target: str) -> None:
    labels = [case.label for case in cases(target)]
    assert len(set(labels)) == len(labels)
    for case in cases(target):
        if case.wide:
            continue  # the same call as the narrow case's
        assert case.work.bytes > 0
        if case.cost is None:
            assert (case.work.flops > 0) == case.name.startswith(("matmul", "conv", "box", "depthwise"))


def test_work_of_a_product() -> None:
    product = next(case for case in cases("sm_90") if case.name.startswith("matmul forward 16/large"))
    assert product.work.flops == 2 * 8192 * 4096 * 4096
    assert product.work.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096 + 4096)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_of_the_catalogs_layers_is_compiled(target: str) -> None:
    """With every epilogue that they ask for, whichever family they are of."""
    device = _tiles.Device(target, 132)
    of_dtype = [case for case in cases(target) if case.dtype == torch.bfloat16 and not case.wide]
    compiled = {catalog_cases.compiled(case, device) for case in of_dtype}
    for row in ROWS:
        for speed in row.speeds.values():
            with dry_run.noting(device) as noted:
                catalog_cases._call(speed, torch.bfloat16, precision="ieee")
            assert {catalog_cases.kernel(launch) for launch in noted.launches} <= compiled, row.name


def few(row: Row) -> Row:
    """With the first of its speeds and cases alone."""
    return row._replace(**{kind: dict([*getattr(row, kind).items()][:2]) for kind in ("speeds", "cases")})


def test_a_family_needs_no_line_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing being launched by hand, every layer's kernels are found. A launch whose code an earlier one has is left out."""
    monkeypatch.setattr(catalog_cases.catalog, "ROWS", [few(row) for row in ROWS])
    found = catalog_cases.cases("sm_80", [])
    assert {case.name.split(" ")[0] for case in found} == {row.name for row in ROWS if row.speeds}
    assert len({case.label for case in found}) == len(found)
    linear = [case for case in found if case.name.startswith("Linear ") and case.dtype == torch.bfloat16]
    assert {"_matmul_kernel"} <= {case.kernel for case in linear} <= {"_matmul_kernel", "_sum_partials_kernel"}
    assert len({case.name for case in linear}) == len(linear)
    assert {case.arithmetic for case in found if case.dtype == torch.float32} == {"ieee", "tf32"}
    one = [case for case in found if case.name.startswith("Softmax") and case.name.endswith(", 32768 x 4096")]
    picked = [case for case in one if case.dtype == torch.bfloat16 and "answers" not in case.call.keywords]  # type: ignore[attr-defined]
    forward, backward = (case.work for case in picked)
    assert (forward.bytes, backward.bytes) == (2 * 2 * 2**27, 3 * 2 * 2**27)


def test_every_tile_of_a_table_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that no size in the catalog is given by the launcher, too, each once for a kernel and a dtype."""
    monkeypatch.setattr(catalog_cases.catalog, "ROWS", [row for row in ROWS if row.name == "Softmax"])
    found = [case for case in catalog_cases.cases("sm_80", []) if case.kernel == "_softmax_rows_kernel"]
    for dtype in (torch.bfloat16, torch.float32):
        names = [case.name for case in found if case.dtype == dtype]
        for n, tile in softmax._SOFTMAX_ROWS.items():
            expected = f"Softmax softmax rows {tile.m}x{n} w{tile.warps},"
            assert n < 64 or any(name.startswith(expected) for name in names), expected
    call: Any = next(case.call for case in found if "answers" in case.call.keywords)  # type: ignore[attr-defined]
    ((number, tile),) = call.keywords["answers"]
    with dry_run.noting(dry_run.ANY) as noted:
        call()
    launched = [launch.meta for launch in noted.launches if launch.kernel.__name__ == "_softmax_rows_kernel"]
    assert [(meta["TILE_M"], meta["TILE_N"]) for meta in launched] == [(tile.m, tile.n)]
    assert number == 0


def test_the_launch_that_a_case_means_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several of one kernel, the one with as many before it; wide ones are told so."""

    class Kernel:
        __name__ = "_kernel"

        def warmup(self, *args: Any, grid: Any, **meta: Any) -> tuple[Any, ...]:
            return *args, meta

    def call() -> None:
        for i in range(3):
            _launch.launch(Kernel(), 1, i, WIDE=False)

    monkeypatch.setattr(audit.driver, "set_active", lambda driver: None)
    for wide in (False, True):
        compiled: list[Any] = []
        case = Case("x", "_kernel", torch.float32, call, {}, before=1, wide=wide)
        with audit._compiling("sm_90", case, compiled):
            case.call()
        assert compiled == [(1, {"WIDE": wide}), 1]  # and its programs


@pytest.mark.parametrize("target", EACH_TARGET)
def test_representative_part(target: str) -> None:
    """Small enough, and with every kernel on every target that can launch it."""
    chosen = [case for case in cases(target) if representative(case, target)]
    assert {case.kernel for case in chosen} == {case.kernel for case in cases(target)}
    assert len(chosen) < len(cases(target))


def test_least_time() -> None:
    """8192^3 in 16 bits: arithmetic decides; a copy: memory."""
    h200 = gpus.GPUS["H200"]
    product = gpus.Work(2 * 8192**3, 3 * 8192**2 * 2)
    assert gpus.least_milliseconds(product, "16", h200) == pytest.approx(1.111, rel=1e-3)
    copy = gpus.Work(0, 4_800_000_000)
    assert gpus.least_milliseconds(copy, "16", h200) == pytest.approx(1.0)
    assert product.intensity == pytest.approx(8192 / 3)
    assert set(TARGETS) == {gpu.target for gpu in gpus.GPUS.values()}


def test_gpu_by_name() -> None:
    assert gpus.by_device_name("NVIDIA H200") == "H200"
    assert gpus.by_device_name("NVIDIA A100-SXM4-80GB") == "A100"
    assert gpus.by_device_name("AMD Instinct MI300X") == "MI300X"
    assert gpus.by_device_name("NVIDIA H100 PCIe") is None
    assert gpus.by_device_name("NVIDIA A100-SXM4-40GB") is None
    assert gpus.by_device_name("NVIDIA GeForce RTX 4090") is None


def test_flops_of_the_cases_agree_with_torchs_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    case = next(case for case in cases("sm_90") if case.name.startswith("conv forward ieee/small"))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        torch.nn.Conv2d(256, 256, 3, stride=2, padding=1)(torch.empty(32, 256, 56, 56))
    assert case.work.flops == counter.get_total_flops()


def test_a_name_that_no_kernel_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit._launch, "INTERPRETED", False)
    monkeypatch.setattr(audit, "cases", lambda target: [])
    with pytest.raises(SystemExit):
        audit.main(["--match", "nothing"])
    assert "'nothing' names 0 kernels" in capsys.readouterr().err
