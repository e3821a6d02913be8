"""Compiles kernels for processors that this machine need not have, and counts: ``gpu_code`` starts it.

    python -m benchmarks.gpu_code_worker < jobs.json > counts.json

What is compiled is what a step launches: ``kernels.triton`` steps a fragment with recorders in place of the kernels,
and arguments, constants and options are taken from there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from benchmarks import gpu_counts as counts
from benchmarks.gpu_code import ADAM, SHAPES, TARGETS, Kernel
from lowmem_adam.kernels import triton as host
from lowmem_adam.kernels.fragment import (
    AnyWork,
    CodedMoments,
    DeviceRates,
    DeviceSettings,
    DeviceStep,
    Fragment,
    FullMoments,
    StepScalars,
)
from lowmem_adam.kernels.gpu import records, step
from lowmem_adam.layout import BLOCK_SIZE, Layout

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.int32: "*i32", torch.int64: "*i64", torch.float32: "*fp32", torch.float64: "*fp64"}


# ---------------------------------------------------------------- what a step launches


class Launch(NamedTuple):
    """A kernel and what it was called with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


class Recorder:
    """Stands for a kernel, and runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self._launches.append(Launch(self._kernel, arguments, options))


def fragment_of(kernel: Kernel) -> Fragment:
    """A fragment that is stepped so."""
    shape = SHAPES[kernel.layout]
    dtype = getattr(torch, kernel.param)
    param = torch.zeros(shape, dtype=dtype)
    if kernel.layout == "STRIDED":
        param = torch.zeros(shape[::-1], dtype=dtype).T
    layout = Layout.of(param.shape)
    moments: CodedMoments | FullMoments
    if kernel.moments == "8bit":
        codes = (torch.zeros(shape, dtype=torch.int8), torch.zeros(shape, dtype=torch.uint8))
        moments = CodedMoments(*codes, *(torch.zeros(layout.n_blocks, dtype=torch.uint8) for _ in range(2)))
    else:
        moments = FullMoments(torch.zeros(shape), torch.zeros(shape))
    master = None if kernel.master == "none" else torch.zeros(shape, dtype=getattr(torch, kernel.master))
    grad = torch.zeros(shape, dtype=getattr(torch, kernel.grad))
    return Fragment(param, grad, moments, layout, 0, layout.n_blocks, None, master)


def work_of(kernel: Kernel) -> AnyWork:
    """The fragment and hyperparameters."""
    betas = (0.9, 0.9999 if kernel.wide else 0.999)
    settings: dict[str, Any] = {"betas": betas, "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "seed": 1}
    settings["decoupled"] = not kernel.l2_decay
    if kernel.name == ADAM:
        settings |= {"low_precision_update": kernel.rounding, "nonfinite": kernel.nonfinite}
        return fragment_of(kernel), StepScalars.at_step(1, lr=1e-3, **settings)
    settings |= {"stochastic": kernel.rounding == "stochastic", "skip_nonfinite": kernel.nonfinite == "skip"}
    counter = torch.zeros((), dtype=torch.int64)
    return fragment_of(kernel), DeviceStep(counter, DeviceSettings(**settings), DeviceRates(1e-3, 1.0, 0.0), [])


def launch_of(kernel: Kernel, nvidia: bool) -> Launch:
    """How a step on a device of that maker launches it."""
    launches: list[Launch] = []
    modules = {"adam_step_kernel": step, "record_kernel": records}
    with ExitStack() as patched:
        for name, module in modules.items():
            patched.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), launches)))
        # Where the host asks whose device it is.
        patched.enter_context(mock.patch.object(host, "_is_nvidia", return_value=nvidia))
        host.adam_step_([work_of(kernel)])
    [launch] = [launch for launch in launches if launch.kernel.__name__ == kernel.name]
    return launch


# ---------------------------------------------------------------- compiled


def compiled(launch: Launch, target: Any) -> Any:
    """As Triton compiles it for such a launch."""
    names = launch.kernel.arg_names
    assert len(names) == len(launch.arguments)
    signature, constants, aligned = {}, {}, {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=True)):
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            # CUDA's allocations begin at multiples of 512 bytes, so the offset decides.
            if value.storage_offset() * value.element_size() % 16 == 0:
                aligned[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options=dict(launch.options))


def told(tool: str | Path, *arguments: str) -> str:
    """What a program of NVIDIA's, which come with Triton, prints."""
    done = subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True, timeout=120)
    return done.stdout


def assembled(ptx: str, capability: int, contract: bool) -> bytes:
    """A binary of the assembler that Triton takes."""
    [architecture] = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        options = ["-lineinfo", f"--fmad={str(contract).lower()}", f"--gpu-name={architecture}"]
        told(get_ptxas(capability).path, *options, str(source), "-o", str(binary))
        return binary.read_bytes()


def nvidia_counts(ptx: str, binary: bytes, capability: int) -> dict[str, Any]:
    """Of PTX, of what is assembled from it, and of what is assembled where contraction is allowed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        used = counts.resources(told(TOOLS / "cuobjdump", "--dump-resource-usage", str(path)))
        sass = told(TOOLS / "nvdisasm", "-c", str(path))
    kept, contracted = (counts.machine_code(assembled(ptx, capability, contract)) for contract in (False, True))
    accesses = counts.ptx_accesses(ptx)
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"] + counts.sass_local(sass),
        **accesses._asdict(),
        "in_the_binary": accesses.all() == counts.sass_accesses(sass),
        "fused": counts.ptx_fused(ptx),
        "contractible": counts.may_be_contracted(ptx).total(),
        "contraction_changes": kept != contracted,
        "flushing": counts.flushing(ptx),
    }


def amd_counts(code: Any) -> dict[str, Any]:
    """Of assembly, which Triton's own assembler takes as it is."""
    assembly = code.asm["amdgcn"]
    used = counts.amd_metadata(assembly)
    return {
        "registers": used["vgpr_count"],
        "spilled": used["vgpr_spill_count"] + used["sgpr_spill_count"] + used["private_segment_fixed_size"],
        **counts.amd_accesses(assembly)._asdict(),
        "in_the_binary": None,
        "fused": counts.amd_fused(assembly),
        "contractible": 0,
        "contraction_changes": None,
        "flushing": counts.amd_flushing(assembly),
    }


def counted(code: Any, target: Any) -> dict[str, Any]:
    """What holds of every kernel."""
    threads = code.metadata.num_warps * target.warp_size
    nvidia = target.backend == "cuda"
    return {
        "threads": threads,
        "asked_to_fuse": counts.explicit_fused(code.asm["ttgir"], threads),
        "contractible_before": counts.llvm_contractible(code.asm["llir"]),
        **(nvidia_counts(code.asm["ptx"], code.asm["cubin"], target.arch) if nvidia else amd_counts(code)),
    }


def counts_of(kernel: Kernel, target: Any) -> dict[str, Any]:
    """What ``gpu_code.Counted`` holds."""
    launch = launch_of(kernel, target.backend == "cuda")
    found = counted(compiled(launch, target), target)
    if kernel.name != ADAM:
        return {**found, "elements": 0, "read": [], "written": []}
    constants = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
    assert constants["LAYOUT"] == getattr(step, kernel.layout).value, (kernel, constants)
    fragment = fragment_of(kernel)
    kept = [fragment.param, *fragment.moments[:2], *(() if fragment.master is None else (fragment.master,))]
    written = [tensor.element_size() for tensor in kept]
    return {
        **found,
        "elements": constants["BLOCKS_AT_ONCE"] * BLOCK_SIZE,
        "read": [*written, fragment.grad.element_size()],
        "written": written,
    }


# ---------------------------------------------------------------- a kernel that can be contracted


@triton.jit
def multiply_add_kernel(x, y, z):  # type: ignore[no-untyped-def]
    """A product and a sum, for a look at what contraction makes of them."""
    at = tl.arange(0, 1024)
    tl.store(z + at, tl.load(x + at) * tl.load(y + at) + tl.load(z + at))


def control(contracted: str, target: Any) -> dict[str, Any]:
    """Counts of ``multiply_add_kernel``, contracted nowhere, in the compiler, or left to the assembler."""
    options = {"num_warps": 4, "enable_fp_fusion": contracted == "in the compiler"}
    code = compiled(Launch(multiply_add_kernel, (torch.zeros(1024),) * 3, options), target)
    found = counted(code, target)
    if contracted == "in the assembler":
        ptx = re.sub(r"\b(add|mul)\.rn\.f32", r"\1.f32", code.asm["ptx"])
        found |= nvidia_counts(ptx, assembled(ptx, target.arch, contract=False), target.arch)
    return {**found, "elements": 1024, "read": [4, 4, 4], "written": [4]}


def main() -> None:
    """Jobs in, counts out, in the same order."""
    answers = []
    for job in json.load(sys.stdin):
        target = GPUTarget(*TARGETS[job["target"]])
        if "contracted" in job:
            answers.append(control(job["contracted"], target))
        else:
            answers.append(counts_of(Kernel(**job["kernel"]), target))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
