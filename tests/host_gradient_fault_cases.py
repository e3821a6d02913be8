"""Memory and faults of ``offload_gradients`` on the simulated device: cases for a process that has it; each asserts."""

from __future__ import annotations

import gc
import warnings
import weakref
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, prepared
from lowmem_adam.stand_ins import HostGradient
from tests import sim_device as sim
from tests.cases import Shape, assert_same_bits, gradient, params_of
from tests.host_gradient_cases import backward, taking, train
from tests.offload_cases import WIDE, assert_equal, values


def peaks_of_passes(opt: AdamW8bit, params: list[Parameter]) -> list[tuple[int, int]]:
    """Bytes of the device's and of pinned memory that each of two backward passes takes at its peak."""
    peaks = []
    for _ in range(2):
        x = torch.ones(256, device="sim")
        loss = torch.stack([(param @ x).sum() for param in params]).sum()
        torch.accelerator.synchronize()
        gc.collect()
        sim.reset_peaks()
        before, pinned = sim.device_bytes(), sim.pinned_bytes()
        loss.backward()
        torch.accelerator.synchronize()
        peaks.append((sim.peak_device_bytes() - before, sim.peak_pinned_bytes() - pinned))
        opt.step()
        opt.zero_grad()
    return peaks


def case_gradients_are_freed_on_the_device() -> None:
    """During a pass no more of them is there than the one that is made and what is on its way."""
    sizes = 16
    layer, bucket = 64 * 256 * 4, 2 * 64 * 256 * 4
    params = [Parameter(torch.full((64, 256), float(i), device="sim")) for i in range(sizes)]
    for offload_gradients in (False, True):
        opt = AdamW8bit(params, offload="cpu", offload_gradients=offload_gradients, bucket_cap_mb=bucket / 2 / 2**20)
        peaks = peaks_of_passes(opt, params)
        device = [of_device for of_device, _ in peaks]
        assert max(pinned for _, pinned in peaks) <= bucket
        most = bucket + 4 * layer
        assert (min(device) >= sizes * layer) == (not offload_gradients), peaks
        assert (max(device) <= most) == offload_gradients, (peaks, most)


def case_hooks_do_not_keep_an_optimizer_alive() -> None:
    offloaded, _ = taking()
    params = params_of(offloaded)
    backward(offloaded, 0)
    offloaded.step()
    gone = weakref.ref(offloaded)
    del offloaded
    gc.collect()
    assert gone() is None
    before = sim.pinned_bytes()
    for param in params:
        param.grad = None
    gc.collect()
    assert sim.pinned_bytes() < before
    (params[0] * 2).sum().backward()
    assert type(params[0].grad) is Tensor


def case_a_device_that_disappears_in_a_backward_pass() -> None:
    offloaded, _ = taking(WIDE)
    train(offloaded, range(1))
    offloaded.zero_grad()
    sim.lose(5)
    with pytest.raises(RuntimeError, match="lost"):
        train(offloaded, range(1, 2))
    sim.find_again()


def case_gradients_that_were_lost_are_not_stepped_with() -> None:
    """Neither with what the memory had before; after another pass all is well."""
    offloaded, alone = taking(WIDE)
    for opt in (offloaded, alone):
        train(opt, range(2))
        opt.zero_grad()
    with sim.holding():
        backward(offloaded, 2)
        sim.lose(0)
        with pytest.raises(RuntimeError, match="lost"):
            offloaded.step()
        sim.find_again()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"lost on its way.*accepted: zero_grad\(set_to_none=True\)"):
                offloaded.step()
        with pytest.raises(RuntimeError, match="lost on its way"):
            backward(offloaded, 2)
        offloaded.zero_grad()
        backward(offloaded, 2)
        offloaded.step()
    backward(alone, 2)
    alone.step()
    sim.clear_races()
    assert_same_bits(values(offloaded), values(alone))


def case_gradients_with_a_graph_stay() -> None:
    found = []
    for offload_gradients in (False, True):
        weight = Parameter(torch.full((8, 128), 0.5, device="sim"))
        opt = AdamW8bit([weight], offload="cpu", offload_gradients=offload_gradients)
        (weight**3).sum().backward(create_graph=True)
        assert weight.grad is not None
        total = weight.square().sum() + weight.grad.square().sum()
        found.append(torch.autograd.grad(total, weight)[0].cpu())
        opt.step()
        found.append(weight.detach().cpu())
    assert_same_bits(found[:2], found[2:])


def case_other_parameters_of_the_same_length_are_watched_instead() -> None:
    old, new = (Parameter(torch.ones(64, 128, device="sim")) for _ in range(2))
    opt = AdamW8bit([old], offload="cpu", offload_gradients=True)
    opt.param_groups[0]["params"] = [new]
    for _ in range(2):
        old.grad = new.grad = None
        ((old + new) * 0.5).sum().backward()
        opt.step()
    assert type(old.grad) is Tensor
    assert isinstance(new.grad, HostGradient)


def case_memory_of_prepared_parameters_does_not_grow() -> None:
    """Passes that use different parameters cut each at other places, and bring it to other places of the buffers."""
    shapes = tuple(Shape(str(index), (8 + index, 130), True) for index in range(12))
    offloaded, alone = taking(shapes, bucket=2.0**-8)
    sizes = []
    with mock.patch.object(prepared, "MOST_PIECES", 5):
        for step in range(16):
            for opt in (offloaded, alone):
                opt.zero_grad()
                for index, param in enumerate(params_of(opt)):
                    if (index * 7 + step) % 3:
                        (param * 0.5).sum().backward()
                opt.step()
            sizes.append(max(len(of_one._caches) for of_one in offloaded._stepper._prepared.values()))
    assert max(sizes) == 5, sizes
    assert_equal(offloaded, alone)


def case_without_pinned_memory() -> None:
    offloaded, alone = taking()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        grads = sim.limit_pinned
        for step in range(2):
            opt_step = step
            total = torch.stack(
                [
                    (param * gradient(torch.empty(param.shape), 0, index, opt_step).to("sim")).sum()
                    for index, param in enumerate(params_of(offloaded))
                ]
            ).sum()
            grads(0)
            total.backward()
            offloaded.step()
            grads(None)
            offloaded.zero_grad()
    train(alone, range(2))
    assert_equal(offloaded, alone)
    assert len([warning for warning in seen if "pinned" in str(warning.message)]) == 1
