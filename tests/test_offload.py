"""CPU offload: on the simulated device (tests/offload_cases.py), and of parameters that are on the host already."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from lowmem_adam import AdamW8bit, cores, offload
from tests import host_gradient_cases, host_gradient_fault_cases, in_backward_cases, offload_cases, sim_device
from tests.cases import DTYPES, SHAPES, assert_same_bits, everything, make_params, train
from tests.sim_device import running

MODULES = (offload_cases, host_gradient_cases, host_gradient_fault_cases, in_backward_cases)
REASON = sim_device.why_unavailable()
NEEDS_COMPILER = pytest.mark.skipif(REASON is not None, reason=REASON or "")


Outcomes = Callable[[ModuleType], dict[str, str]]


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """A child for each module of cases, run by the first test that asks for it: its time is that test's."""
    return functools.cache(lambda module: running.outcomes([module], tmp_path_factory.mktemp("sim") / "results.jsonl"))


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("module", "case"), [(module, case) for module in MODULES for case in running.cases_of(module)]
)
def test_on_the_simulated_device(outcomes_of: Outcomes, module: ModuleType, case: str) -> None:
    failure = outcomes_of(module)[running.full_name(module, case)]
    assert not failure, failure


@pytest.mark.parametrize(("dtype", "moments"), list(itertools.product(DTYPES, ("8bit", "32bit"))))
def test_parameters_on_the_host_take_the_same_steps(dtype: torch.dtype, moments: str) -> None:
    runs = []
    for where in ("cpu", None):
        params = make_params(SHAPES, dtype)
        opt = AdamW8bit(params, lr=1e-2, moments=moments, offload=where)
        train(opt, params, 3)
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_copies_of_an_optimizer_are_offloaded_too() -> None:
    params = make_params(SHAPES)
    opt = AdamW8bit(params, offload="cpu")
    train(opt, params, 2)
    assert copy.deepcopy(opt)._stepper.offload is not None
    assert copy.deepcopy(AdamW8bit(make_params(SHAPES)))._stepper.offload is None


def test_one_thread_is_all_there_is_where_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offload.warn_of_one_thread()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.warns(RuntimeWarning, match="one thread of 2"):
        offload.warn_of_one_thread()


def test_a_buffer_is_given_up_before_a_larger_one_is_asked_for() -> None:
    held: list[int] = []

    def allocate(nbytes: int) -> torch.Tensor:
        held.append(slot.memory.numel())
        return torch.empty(nbytes, dtype=torch.uint8)

    slot = offload.Slot(allocate)
    small = slot.take([100, 3])
    assert [part.numel() for part in small] == [100, 3]
    assert slot.memory.numel() == 3 * offload.ALIGNMENT
    assert (small[1].data_ptr() - small[0].data_ptr()) % offload.ALIGNMENT == 0
    assert slot.take([10])[0].data_ptr() == small[0].data_ptr()
    assert slot.take([1000])[0].numel() == 1000
    assert held == [0, 0]
