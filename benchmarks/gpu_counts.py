"""What compiled kernels do, counted from their text: PTX and SASS for NVIDIA, assembly for AMD, LLVM's IR before them.

An access belongs to a thread where its address depends on the thread's number, else to the program: all threads then
read the same few words of a table. Lines are read in their order; that a register depends on the thread is carried from
operands to results.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

Widths = Counter[int]
"""How many instructions access so many bytes for a thread."""


class Accesses(NamedTuple):
    """Global loads and stores in a kernel."""

    thread_loads: Widths
    thread_stores: Widths
    program_loads: Widths
    program_stores: Widths

    def all(self) -> Counter[tuple[str, int]]:
        """By direction and width, whoever's they are."""
        found: Counter[tuple[str, int]] = Counter()
        for name, widths in self._asdict().items():
            for width, count in widths.items():
                found[name.partition("_")[2], width] += count
        return found


def _sorted(found: Iterable[tuple[str, int, bool]]) -> Accesses:
    accesses = Accesses(Counter(), Counter(), Counter(), Counter())
    for kind, width, of_thread in found:
        getattr(accesses, f"{'thread' if of_thread else 'program'}_{kind}")[width] += 1
    return accesses


# ---------------------------------------------------------------- NVIDIA

_PTX_OPERATION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:[.:]+\w+)*)\s+(.*?);")
_PTX_REGISTER = re.compile(r"%[a-z]+\w*(?:\.[xyz])?")
_PTX_TYPE = re.compile(r"\.(?:v(\d)\.)?[bsuf](\d+)$")


def _ptx_operations(ptx: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of every instruction its name, the registers that it writes and those that it reads."""
    for line in ptx.splitlines():
        found = _PTX_OPERATION.match(line)
        if found is None or found[1].startswith("ld.param"):
            continue
        name, operands = found[1], found[2]
        if name.startswith(("st.", "red.", "bra", "bar", "ret")):
            yield name, [], _PTX_REGISTER.findall(operands)
            continue
        first = re.match(r"\s*(\{[^}]*\}|[^,]*),?(.*)", operands)
        assert first is not None
        yield name, _PTX_REGISTER.findall(first[1]), _PTX_REGISTER.findall(first[2])


def ptx_accesses(ptx: str) -> Accesses:
    """Global loads and stores; atomic operations are not among them."""
    operations = list(_ptx_operations(ptx))
    of_thread = {"%tid.x", "%laneid"}
    before = 0
    while before != len(of_thread):  # loops carry it backwards
        before = len(of_thread)
        for _, writes, reads in operations:
            if not of_thread.isdisjoint(reads):
                of_thread.update(writes)

    def found() -> Iterator[tuple[str, int, bool]]:
        for name, writes, reads in operations:
            if not name.startswith(("ld.global", "st.global")):
                continue
            of_type = _PTX_TYPE.search(name)
            assert of_type is not None, name
            width = int(of_type[1] or 1) * int(of_type[2]) // 8
            # The address is the first operand of a store, and all that a load reads.
            address = reads if writes else reads[:1]
            yield ("loads" if writes else "stores"), width, not of_thread.isdisjoint(address)

    return _sorted(found())


def ptx_arithmetic(ptx: str) -> Counter[str]:
    """Instructions on floating-point numbers, by their full names."""
    names = Counter(name for name, _, _ in _ptx_operations(ptx))
    return Counter({name: count for name, count in names.items() if re.search(r"\.(?:f16|bf16|f32|f64)", name)})


def may_be_contracted(ptx: str) -> Counter[str]:
    """Sums and products that say no rounding: these an assembler may contract to a fused multiply-add."""
    named = re.compile(r"^(?:add|sub|mul)\.(?!r[nzmp]\b)")
    return Counter({name: count for name, count in ptx_arithmetic(ptx).items() if named.match(name)})


def flushing(ptx: str) -> Counter[str]:
    """Instructions that take subnormal numbers for zero."""
    return Counter({name: count for name, count in ptx_arithmetic(ptx).items() if ".ftz" in name})


def ptx_fused(ptx: str) -> int:
    """Fused multiply-adds; Blackwell has instructions of two."""
    fused = {name: count for name, count in ptx_arithmetic(ptx).items() if name.startswith(("fma.", "mad."))}
    return sum(count * (2 if name.endswith("x2") else 1) for name, count in fused.items())


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def sass_operations(sass: str) -> Counter[str]:
    """Instructions by their full names."""
    return Counter(_SASS.findall(sass))


def sass_accesses(sass: str) -> Counter[tuple[str, int]]:
    """Global loads and stores by direction and width."""
    found: Counter[tuple[str, int]] = Counter()
    for name, count in sass_operations(sass).items():
        operation, *marks = name.split(".")
        if operation in ("LDG", "STG"):
            width = next((_SASS_WIDTHS[mark] for mark in marks if mark in _SASS_WIDTHS), 4)
            found["loads" if operation == "LDG" else "stores", width] += count
    return found


def sass_local(sass: str) -> int:
    """Accesses of local memory, where registers are spilled to."""
    return sum(count for name, count in sass_operations(sass).items() if name.startswith(("LDL", "STL")))


def machine_code(binary: bytes) -> list[bytes]:
    """The executable sections of a file in ELF's 64-bit format, without what it tells of how it was made."""
    first, size, number = *struct.unpack_from("<Q", binary, 0x28), *struct.unpack_from("<HH", binary, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", binary, first + size * index) for index in range(number)]
    executable = 4
    return [binary[start : start + length] for _, _, flags, _, start, length in headers if flags & executable]


def resources(told: str) -> dict[str, int]:
    """What ``cuobjdump --dump-resource-usage`` says of the one kernel in a file."""
    lines = [line for line in told.splitlines() if "REG:" in line]
    assert len(lines) == 1, told
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", lines[0])}


# ---------------------------------------------------------------- AMD

_AMD = re.compile(r"^\s+([a-z]\w+)\s+(.*?)(?:;.*)?$", re.MULTILINE)
_AMD_REGISTER = re.compile(r"\b([avs])(?:(\d+)\b|\[(\d+):(\d+)\])")
_AMD_ACCESS = re.compile(r"^(?:global|buffer|flat)_(load|store)_(\w+)$")
_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2}
_AMD_WIDTHS |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _registers(operand: str) -> list[str]:
    found = []
    for kind, one, first, last in _AMD_REGISTER.findall(operand):
        found += [f"{kind}{n}" for n in range(int(one or first), int(one or last) + 1)]
    return found


def _amd_width(of: str) -> int:
    plain = re.sub(r"_d16(_hi)?$", "", of)
    return _AMD_WIDTHS[plain]


def amd_accesses(assembly: str) -> Accesses:
    """Global loads and stores; atomic operations are not among them, nor loads of the scalar unit."""

    def found() -> Iterator[tuple[str, int, bool]]:
        of_thread = {"v0"}  # on entry
        for name, text in _AMD.findall(assembly):
            operands = [_registers(operand) for operand in text.split(",")]
            access = _AMD_ACCESS.match(name)
            if access is not None:
                # A store through a plain address has that first, all others their data.
                address = operands[0 if access[1] == "store" and not name.startswith("buffer") else 1]
                yield access[1] + "s", _amd_width(access[2]), not of_thread.isdisjoint(address)
            if "_store_" in name or name.startswith(("ds_write", "s_cmp", "s_bitcmp")):
                continue
            written, *read = operands
            if name.startswith(("v_fmac", "v_mac")):
                read.append(written)
            depends = name.startswith(("v_mbcnt", "ds_")) or any(not of_thread.isdisjoint(r) for r in read)
            if name.startswith("v_readfirstlane"):  # one number for all threads of a wave
                depends = False
            (of_thread.update if depends else of_thread.difference_update)(written)

    return _sorted(found())


def amd_arithmetic(assembly: str) -> Counter[str]:
    """Vector instructions on floating-point numbers by their names without encodings."""
    names = Counter(re.sub(r"_(?:e32|e64|sdwa|dpp)$", "", name) for name, _ in _AMD.findall(assembly))
    return Counter({name: count for name, count in names.items() if re.match(r"v_.*f(?:16|32|64)", name)})


_FUSED_PARTS = {"v_div_fixup_f32": 5, "v_sqrt_f32": 2, "v_div_fixup_f64": 5, "v_rsq_f64": 7}


def amd_fused(assembly: str) -> int:
    """Fused multiply-adds beyond those that divisions and square roots are made of.

    A float32 division takes five beside its last, ``v_div_fmas``, and a root two; of float64 they take five and seven
    (LLVM's expansions for IEEE 754 results: AMDGPULegalizerInfo.cpp, legalizeFDIV32, 64 and legalizeFSQRTF32, F64).
    Those with a constant of 2^32 are of a division of 64-bit integers.
    """
    fused = 0
    for name, operands in _AMD.findall(assembly):
        found = re.match(r"v_(pk_)?(?:fma(?!_legacy)|mad_f|mac_f)\w*", name)
        if found is not None and not re.search(r"\b0x[4c]f800000\b", operands):
            fused += 2 if found[1] else 1
    names = amd_arithmetic(assembly)
    return fused - sum(names[name] * parts for name, parts in _FUSED_PARTS.items())


def amd_flushing(assembly: str) -> Counter[str]:
    """Modes of the kernel in which subnormal numbers are taken for zero; 3 keeps them."""
    modes = re.findall(r"^\s+\.(amdhsa_float_denorm_mode_\w+) (\d)$", assembly, re.MULTILINE)
    assert len(modes) == 2, modes
    return Counter(name for name, mode in modes if mode != "3")


def amd_metadata(assembly: str) -> dict[str, int]:
    """Registers, spills and scratch memory, as the runtime reads them."""
    names = ("vgpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    found = {name: re.findall(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE) for name in names}
    assert all(len(numbers) == 1 for numbers in found.values()), found
    return {name: int(numbers[0]) for name, numbers in found.items()}


# ---------------------------------------------------------------- before

_TENSOR = re.compile(r"tensor<((?:\d+x)+)f(?:32|64)")


def explicit_fused(ttgir: str, threads: int) -> int:
    """Fused multiply-adds that the source asks for, a thread's."""
    total = 0
    for line in ttgir.splitlines():
        if " math.fma " in line:
            shape = _TENSOR.search(line)
            elements = 1
            for number in shape[1].split("x")[:-1] if shape else ():
                elements *= int(number)
            total += max(1, elements // threads)
    return total


def llvm_contractible(llir: str) -> int:
    """Sums and products that LLVM may contract to a fused multiply-add, by their flags or by what they are called."""
    flagged = re.findall(r"= f(?:add|sub|mul) [^\n]*?\b(?:contract|fast)\b", llir)
    return len(flagged) + len(re.findall(r"call [^\n]*@llvm\.fmuladd\.", llir))
