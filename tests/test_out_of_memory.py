"""A step for whose state there is no memory: it says so, changes nothing, and can be taken later."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lowmem_adam import AdamW8bit
from lowmem_adam.state import state_bytes
from tests.cases import FEW, assert_same_bits, everything, make_params, params_of, set_gradients, tensors_held, train
from tests.launching import ROOT

ZEROS = torch.zeros


def refusing(after: int, message: str = "[enforce fail] DefaultCPUAllocator: can't allocate memory") -> Any:
    """No more memory for state after so many tensors of it."""
    made = itertools.count()

    def zeros(*args: Any, **keywords: Any) -> Tensor:
        if next(made) >= after:
            raise RuntimeError(message)
        return ZEROS(*args, **keywords)

    return mock.patch("lowmem_adam.state.torch.zeros", zeros)


def optimizers(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[AdamW8bit, AdamW8bit]:
    one, other = (AdamW8bit(make_params(FEW, dtype), lr=1e-2, offload="cpu", **settings) for _ in range(2))
    return one, other


@pytest.mark.parametrize("after", range(0, 25, 3))
def test_nothing_changes_and_a_later_step_has_the_same_bits(after: int) -> None:
    opt, alone = optimizers(low_precision_update="split")
    set_gradients(params_of(opt), 0)
    before = everything(opt)
    with (
        refusing(after),
        pytest.raises(torch.OutOfMemoryError, match="none of which has changed") as raised,
    ):
        opt.step()
    assert "DefaultCPUAllocator" in str(raised.value.__cause__)
    assert_same_bits(everything(opt), before)
    assert not opt.state
    for each in (opt, alone):
        train(each, params_of(each), 3)
    assert_same_bits(everything(opt), everything(alone))


def test_nothing_changes_where_another_rest_of_the_weight_is_to_be_kept() -> None:
    opt, alone = optimizers(low_precision_update="split")
    for each in (opt, alone):
        train(each, params_of(each), 2)
        each.param_groups[0]["low_precision_update"] = "fp32"
    set_gradients(params_of(opt), 2)
    before = everything(opt)
    numel = params_of(opt)[2].numel()
    with refusing(2), pytest.raises(torch.OutOfMemoryError, match=f"for {4 * numel} bytes of optimizer state"):
        opt.step()
    assert_same_bits(everything(opt), before)
    for each in (opt, alone):
        train(each, params_of(each), 2, start=2)
    assert_same_bits(everything(opt), everything(alone))


def test_it_names_the_parameter_its_bytes_and_what_takes_less() -> None:
    named = list(zip(("embedding", "head"), make_params(FEW[:2], torch.bfloat16), strict=True))
    keywords: dict[str, Any] = {"moments": "32bit", "low_precision_update": "fp32", "offload": "cpu"}
    opt = AdamW8bit(named, **keywords)
    set_gradients(params_of(opt), 0)
    with refusing(5), pytest.raises(torch.OutOfMemoryError) as raised:
        opt.step()
    said = str(raised.value)
    sizes = [12 * param.numel() + 8 for param in params_of(opt)]
    assert f"param group 0, parameter 1 ('head') of shape {tuple(params_of(opt)[1].shape)}: no memory on cpu" in said
    assert f"for {sizes[1]} bytes of optimizer state, of {sum(sizes)} bytes" in said
    for way in ('moments="8bit"', 'low_precision_update="stochastic"', "shard_group"):
        assert way in said
    assert 'offload="cpu"' not in said
    # By this accelerate.utils.find_executable_batch_size knows that memory was short.
    assert "DefaultCPUAllocator: can't allocate memory" in said


def test_other_errors_stay_what_they_are() -> None:
    opt, _ = optimizers()
    set_gradients(params_of(opt), 0)
    with refusing(3, "something else"), pytest.raises(RuntimeError, match="something else"):
        opt.step()
    assert not opt.state


@pytest.mark.parametrize("update", ["stochastic", "split", "fp32"])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_bytes_are_those_of_the_tensors(moments: str, update: str) -> None:
    opt, _ = optimizers(moments=moments, low_precision_update=update)
    train(opt, params_of(opt), 1)
    partition = opt._cut()
    kept = {"stochastic": None, "split": torch.int16, "fp32": torch.float32}[update]
    said = sum(state_bytes(param, moments, partition.span(param), kept, {}) for param in params_of(opt))
    assert said == sum(tensor.nbytes for tensor in tensors_held(opt))
    assert not any(
        state_bytes(param, moments, partition.span(param), kept, opt.state[param]) for param in params_of(opt)
    )


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch.nn import Parameter
from lowmem_adam import AdamW8bit
from tests.cases import assert_same_bits, everything

def optimizer():
    params = [Parameter(torch.full((4096, 2048), 0.5)) for _ in range(2)]
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, 0.01 * (index + 1))
    return AdamW8bit(params, moments="32bit", offload="cpu")

warm = Parameter(torch.ones(4096, 128))
warm.grad = torch.ones_like(warm)
AdamW8bit([warm]).step()  # threads, and the library
opt, alone = optimizer(), optimizer()
before = everything(opt)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, hard))  # two moments take 64 MiB
try:
    opt.step()
except torch.OutOfMemoryError as error:
    said = str(error)
else:
    sys.exit("there was memory")
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
print(said)
assert_same_bits(everything(opt), before)
assert not opt.state
for each in (opt, alone):
    each.step()
assert_same_bits(everything(opt), everything(alone))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit by Linux's account of a process's memory")
def test_a_process_whose_memory_is_limited() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert f"no memory on cpu for {64 * 2**20 + 8} bytes of optimizer state, of {128 * 2**20 + 16}" in result.stdout
    assert "parameter 1 of shape (4096, 2048)" in result.stdout
