"""Which kernels a step launches, and what is counted in the code that they are compiled to, in a process of their own.

Compiling needs Triton and no GPU. A process in which Triton interprets its kernels (``TRITON_INTERPRET=1``) cannot
compile them, so another one does; it takes nothing from Triton's cache and leaves nothing there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_adam.kernels.triton import ALL_REGISTERS, MOST_REGISTERS
from lowmem_adam.layout import BLOCK_SIZE

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 900.0
"""Far above what compiling takes; it bounds a hang only."""

ADAM, RECORD = "adam_step_kernel", "record_kernel"

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Processors (A100, H100, B200, MI300) with Triton's names of them."""

LAYOUTS = ("WHOLE", "ALIGNED", "ANY", "STRIDED")
"""How elements lie in memory, by the kernel's names."""
WIDE = LAYOUTS[:2]
"""Those of which all accesses are as wide as they can be."""
SHAPES = {"WHOLE": (64, 512), "ALIGNED": (64, 144), "ANY": (64, 130), "STRIDED": (64, 512)}
"""Of parameters that are stepped so; a strided one is transposed."""


REGISTERS = {"cuda": MOST_REGISTERS, "hip": 128}
"""Most registers of a thread.

NVIDIA's multiprocessor has 65,536 and gives them out by eights, so with 168 six programs of two warps are there at
once, with 36 KB of bf16 elements on their way, or 60 KB of fp32. By Little's law an H100 (3.35 TB/s, 132
multiprocessors) needs 20 KB if memory takes 800 ns. AMD's SIMD has 512 for each of its lanes: with 128, four waves.
"""


class Kernel(NamedTuple):
    """What decides how a kernel is compiled, by torch's and the optimizers' names."""

    name: str = ADAM
    param: str = "float32"
    grad: str = "float32"
    master: str = "none"
    """What is kept beside the parameter: none, float32, int16 or int8."""
    moments: str = "8bit"
    layout: str = "WHOLE"
    rounding: str = "stochastic"
    nonfinite: str = "skip"
    l2_decay: bool = False
    wide: bool = False
    """Betas that let ratios exceed what codes reach."""


@dataclass(frozen=True)
class Counted:
    """What was counted in a kernel. Widths are in bytes, with the number of instructions that have it."""

    threads: int
    """Of a program."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of stack and local memory and instructions that access it; AMD: registers and bytes of scratch memory."""
    thread_loads: Counter[int]
    thread_stores: Counter[int]
    program_loads: Counter[int]
    program_stores: Counter[int]
    in_the_binary: bool | None
    """Whether the disassembled binary has the loads and stores of the PTX; None for AMD, whose assembly is counted."""
    asked_to_fuse: int
    """Fused multiply-adds of the source, a thread's."""
    fused: int
    """Those of the code, but for what divisions and roots are made of."""
    contractible: int
    """Sums and products in the PTX that do not say how they are rounded."""
    contractible_before: int
    """Those in LLVM's IR that are marked as free to be contracted."""
    contraction_changes: bool | None
    """Whether NVIDIA's assembler makes other instructions where it may contract."""
    flushing: Counter[str]
    """Instructions of the PTX that take subnormal numbers for zero."""
    elements: int
    """Parameters that a program steps."""
    read: tuple[int, ...]
    """Bytes of an element, of each tensor that the format has to read."""
    written: tuple[int, ...]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Counted:
        """From the other process, which knows of widths as text only."""
        for name in ("thread_loads", "thread_stores", "program_loads", "program_stores"):
            found[name] = Counter({int(width): count for width, count in found[name].items()})
        found |= {"flushing": Counter(found["flushing"]), "read": tuple(found["read"])}
        return cls(**found | {"written": tuple(found["written"])})


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _answers(jobs: Sequence[dict[str, Any]]) -> list[Counted]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Triton's own settings decide what is compiled: none of the surrounding process's may.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu_code_worker"],
            input=json.dumps(jobs),
            cwd=ROOT,
            env=kept | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    if done.returncode != 0:
        raise RuntimeError(f"the compiling process ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return [Counted.of(found) for found in json.loads(done.stdout)]


def count(kernels: Sequence[Kernel], target: str) -> list[Counted]:
    """Compile kernels for one of ``TARGETS``.

    Raises:
        RuntimeError: one cannot be compiled; with what the compiler says.
        subprocess.TimeoutExpired: it did not end.
    """
    return _answers([{"target": target, "kernel": kernel._asdict()} for kernel in kernels])


def count_controls(target: str) -> dict[str, Counted]:
    """A kernel of a product and a sum, by where they are contracted. Raises as ``count``."""
    where = ["nowhere", "in the compiler", *(["in the assembler"] if TARGETS[target][0] == "cuda" else [])]
    return dict(zip(where, _answers([{"target": target, "contracted": w} for w in where]), strict=True))


# ---------------------------------------------------------------- what must hold


class Traffic(NamedTuple):
    """Accesses of a thread, those of elements apart from those of metadata, which are single bytes."""

    loads: Counter[int]
    stores: Counter[int]
    metadata_loads: int
    """Where a thread has elements of every block, its program loads them, once for all."""
    metadata_stores: int
    elements: int
    """Of a thread."""

    @property
    def read(self) -> float:
        """Bytes of an element, without metadata."""
        return total(self.loads) / self.elements

    @property
    def written(self) -> float:
        """Bytes of an element, without metadata."""
        return total(self.stores) / self.elements


def total(widths: Counter[int]) -> int:
    """Bytes."""
    return sum(width * count for width, count in widths.items())


def traffic(kernel: Kernel, counted: Counted) -> Traffic:
    """Tell accesses of elements and of metadata apart.

    Where elements are accessed one by one, codes are single bytes as well: one an element of each such tensor.
    """
    elements = counted.elements // counted.threads

    def apart(widths: Counter[int], itemsizes: Sequence[int]) -> tuple[Counter[int], int]:
        codes = 0 if kernel.layout in WIDE else min(widths[1], itemsizes.count(1) * elements)
        return Counter({**widths, 1: codes}), widths[1] - codes

    loads, metadata_loads = apart(counted.thread_loads, counted.read)
    stores, metadata_stores = apart(counted.thread_stores, counted.written)
    return Traffic(+loads, +stores, metadata_loads or counted.program_loads[1], metadata_stores, elements)


def widest(itemsizes: Sequence[int], elements: int) -> Counter[int]:
    """Fewest accesses of a thread: of 16 bytes, or of all its elements where these are fewer."""
    fewest: Counter[int] = Counter()
    for itemsize in itemsizes:
        width = min(16, itemsize * elements)
        fewest[width] += itemsize * elements // width
    return fewest


def metadata_bytes(kernel: Kernel) -> float:
    """Of an element, read and once more written: two bytes a block."""
    return 2 / BLOCK_SIZE if kernel.moments == "8bit" else 0.0


def most_registers(kernel: Kernel, target: str) -> int:
    """The bound."""
    # Nearly all parameters are WHOLE; of others there are four programs at once.
    backend = str(TARGETS[target][0])
    return ALL_REGISTERS if backend == "cuda" and kernel.layout != "WHOLE" else REGISTERS[backend]


def problems(kernel: Kernel, target: str, counted: Counted) -> list[str]:
    """What does not hold of a kernel, in words."""
    nvidia = TARGETS[target][0] == "cuda"
    found = []
    if counted.spilled:
        found.append("registers are spilled")
    if counted.registers > most_registers(kernel, target):
        found.append(f"{counted.registers} registers, more than {most_registers(kernel, target)}")
    if counted.fused != counted.asked_to_fuse:
        found.append(f"{counted.fused} fused multiply-adds where the source has {counted.asked_to_fuse}")
    if counted.contractible or counted.contractible_before or counted.contraction_changes:
        found.append("sums and products that may be contracted")
    if any(not harmless_flush(name) for name in counted.flushing):
        found.append(f"subnormal numbers are taken for zero: {dict(counted.flushing)}")
    return found + (traffic_problems(kernel, nvidia, counted) if kernel.name == ADAM else [])


def harmless_flush(instruction: str) -> bool:
    """Floors, whose operands are no subnormal numbers, and estimates for divisions and roots of usual numbers."""
    return instruction == "cvt.rmi.ftz.f32.f32" or instruction.endswith(".approx.ftz.f32")


def traffic_problems(kernel: Kernel, nvidia: bool, counted: Counted) -> list[str]:
    """What of them concerns loads and stores."""
    found = []
    seen = traffic(kernel, counted)
    if (seen.read, seen.written) != (sum(counted.read), sum(counted.written)):
        found.append(
            f"{seen.read:g} bytes of an element are read and {seen.written:g} written, "
            f"the least are {sum(counted.read)} and {sum(counted.written)}"
        )
    if kernel.layout in WIDE:
        fewest = widest(counted.read, seen.elements), widest(counted.written, seen.elements)
        if (seen.loads, seen.stores) != fewest:
            found.append("accesses are not the widest")
        if nvidia and {*seen.loads, *seen.stores} != {16}:
            found.append("accesses of fewer than 128 bits")
    # In others the assembler may put loads of the tables together.
    if kernel.layout in WIDE and counted.in_the_binary is False:
        found.append("the binary has other loads and stores than the PTX")
    # A thread's elements are all of one block, or some of every block.
    blocks = 1 if kernel.layout in WIDE else counted.elements // BLOCK_SIZE
    tables = 2 * blocks if kernel.moments == "8bit" else 0
    if seen.metadata_loads != tables or seen.metadata_stores != min(tables, 2):
        found.append(f"{seen.metadata_loads} loads and {seen.metadata_stores} stores of metadata")
    return found


# ---------------------------------------------------------------- kernels

_HALVES = ("bfloat16", "float16")
_UPDATES: list[dict[str, Any]] = [{"rounding": r} for r in ("stochastic", "nearest")] + [
    {"master": m} for m in ("float32", "int16", "int8")
]


def kernels() -> list[Kernel]:
    """Those that a step launches: all dtypes and ways of keeping weights, then layouts and settings."""
    of_float32 = [Kernel(moments=moments) for moments in ("8bit", "32bit")]
    of_halves = [
        Kernel(param=param, grad=grad, moments=moments, **update)
        for moments in ("8bit", "32bit")
        for param in _HALVES
        for grad in (param, "float32")
        for update in _UPDATES
    ]
    some = [
        *of_float32,
        Kernel(param="bfloat16", grad="bfloat16"),
        Kernel(param="float16", grad="float32", master="int8"),
        Kernel(param="bfloat16", grad="bfloat16", moments="32bit", master="int16"),
    ]
    elsewhere = [kernel._replace(layout=layout) for layout in LAYOUTS[1:] for kernel in some]
    settings: list[dict[str, Any]] = [{"l2_decay": True}, {"nonfinite": "propagate"}]
    settings.append({**settings[0], **settings[1]})
    searching = [kernel._replace(wide=True) for kernel in some if kernel.moments == "8bit"]
    otherwise = [kernel._replace(**changes) for changes in settings for kernel in some]
    return [*of_float32, *of_halves, *elsewhere, *otherwise, *searching, Kernel(name=RECORD)]
