"""Whether an installed wheel steps as it should, with nothing but torch beside it.

The native library is there, is the wheel's own, takes the bits of plain torch, and on Linux shares torch's OpenMP.
Run by cibuildwheel for each wheel (pyproject.toml), outside of the repository, and by tests/test_native_isas.py:

    python tests/wheel_smoke.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import lowmem_adam
from lowmem_adam.kernels import cpu

SHAPES = ((64, 128), (33, 130), (5,), (70000,))


def stepped(backend: str, dtype: torch.dtype, moments: str) -> list[torch.Tensor]:
    """Parameters and state after three steps."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = lowmem_adam.AdamW8bit(params, lr=1e-3, moments=moments, backend=backend)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return [*(param.detach() for param in params), *held]


def main() -> None:
    """Raise AssertionError or LibraryError where something is not as it should be."""
    library, package = cpu.load(), Path(lowmem_adam.__file__).parent
    assert package in library.path.parents, f"{library.path} is not of {package}"
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        for moments in ("8bit", "32bit", "bnb8bit"):
            pairs = zip(stepped("cpu", dtype, moments), stepped("reference", dtype, moments), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs), (dtype, moments)
    if sys.platform.startswith("linux"):
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
        pools = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line}
        assert len(pools) == 1, f"several OpenMP libraries: {pools}"
        assert library.openmp is not None
        assert Path(torch.__file__).resolve().parent in Path(library.openmp).resolve().parents, library.openmp
    print(f"lowmem_adam {lowmem_adam.__version__}: {library.isa_name}, OpenMP of {library.openmp}, torch's bits")


if __name__ == "__main__":
    main()
