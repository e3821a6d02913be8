"""The Triton kernels compiled for processors that are not there, and that what is counted in them can fail."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_counts as counts
from benchmarks.gpu_code import (
    LAYOUTS,
    RECORD,
    TARGETS,
    Counted,
    Kernel,
    available,
    count,
    count_controls,
    kernels,
    problems,
    traffic,
)

NEEDS_TRITON = pytest.mark.skipif(not available(), reason="Triton is not installed")
HALF: dict[str, Any] = {"param": "bfloat16", "grad": "bfloat16"}

SOME = [
    Kernel(),
    Kernel(**HALF),
    Kernel(param="float16", grad="float32", master="int8"),
    Kernel(**HALF, moments="32bit", master="float32"),
    Kernel(layout="ALIGNED", l2_decay=True),
    Kernel(layout="ANY", **HALF),
    Kernel(name=RECORD),
]
"""What is compiled for every processor."""
MORE = [
    *(Kernel(param=half, grad=half, master=kept) for half in ("bfloat16", "float16") for kept in ("float32", "int16")),
    Kernel(param="float16", grad="float16"),
    Kernel(param="float16", grad="float16", rounding="nearest"),
    Kernel(moments="32bit"),
    Kernel(param="float16", grad="float16", moments="32bit"),
    Kernel(**HALF, moments="32bit", master="int16"),
    Kernel(param="float16", grad="float16", moments="32bit", master="int8"),
    Kernel(**HALF, layout="ALIGNED", master="int8"),
    Kernel(layout="ANY", moments="32bit"),
    Kernel(layout="STRIDED"),
    Kernel(nonfinite="propagate", l2_decay=True),
    Kernel(wide=True),
    Kernel(**HALF, wide=True),
    Kernel(param="float16", grad="float32", master="int8", wide=True),
]
"""What is compiled for one."""


# ---------------------------------------------------------------- the kernels


@functools.cache
def compiled(target: str) -> dict[Kernel, Counted]:
    """All that is looked at, by one process."""
    chosen = SOME + (MORE if target == "sm_90" else [])
    return dict(zip(chosen, count(chosen, target), strict=True))


@NEEDS_TRITON
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_code_is_as_it_should_be(target: str) -> None:
    found = {kernel: problems(kernel, target, code) for kernel, code in compiled(target).items()}
    assert {kernel: said for kernel, said in found.items() if said} == {}


@NEEDS_TRITON
def test_bytes_of_an_element() -> None:
    # Parameter, gradient, two codes; what is kept beside the parameter; float32 moments.
    for kernel, read, written in (
        (Kernel(), 4 + 4 + 2, 4 + 2),
        (Kernel(**HALF), 2 + 2 + 2, 2 + 2),
        (Kernel(**HALF, moments="32bit", master="float32"), 2 + 2 + 4 + 8, 2 + 4 + 8),
    ):
        seen = traffic(kernel, compiled("sm_90")[kernel])
        assert (seen.read, seen.written) == (read, written)


@NEEDS_TRITON
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_layout_without_alignment_would_not_pass(target: str) -> None:
    code = compiled(target)[Kernel(**HALF, layout="ANY")]
    assert "accesses are not the widest" in problems(Kernel(**HALF), target, code)


@NEEDS_TRITON
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_contraction_is_seen(target: str) -> None:
    found = count_controls(target)
    said = {where: problems(Kernel(name=RECORD), target, code) for where, code in found.items()}
    each = 1024 // found["nowhere"].threads
    assert said.pop("nowhere") == []
    assert said.pop("in the compiler") == [f"{each} fused multiply-adds where the source has 0"]
    assert said == ({} if target == "gfx942" else {"in the assembler": ["sums and products that may be contracted"]})
    assert found["nowhere"].contraction_changes is (None if target == "gfx942" else False)
    if target != "gfx942":
        assert found["in the assembler"].contraction_changes is True
        assert found["in the assembler"].contractible == 2 * each


@NEEDS_TRITON
def test_a_kernel_that_cannot_be_compiled_is_reported() -> None:
    with pytest.raises(RuntimeError, match="the compiling process ended with 1"):
        count([Kernel(param="int64")], "sm_90")


# ---------------------------------------------------------------- the rules

GOOD = Counted(
    threads=128,
    registers=128,
    spilled=0,
    thread_loads=Counter({16: 10, 1: 2}),
    thread_stores=Counter({16: 6, 1: 2}),
    program_loads=Counter({8: 10}),
    program_stores=Counter(),
    in_the_binary=True,
    asked_to_fuse=16,
    fused=16,
    contractible=0,
    contractible_before=0,
    contraction_changes=False,
    flushing=Counter({"cvt.rmi.ftz.f32.f32": 16, "rcp.approx.ftz.f32": 1}),
    elements=2048,
    read=(4, 1, 1, 4),
    written=(4, 1, 1),
)


def test_good_code_passes() -> None:
    assert problems(Kernel(), "sm_90", GOOD) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spilled": 8}, "registers are spilled"),
        ({"registers": 169}, "169 registers, more than 168"),
        ({"fused": 17}, "17 fused multiply-adds where the source has 16"),
        ({"contractible": 1}, "sums and products that may be contracted"),
        ({"contractible_before": 1}, "sums and products that may be contracted"),
        ({"contraction_changes": True}, "sums and products that may be contracted"),
        ({"flushing": Counter({"mul.rn.ftz.f32": 1})}, "subnormal numbers are taken for zero"),
        ({"thread_loads": Counter({16: 11, 1: 2})}, "11 bytes of an element are read and 6 written, the least are 10"),
        ({"thread_stores": Counter({16: 5, 1: 2})}, "10 bytes of an element are read and 5 written"),
        ({"thread_loads": Counter({16: 9, 8: 2, 1: 2})}, "accesses of fewer than 128 bits"),
        ({"thread_loads": Counter({16: 10, 1: 3})}, "3 loads and 2 stores of metadata"),
        ({"in_the_binary": False}, "the binary has other loads and stores than the PTX"),
    ],
)
def test_bad_code_is_told(changes: dict[str, object], said: str) -> None:
    assert said in "; ".join(problems(Kernel(), "sm_90", dataclasses.replace(GOOD, **changes)))  # type: ignore[arg-type]


def test_kernels_are_of_all_kinds() -> None:
    listed = kernels()
    assert len(set(listed)) == len(listed)
    assert {kernel.layout for kernel in listed} == set(LAYOUTS)
    assert {(k.param, k.grad) for k in listed if k.layout == "WHOLE" and k.moments == "8bit"} == {
        (param, grad) for param in ("float32", "bfloat16", "float16") for grad in {param, "float32"}
    }


# ---------------------------------------------------------------- counting

PTX = """
	mov.u32 	%r9, %tid.x;
	shl.b32 	%r2, %r9, 4;
	cvt.u64.u32 	%rd2, %r2;
	ld.param.b64 	%rd1, [kernel_param_0];
	add.s64 	%rd3, %rd1, %rd2;
	@%p1 ld.global.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 0 ];
	ld.global.b64 { %rd4 }, [ %rd1 + 0 ];
	// add.f32 	%f1, %f2, %f3;
	mul.rn.f32 	%f1, %f2, %f3;
	add.f32 	%f4, %f1, %f3;
	fma.rn.f32 	%f5, %f1, %f3, %f4;
	fma.rn.f32x2 	%rd7, %rd8, %rd9, %rd10;
	mul.ftz.f32 	%f6, %f1, %f3;
	@%p2 st.global.b8 [ %rd1 + 0 ], { %rs1 };
	st.global.v2.b32 [ %rd3 + 8 ], { %r3, %r4 };
"""


def test_ptx() -> None:
    seen = counts.ptx_accesses(PTX)
    assert seen == ({16: 1}, {8: 1}, {8: 1}, {1: 1})
    assert counts.may_be_contracted(PTX) == {"add.f32": 1, "mul.ftz.f32": 1}
    assert counts.flushing(PTX) == {"mul.ftz.f32": 1}
    assert counts.ptx_fused(PTX) == 3


SASS = """
        /*0090*/                   LDG.E R8, desc[UR6][R8.64] ;
        /*0400*/              @!P5 LDG.E.128 R28, desc[UR6][R2.64+0x10] ;
        /*0be0*/              @!P5 LDG.E.U8 R86, desc[UR6][R36.64] ;
        /*57c0*/               @P4 STG.E.128 desc[UR6][R64.64], R48 ;
        /*57d0*/                   STL [R1], R48 ;
        /*57e0*/               @P4 LDL.LU R48, [R1] ;
"""


def test_sass() -> None:
    assert counts.sass_accesses(SASS) == {("loads", 4): 1, ("loads", 16): 1, ("loads", 1): 1, ("stores", 16): 1}
    assert counts.sass_local(SASS) == 2


AMD = """
	v_lshlrev_b32_e32 v4, 4, v0
	v_mov_b32_e32 v22, 0
	buffer_load_dwordx4 v[6:9], v4, s[8:11], 0 offen
	global_load_dwordx2 v[24:25], v22, s[22:23] offset:24
	v_mov_b32_e32 v4, 0
	global_load_ubyte v23, v4, s[2:3]
	v_pk_fma_f32 v[2:3], v[4:5], v[6:7], v[8:9]
	v_fma_f32 v2, v4, v6, v8
	v_fmamk_f32 v1, v3, 0x4f800000, v1
	v_fma_f32 v10, -v11, v12, 1.0
	v_fmac_f32_e32 v10, v11, v12
	v_fma_f32 v10, -v11, v12, 1.0
	v_fma_f32 v10, -v11, v12, 1.0
	v_fma_f32 v10, -v11, v12, 1.0
	v_div_fmas_f32 v10, v11, v12, v13
	v_div_fixup_f32 v10, v10, v12, v13
	v_mul_u32_u24_e32 v5, 3, v0
	global_store_byte v[5:6], v10, off
	.amdhsa_float_denorm_mode_32 0
	.amdhsa_float_denorm_mode_16_64 3
"""


def test_amd() -> None:
    seen = counts.amd_accesses(AMD)
    assert seen == ({16: 1}, {1: 1}, {8: 1, 1: 1}, {})
    assert counts.amd_fused(AMD) == 3
    assert counts.amd_flushing(AMD) == {"amdhsa_float_denorm_mode_32": 1}


def test_before_the_assembler() -> None:
    ttgir = """
      %1 = math.fma %a, %b, %c : tensor<16x128xf32, #blocked> loc(#loc1)
      %2 = math.fma %d, %e, %f : f32 loc(#loc1)
    """
    assert counts.explicit_fused(ttgir, 128) == 17
    assert counts.llvm_contractible("%1 = fmul contract float %a, %b\n%2 = fadd float %1, %c") == 1


# ---------------------------------------------------------------- the page


def test_results_are_of_good_code() -> None:
    page = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu_code.json"
    rows = json.loads(page.read_text())["kernels"]
    assert {row["processor"] for row in rows} == set(TARGETS)
    assert len(rows) == len(TARGETS) * len(kernels())
    assert [row for row in rows if row["problems"]] == []
