"""CPU offload on the simulated device (tests/sim_device): cases for a process that has it; each asserts."""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, offload
from tests import sim_device as sim
from tests.cases import (
    DTYPES,
    FEW,
    OTHER_GRADIENTS,
    SHAPES,
    Shape,
    assert_same_bits,
    copied,
    differ,
    gradient,
    make_params,
    params_of,
    tensors_held,
)

BUCKET = 2.0**-6
"""MiB: a few thousand elements, so that a step takes several turns of each buffer, and cuts parameters."""
STEPS = 50
UPDATES: tuple[dict[str, Any], ...] = (
    {"low_precision_update": "stochastic"},
    {"low_precision_update": "nearest"},
    {"low_precision_update": "split"},
    {"low_precision_update": "split", "master_bits": 24},
    {"low_precision_update": "fp32"},
)
CUT = (*FEW[:2], Shape("bias", (100,), False))
WIDE = (Shape("wide", (64, 1024), True), Shape("tall", (1024, 48), True), Shape("bias", (100,), False))


# ---------------------------------------------------------------- an offloaded optimizer and one on the host


def on_device(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().to("sim")) for param in params]


def optimizer(params: list[Parameter], **keywords: Any) -> AdamW8bit:
    half = len(params) // 2
    groups: list[dict[str, Any]] = [
        {"params": params[:half]},
        {"params": params[half:], "lr": 3e-3, "betas": (0.8, 0.99)},
    ]
    return AdamW8bit(groups, lr=1e-2, **keywords)


def pair(
    shapes: tuple[Shape, ...] = FEW, dtype: torch.dtype = torch.float32, bucket: float = BUCKET, **keywords: Any
) -> tuple[AdamW8bit, AdamW8bit]:
    """An offloaded optimizer of parameters on the device, and the same of parameters on the host."""
    params = make_params(shapes, dtype)
    offloaded = optimizer(on_device(params), offload="cpu", bucket_cap_mb=bucket, **keywords)
    return offloaded, optimizer(params, **keywords)


def set_gradients(opt: AdamW8bit, step: int, spoil: Callable[[int, Tensor], Tensor] = lambda _, grad: grad) -> None:
    """On the device they come about in its own stream, and may not be there yet when this returns."""
    for index, param in enumerate(params_of(opt)):
        host = torch.empty(param.shape, dtype=param.dtype)
        grad = spoil(index, gradient(host, 0, index, step))
        if param.device.type == "sim":
            grad = grad.pin_memory().to("sim", non_blocking=True)
        param.grad = grad if param.requires_grad else None


def take(opt: AdamW8bit, steps: range, **keywords: Any) -> None:
    for step in steps:
        set_gradients(opt, step, **keywords)
        opt.step()
        opt.zero_grad()


def values(opt: AdamW8bit) -> list[Tensor]:
    """Parameters as a forward pass would read them: on the device's own stream, without another wait."""
    return [(param.detach() * 1).cpu() if param.device.type == "sim" else copied(param) for param in params_of(opt)]


def assert_equal(offloaded: AdamW8bit, alone: AdamW8bit, where: str = "") -> None:
    assert_same_bits(values(offloaded), values(alone), f"{where} parameters")
    assert_same_bits(copied(offloaded.state_dict()), copied(alone.state_dict()), f"{where} state")
    assert all(tensor.is_cpu for tensor in tensors_held(offloaded))
    # Of a tensor with gaps the device sees from the first to the last byte: parts of one would seem to overlap.
    if all(param.is_contiguous() for param in params_of(offloaded)):
        assert not sim.races(), sim.races()
    sim.clear_races()


@contextlib.contextmanager
def random_delays() -> Iterator[None]:
    for direction in sim.DIRECTIONS:
        sim.set_delay(direction, random_seconds=2e-4, seed=1)
    try:
        yield
    finally:
        for direction in sim.DIRECTIONS:
            sim.set_delay(direction)


# ---------------------------------------------------------------- the same bits


def same_bits(dtype: torch.dtype) -> None:
    updates = UPDATES if dtype != torch.float32 else UPDATES[:1]
    for moments, update in itertools.product(("8bit", "32bit", "bnb8bit"), updates):
        offloaded, alone = pair(CUT, dtype, moments=moments, **update)
        with random_delays():
            take(offloaded, range(STEPS - 5))
        with sim.holding():
            take(offloaded, range(STEPS - 5, STEPS))
        take(alone, range(STEPS))
        assert_equal(offloaded, alone, f"{moments}, {update}:")


def case_float32_has_the_bits_of_a_step_on_the_host() -> None:
    same_bits(torch.float32)


def case_bfloat16_has_the_bits_of_a_step_on_the_host() -> None:
    same_bits(torch.bfloat16)


def case_float16_has_the_bits_of_a_step_on_the_host() -> None:
    same_bits(torch.float16)


def case_every_shape_and_memory_format() -> None:
    # The smallest buckets hold less than a block, of which each then goes alone: thousands for the larger shapes.
    for dtype, (shapes, bucket) in itertools.product(DTYPES, ((FEW, 2.0**-12), (SHAPES, BUCKET), (SHAPES, 64.0))):
        offloaded, alone = pair(shapes, dtype, bucket)
        for opt in (offloaded, alone):
            take(opt, range(3))
        assert_equal(offloaded, alone, f"{dtype}, buckets of {bucket} MiB:")


if OTHER_GRADIENTS:

    def case_float32_gradients_of_bfloat16_parameters() -> None:
        offloaded, alone = pair(dtype=torch.bfloat16)
        for opt in (offloaded, alone):
            for step in range(3):
                set_gradients(opt, step)
                for param in params_of(opt):
                    wide = param.grad.float() * 1.001  # type: ignore[union-attr]
                    param.grad = None
                    param.grad_dtype = None
                    param.grad = wide
                opt.step()
        assert_equal(offloaded, alone)


def case_training_with_clipping_schedules_frozen_and_late_parameters() -> None:
    offloaded, alone = pair(SHAPES, nonfinite="skip")
    for opt in (offloaded, alone):
        params_of(opt)[0].requires_grad_(False)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        for step in range(8):
            if step == 3:
                params_of(opt)[0].requires_grad_(True)
            if step == 5:
                late = [Parameter(p.to(params_of(opt)[0].device)) for p in make_params(WIDE[:1], seed=9)]
                opt.add_param_group({"params": late, "lr": 1e-3})
            set_gradients(opt, step)
            params_of(opt)[step].grad = None
            norm = opt.clip_grad_norm_(0.5)
            assert float(norm) > 0.5
            opt.step()
            schedule.step()
            opt.zero_grad(set_to_none=step % 2 == 0)
    # The simulated device sums a norm as the CPU does, so steps that clip are the same to the bit as well.
    assert [group["lr"] for group in offloaded.param_groups] == [group["lr"] for group in alone.param_groups]
    assert_equal(offloaded, alone)


def case_accumulated_gradients() -> None:
    """The second backward pass adds to what the first one left on the device."""
    weights = make_params(WIDE[:1])[0]
    results = []
    for device in ("sim", "cpu"):
        weight = Parameter(weights.detach().to(device))
        opt = AdamW8bit([weight], lr=1e-2, offload="cpu", bucket_cap_mb=BUCKET)
        for step in range(4):
            for batch in range(2):
                (weight * gradient(weights, 1, batch, step).to(device)).sum().backward()
            opt.step()
            opt.zero_grad()
        results.append(values(opt))
    assert_same_bits(results[0], results[1])


def case_gradients_that_are_not_finite() -> None:
    def spoil(index: int, grad: Tensor) -> Tensor:
        if index == 1:
            grad.view(-1)[5] = torch.nan
        return grad

    for nonfinite in ("skip", "propagate"):
        offloaded, alone = pair(nonfinite=nonfinite)
        for opt in (offloaded, alone):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                take(opt, range(3), spoil=spoil)
        assert_equal(offloaded, alone, nonfinite)
        assert offloaded.stats() == alone.stats() == {"skipped_blocks": 3 if nonfinite == "skip" else 0}
    offloaded, _ = pair(nonfinite="error")
    before = values(offloaded)
    set_gradients(offloaded, 0, spoil)
    with pytest.raises(ValueError, match="1 of"):
        offloaded.step()
    assert_same_bits(values(offloaded), before)
    assert not offloaded.state


def case_gradient_scaler() -> None:
    offloaded, alone = pair(CUT)
    for opt in (offloaded, alone):
        scaler = torch.amp.GradScaler(params_of(opt)[0].device.type, init_scale=1024.0)
        for step in range(4):
            scale = float(scaler.scale(torch.ones((), device=params_of(opt)[0].device)))
            set_gradients(opt, step, lambda _, grad: grad * (torch.inf if step == 1 else scale))  # noqa: B023
            if step > 1:
                scaler.unscale_(opt)
                opt.clip_grad_norm_(1e3)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        assert scaler.get_scale() == 512.0
    assert_equal(offloaded, alone)
    assert all(int(state["step"]) == 3 for state in offloaded.state.values())


# ---------------------------------------------------------------- what changes between steps


def case_parameters_loaded_after_construction_are_what_is_stepped() -> None:
    for update in UPDATES:
        offloaded, alone = pair(dtype=torch.bfloat16, **update)
        for opt in (offloaded, alone):
            take(opt, range(2))
            others = make_params(FEW, torch.bfloat16, seed=5)
            with torch.no_grad():
                for index, (param, other) in enumerate(zip(params_of(opt), others, strict=True)):
                    (param.data if index % 2 else param).copy_(other * 3)
            take(opt, range(2, 4))
        assert_equal(offloaded, alone, str(update))


def case_parameters_moved_to_another_device_and_back() -> None:
    offloaded, alone = pair()
    for device in ("sim", "cpu", "sim"):
        for param in params_of(offloaded):
            torch.utils.swap_tensors(param, Parameter(param.detach().to(device)))
        for opt in (offloaded, alone):
            take(opt, range(2))
        assert_equal(offloaded, alone, device)


def case_parameters_of_another_dtype() -> None:
    offloaded, alone = pair()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for opt in (offloaded, alone):
            for param in params_of(opt):
                param.data = param.data.to(dtype)
            take(opt, range(2))
        assert_equal(offloaded, alone, str(dtype))


def case_parameters_of_the_host_and_of_the_device_together() -> None:
    params = make_params(SHAPES)
    mixed = [Parameter(p.detach().to("sim" if index % 2 else "cpu")) for index, p in enumerate(params)]
    offloaded = optimizer(mixed, offload="cpu", bucket_cap_mb=BUCKET)
    alone = optimizer(params)
    for opt in (offloaded, alone):
        take(opt, range(3))
    assert_equal(offloaded, alone)


def case_saved_and_loaded_with_offload_and_without() -> None:
    """A checkpoint does not say where moments lay."""
    straight = optimizer(make_params(FEW))
    take(straight, range(4))
    for writer, reader in itertools.product(("sim", "cpu"), repeat=2):
        made = []
        for device in (writer, reader):
            params = make_params(FEW)
            made.append(optimizer(on_device(params) if device == "sim" else params, offload="cpu"))
        take(made[0], range(2))
        saved = copied(made[0].state_dict())
        with torch.no_grad():
            for param, value in zip(params_of(made[1]), values(made[0]), strict=True):
                param.copy_(value)
        made[1].load_state_dict(saved)
        take(made[1], range(2, 4))
        assert_equal(made[1], straight, f"{writer} to {reader}")


def case_state_that_was_sent_to_the_device_comes_back() -> None:
    """Lightning sends all state but "step" there, when it is made and after a load."""
    offloaded, alone = pair()
    take(offloaded, range(2))
    take(alone, range(2))
    for state in offloaded.state.values():
        state.update({key: value.to("sim") for key, value in state.items() if key != "step"})
    take(offloaded, range(2, 4))
    take(alone, range(2, 4))
    assert all(value.is_cpu for value in tensors_held(offloaded))
    assert_equal(offloaded, alone)


def case_master_weight_of_a_parameter_on_the_device() -> None:
    for update in UPDATES:
        offloaded, alone = pair(dtype=torch.bfloat16, **update)
        for opt in (offloaded, alone):
            take(opt, range(2))
        for there, here in zip(params_of(offloaded), params_of(alone), strict=True):
            weight = offloaded.master_weight(there)
            assert weight.device.type == "sim"
            assert_same_bits(weight.cpu(), alone.master_weight(here))


# ---------------------------------------------------------------- waits


def stale(break_it: mock._patch[Any]) -> bool:
    """Whether anything shows of a wait that is left out: other bits, or two streams at the same bytes."""
    offloaded, alone = pair(WIDE)
    take(alone, range(4))
    with break_it, sim.holding():
        take(offloaded, range(4))
        after = values(offloaded)
    raced = bool(sim.races())
    sim.clear_races()
    return raced or differ(after, values(alone))


def case_nothing_shows_where_every_wait_is_there() -> None:
    assert not stale(mock.patch.object(offload, "ALIGNMENT", offload.ALIGNMENT))


def case_a_gradient_read_before_its_event_shows() -> None:
    assert stale(mock.patch.object(offload.Passage, "wait", return_value=None))


def case_a_parameter_used_before_its_copy_back_shows() -> None:
    assert stale(mock.patch.object(offload.Lane, "join", return_value=None))


def case_a_gradient_copied_before_it_is_computed_shows() -> None:
    assert stale(mock.patch.object(offload.Lane, "follow", return_value=None))


def case_a_buffer_used_again_too_early_shows() -> None:
    send_back = offload.Passage.send_back

    def forgets(self: offload.Passage) -> None:
        send_back(self)
        self._slot.sent = None

    assert stale(mock.patch.object(offload.Passage, "send_back", forgets))


def case_the_host_does_not_wait_for_parameters_to_arrive() -> None:
    """A step returns while they are on their way: nothing but the device's own stream waits."""
    offloaded, alone = pair(WIDE, bucket=64.0)
    take(alone, range(1))
    with sim.holding():
        take(offloaded, range(1))
        on_their_way = [copy for copy in sim.copies() if copy.direction == "to_device" and copy.end is None]
        assert len(on_their_way) >= len(WIDE)
        assert_same_bits(values(offloaded), values(alone))


# ---------------------------------------------------------------- memory


def case_memory() -> None:
    """2.05 bytes a parameter on the host, none on the device, and pinned two buckets."""
    shapes = (Shape("matrix", (1024, 1024), True), Shape("another", (512, 2048), True))
    for dtype in DTYPES:
        bucket = 2.0**-2
        offloaded, _ = pair(shapes, dtype, bucket)
        set_gradients(offloaded, 0)
        torch.accelerator.synchronize()
        gc.collect()
        sim.reset_peaks()
        before, pinned = sim.device_bytes(), sim.pinned_bytes()
        offloaded.step()
        torch.accelerator.synchronize()
        assert sim.peak_device_bytes() == before
        assert 0 < sim.peak_pinned_bytes() - pinned <= 2 * bucket * 2**20
        report = offloaded.memory_report()
        assert report["bytes_per_parameter"] <= 2.05
        assert report["pinned_bytes"] == sim.pinned_bytes() - pinned


def case_bytes_over_the_bus() -> None:
    """Gradient and parameter down, parameter up: nothing else."""
    offloaded, _ = pair(WIDE, torch.bfloat16)
    take(offloaded, range(1))
    set_gradients(offloaded, 1)
    torch.accelerator.synchronize()
    sim.clear_log()
    offloaded.step()
    torch.accelerator.synchronize()
    numel = sum(param.numel() for param in params_of(offloaded))
    sums = {way: sum(copy.bytes for copy in sim.copies() if copy.direction == way) for way in sim.DIRECTIONS}
    assert sums == {"to_host": 4 * numel, "to_device": 2 * numel}


# ---------------------------------------------------------------- faults


def case_without_pinned_memory_it_goes_on_and_says_so() -> None:
    offloaded, alone = pair()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(3):
            set_gradients(offloaded, step)
            sim.limit_pinned(0)
            offloaded.step()
            sim.limit_pinned(None)
    take(alone, range(3))
    assert_equal(offloaded, alone)
    said = [str(warning.message) for warning in seen if "pinned" in str(warning.message)]
    assert len(said) == 1, said
    assert "smaller bucket_cap_mb" in said[0]


def case_a_device_that_disappears_is_an_error() -> None:
    for after in (0, 3, 9):
        offloaded, _ = pair()
        take(offloaded, range(1))
        set_gradients(offloaded, 1)
        torch.accelerator.synchronize()
        sim.lose(after)
        with pytest.raises(RuntimeError, match="lost"):
            offloaded.step()
        sim.find_again()


def case_one_thread_is_warned_of_once() -> None:
    offloaded, _ = pair()
    with mock.patch("lowmem_adam.cores.usable_cores", return_value=8), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        take(offloaded, range(2))
    said = [str(warning.message) for warning in seen if "one thread of 8" in str(warning.message)]
    assert len(said) == 1
    for words in ("set_threads()", "OMP_NUM_THREADS=8", "--num_cpu_threads_per_process 8", "torch.set_num_threads(8)"):
        assert words in said[0]
