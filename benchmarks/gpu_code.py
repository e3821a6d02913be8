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

PROGRAMS = 3
"""Programs that are to fit on a multiprocessor at once, by their registers."""
REGISTERS = {"cuda": 65536 // (PROGRAMS * 4 * 32) // 8 * 8, "hip": 512 // 4}
"""Most registers of a thread.

NVIDIA's multiprocessor has 65,536 and gives them out by eights: 168 let three programs of four warps in, so that 60 KB
of fp32 parameters, gradients and codes are on their way at once. By Little's law an H100 needs 3.35 TB/s times some
800 ns over 132 multiprocessors, 20 KB. AMD's SIMD has 512 for each of its lanes: 128 let four waves in.
"""

LAYOUTS = ("WHOLE", "ALIGNED", "ANY", "STRIDED")
"""How elements lie in memory, by the kernel's names."""
WIDE = LAYOUTS[:2]
"""Those of which all accesses are as wide as they can be."""
SHAPES = {"WHOLE": (64, 512), "ALIGNED": (64, 144), "ANY": (64, 130), "STRIDED": (64, 512)}
"""Of parameters that are stepped so; a strided one is transposed."""


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

    # ------------------------------------------------------------ traffic

    @property
    def elements_of_thread(self) -> int:
        return self.elements // self.threads

    def widest(self, itemsizes: Sequence[int]) -> Counter[int]:
        """Fewest accesses of a thread: of 16 bytes, or of all its elements where they are fewer."""
        fewest: Counter[int] = Counter()
        for itemsize in itemsizes:
            width = min(16, itemsize * self.elements_of_thread)
            fewest[width] += itemsize * self.elements_of_thread // width
        return fewest

    def apart(self, widths: Counter[int], itemsizes: Sequence[int], coded: bool) -> tuple[Counter[int], int]:
        """Accesses of elements, and the number of those of metadata, which are single bytes.

        Where elements are accessed one by one, codes are single bytes too: as many as the thread has elements.
        """
        if not coded:
            return widths, 0
        by_element = 1 in self.widest(itemsizes) or widths[1] > 2 * self.elements_of_thread
        codes = itemsizes.count(1) * self.elements_of_thread if by_element else 0
        return Counter({**widths, 1: codes}) + Counter(), widths[1] - codes

    def bytes_of_element(self, widths: Counter[int]) -> float:
        """Bytes of such accesses of all threads over the program's elements."""
        return sum(width * count for width, count in widths.items()) / self.elements_of_thread


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


def count_control(target: str, *, fusion: bool) -> Counted:
    """A kernel of a product and a sum, where they may be contracted or not."""
    return _answers([{"target": target, "fusion": fusion}])[0]


# ---------------------------------------------------------------- what must hold


def metadata_bytes(kernel: Kernel) -> float:
    """Of an element, read and again written: two bytes a block."""
    return 2 / BLOCK_SIZE if kernel.moments == "8bit" else 0.0
