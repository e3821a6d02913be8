"""The backend ``"triton"`` on a machine without a CUDA device: what is refused, and what is not imported."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

from lowmem_adam import AdamW8bit, kernels
from lowmem_adam.kernels import choose, triton
from tests.launching import ROOT

SECONDS = 280


def test_backend_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match='backend is "triton" for a parameter on cpu; accepted: parameters on CUDA'):
        AdamW8bit([torch.zeros(3)], backend="triton")


def test_capturable_on_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="capturable is True and a parameter on cpu is stepped by backend"):
        AdamW8bit([torch.zeros(3)], capturable=True)
    opt = AdamW8bit([torch.zeros(3)], capturable=False)
    assert "capturable" not in opt.param_groups[0]
    with pytest.raises(ValueError, match="param group 1: capturable is True; accepted: capturable given to the constr"):
        opt.add_param_group({"params": [torch.zeros(3)], "capturable": True})


def test_a_cuda_device_without_triton_takes_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernels._triton_or_warning.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Triton is not installed") as warned:
            assert [choose(None, torch.device("cuda")) for _ in range(2)] == ["reference"] * 2
        assert len(warned) == 1
    finally:
        kernels._triton_or_warning.cache_clear()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(triton.TritonError, match="Triton is not installed"):
        choose("triton", torch.device("cuda"))


def test_steps_elsewhere_do_not_import_the_kernels() -> None:
    code = (
        "import sys, torch, lowmem_adam\n"
        "assert 'triton' not in sys.modules\n"
        "opt = lowmem_adam.AdamW8bit([p := torch.nn.Parameter(torch.ones(9))]); p.grad = torch.ones(9); opt.step()\n"
        "assert 'lowmem_adam.kernels.gpu.step' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=SECONDS)
