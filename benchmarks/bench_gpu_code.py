"""What the Triton kernels are compiled to, for four processors: registers, spills, loads and stores, contraction.

    python -m benchmarks.bench_gpu_code [--quick] [--targets sm_90,gfx942] [--output FOLDER]

Needs Triton (Linux) and no GPU. Counts do not depend on the machine, only on the version of Triton and of the
assemblers that come with it. ``gpu_code.problems`` says what must hold; ends with status 1 where it does not.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import gpu_code, harness
from benchmarks.gpu_code import RECORD, TARGETS, Counted, Kernel, metadata_bytes, traffic
from lowmem_adam.layout import BLOCK_SIZE

HEADER = [
    "processor",
    "parameter, gradient",
    "kept",
    "moments",
    "layout",
    "settings",
    "registers",
    "at most",
    "spilled",
    "loads",
    "stores",
    "bytes read",
    "least",
    "bytes written",
    "least",
    "table",
    "fused, asked for",
    "holds",
]
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LEGEND = f"""Every row is a kernel that a step launches, compiled for that processor.

- Loads and stores are a thread's, as count x bytes of an access: those whose addresses depend on the thread. Single
  bytes in the layouts WHOLE and ALIGNED are metadata, two bytes of a block of {BLOCK_SIZE} elements:
  {2 / BLOCK_SIZE:g} bytes of an element each way, which the columns of bytes leave out.
- "table": what a program loads besides, bytes of an element: descriptions of tensors and hyperparameters, of which
  many programs load the same.
- "spilled" is 0 where there is neither stack nor local memory nor an access of it; AMD: no scratch memory.
- "fused": fused multiply-adds in the code, and those that the source has by name; on AMD beyond those that the
  compiler's divisions and square roots are made of.
- "holds": all of that, no sum or product in the code is free to be contracted, and subnormal numbers are taken for zero
  nowhere but where it cannot matter (`problems` in `benchmarks/gpu_code.py`).
"""


def listed(widths: Counter[int]) -> str:
    """Widest first: 10 x 16, 2 x 1."""
    return ", ".join(f"{count} x {width}" for width, count in sorted(widths.items(), reverse=True)) or "none"


def row(kernel: Kernel, target: str, counted: Counted) -> list[harness.Cell]:
    """A kernel's, as of the header."""
    problems = "; ".join(gpu_code.problems(kernel, target, counted)) or "yes"
    most = gpu_code.most_registers(kernel, target)
    fused = f"{counted.fused}, {counted.asked_to_fuse}"
    if kernel.name == RECORD:
        own: list[harness.Cell] = [target, "hyperparameters", "", "", "", "", counted.registers, most, counted.spilled]
        return [*own, *[""] * 7, fused, problems]
    settings = "L2 decay" if kernel.l2_decay else ""
    if kernel.wide:
        settings += (", " if settings else "") + "beta2 0.9999"
    if kernel.nonfinite != "skip":
        settings += (", " if settings else "") + kernel.nonfinite
    if kernel.param != "float32" and kernel.master == "none":
        settings += (", " if settings else "") + kernel.rounding
    seen = traffic(kernel, counted)
    return [
        target,
        f"{SHORT[kernel.param]}, {SHORT[kernel.grad]}",
        SHORT.get(kernel.master, kernel.master),
        kernel.moments,
        kernel.layout,
        settings,
        counted.registers,
        most,
        counted.spilled,
        listed(counted.thread_loads),
        listed(counted.thread_stores),
        seen.read,
        sum(counted.read),
        seen.written,
        sum(counted.written),
        gpu_code.total(counted.program_loads) / counted.elements,
        fused,
        problems,
    ]


def data(kernel: Kernel, target: str, counted: Counted) -> dict[str, Any]:
    """All that was counted."""
    problems = gpu_code.problems(kernel, target, counted)
    of_format = {"metadata_bytes_each_way": metadata_bytes(kernel)} if kernel.name != RECORD else {}
    return {"processor": target, **kernel._asdict(), **vars(counted), **of_format, "problems": problems}


def main(
    targets: Annotated[str, typer.Option(help="Processors, separated by commas.")] = ",".join(TARGETS),
    quick: Annotated[bool, typer.Option(help="A fifth of the kernels.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and Markdown files.")] = harness.RESULTS,
) -> None:
    """Compile all kernels for all processors and say whether the code is as it should be."""
    chosen = targets.split(",")
    if not gpu_code.available():
        raise typer.BadParameter("Triton is not installed; accepted: an environment with it (pip install triton)")
    if not set(chosen) <= set(TARGETS):
        raise typer.BadParameter(f"targets is {targets}; accepted: some of {','.join(TARGETS)}")
    kernels = gpu_code.kernels()[:: 5 if quick else 1]
    counted = [
        (k, target, c) for target in chosen for k, c in zip(kernels, gpu_code.count(kernels, target), strict=True)
    ]
    rows = [row(*one) for one in counted]
    failed = sum(bool(gpu_code.problems(*one)) for one in counted)
    title = "What the Triton kernels are compiled to"
    told = f"{len(rows)} kernels, {failed} of them not as they should be."
    harness.print_table(f"{title}: {told}", HEADER, rows)
    harness.write_results(
        "gpu_code",
        {"kernels": [data(*one) for one in counted]},
        f"# {title}\n\n{told}\n\n{LEGEND}\n{harness.markdown_table(HEADER, rows)}",
        output,
    )
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
