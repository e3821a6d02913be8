"""``offload_gradients`` on the simulated device (tests/sim_device): cases for a process that has it; each asserts."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, host_gradients, offload
from lowmem_adam.stand_ins import HostGradient
from tests import sim_device as sim
from tests.cases import (
    DTYPES,
    FEW,
    SHAPES,
    Shape,
    assert_same_bits,
    copied,
    differ,
    gradient,
    make_params,
    params_of,
)
from tests.offload_cases import BUCKET, CUT, WIDE, assert_equal, on_device, optimizer, random_delays, values


def taking(
    shapes: tuple[Shape, ...] = FEW, dtype: torch.dtype = torch.float32, bucket: float = BUCKET, **keywords: Any
) -> tuple[AdamW8bit, AdamW8bit]:
    """An optimizer that takes gradients to the host, and the same of parameters on the host."""
    params = make_params(shapes, dtype)
    where: dict[str, Any] = {"offload": "cpu", "offload_gradients": True, "bucket_cap_mb": bucket}
    return optimizer(on_device(params), **where, **keywords), optimizer(params, **keywords)


def backward(opt: AdamW8bit, step: int, batch: int = 0, factor: float = 1.0) -> None:
    """A pass whose gradients are those of tests.cases, times a factor; they come about on the device's own stream."""
    total = None
    for index, param in enumerate(params_of(opt)):
        if not param.requires_grad:
            continue
        host = gradient(torch.empty(param.shape, dtype=param.dtype), batch, index, step) * factor
        grad = host.pin_memory().to("sim", non_blocking=True) if param.device.type == "sim" else host
        part = (param * grad).sum().float()
        total = part if total is None else total + part
    assert total is not None
    total.backward()


def train(opt: AdamW8bit, steps: range, batches: int = 1, **keywords: Any) -> None:
    for step in steps:
        opt.zero_grad()
        for batch in range(batches):
            backward(opt, step, batch, **keywords)
        opt.step()


def all_taken(opt: AdamW8bit) -> bool:
    return all(
        isinstance(param.grad, HostGradient) for param in params_of(opt) if param.grad is not None and param.numel()
    )


# ---------------------------------------------------------------- the same bits


def case_steps_have_the_bits_of_gradients_on_the_host() -> None:
    for dtype, moments, batches in itertools.product(DTYPES, ("8bit", "32bit"), (1, 3)):
        offloaded, alone = taking(CUT, dtype, moments=moments)
        with random_delays():
            train(offloaded, range(10), batches)
        with sim.holding():
            train(offloaded, range(10, 12), batches)
        assert all_taken(offloaded)
        train(alone, range(12), batches)
        assert_equal(offloaded, alone, f"{dtype}, {moments}, {batches} batches:")


def case_every_shape_and_memory_format() -> None:
    for dtype, (shapes, bucket) in itertools.product(DTYPES, ((FEW, 2.0**-12), (SHAPES, BUCKET), (SHAPES, 64.0))):
        offloaded, alone = taking(shapes, dtype, bucket)
        for opt in (offloaded, alone):
            train(opt, range(3), batches=2)
        assert_equal(offloaded, alone, f"{dtype}, buckets of {bucket} MiB:")


def case_clipping_by_ours_and_by_torch() -> None:
    """Both read gradients that are on the host; torch's writes into them."""
    clips: tuple[Callable[[AdamW8bit], Tensor], ...] = (
        lambda opt: opt.clip_grad_norm_(0.5),
        lambda opt: torch.nn.utils.clip_grad_norm_(params_of(opt), 0.5),
    )
    for clip, batches in itertools.product(clips, (1, 2)):
        offloaded, alone = taking()
        norms = []
        for opt in (offloaded, alone):
            for step in range(4):
                for batch in range(batches):
                    backward(opt, step, batch)
                norms.append(float(clip(opt)))
                opt.step()
                opt.zero_grad()
        assert norms[:4] == norms[4:]
        assert min(norms) > 0.5
        assert_equal(offloaded, alone)


def case_gradient_scaler() -> None:
    """With unscale_ and without, and a step that is left out for an infinity."""
    for unscale in (True, False):
        offloaded, alone = taking(CUT)
        for opt in (offloaded, alone):
            scaler = torch.amp.GradScaler(params_of(opt)[0].device.type, init_scale=1024.0)
            for step in range(4):
                scale = float(scaler.scale(torch.ones((), device=params_of(opt)[0].device)))
                backward(opt, step, factor=torch.inf if step == 1 else scale)
                if unscale:
                    scaler.unscale_(opt)
                    opt.clip_grad_norm_(1e3)
                scaler.step(opt)
                scaler.update()
                opt.zero_grad()
            assert scaler.get_scale() == 512.0
        assert_equal(offloaded, alone)
        assert all(int(state["step"]) == 3 for state in offloaded.state.values())


def case_gradients_set_to_zero_in_place() -> None:
    offloaded, alone = taking()
    for opt in (offloaded, alone):
        for step in range(4):
            backward(opt, step)
            opt.step()
            opt.zero_grad(set_to_none=False)
    assert all_taken(offloaded)
    assert_equal(offloaded, alone)


def case_a_pass_that_is_given_up() -> None:
    """Gradients that no step has used are gone with zero_grad, also those that had not arrived."""
    offloaded, alone = taking(WIDE)
    for opt in (offloaded, alone):
        for step in range(3):
            backward(opt, 100 + step)
            for param in params_of(opt):
                param.grad = None
            if step == 1:  # plain gradients, which pass through the same buffers in the step
                for index, param in enumerate(params_of(opt)):
                    param.grad = gradient(torch.empty(param.shape), 0, index, step).to(param.device)
            else:
                backward(opt, step)
            opt.step()
            opt.zero_grad()
    assert_equal(offloaded, alone)


def case_gradients_that_are_not_finite() -> None:
    for nonfinite in ("skip", "propagate"):
        offloaded, alone = taking(nonfinite=nonfinite)
        for opt in (offloaded, alone):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(opt, range(3), factor=torch.inf)
        assert_equal(offloaded, alone, nonfinite)
        assert offloaded.stats() == alone.stats()
    offloaded, _ = taking(nonfinite="error")
    before = values(offloaded)
    with pytest.raises(ValueError, match="gradient elements are not finite"):
        train(offloaded, range(1), factor=torch.nan)
    assert_same_bits(values(offloaded), before)


def case_frozen_late_swapped_and_moved_parameters() -> None:
    offloaded, alone = taking(SHAPES)
    for opt in (offloaded, alone):
        params_of(opt)[0].requires_grad_(False)
        for step in range(8):
            if step == 2:
                params_of(opt)[0].requires_grad_(True)
            if step == 4:
                late = [Parameter(torch.ones(64, 128, device=params_of(opt)[0].device))]
                opt.add_param_group({"params": late, "lr": 1e-3})
            if step == 6:
                for param in params_of(opt):
                    torch.utils.swap_tensors(param, Parameter(param.detach().clone()))
            backward(opt, step)
            opt.step()
            # torch.utils.swap_tensors takes the hooks away, for good. Gradients stay on the device then.
            assert opt is alone or step >= 6 or all_taken(opt)
            opt.zero_grad()
    assert_equal(offloaded, alone)
    for device in ("cpu", "sim"):
        for param in params_of(offloaded):
            torch.utils.swap_tensors(param, Parameter(param.detach().to(device)))
        for opt in (offloaded, alone):
            train(opt, range(3))
        assert_equal(offloaded, alone, device)


def case_a_model_that_is_moved_between_backward_and_step() -> None:
    """Its gradients go with it, from wherever they are."""
    offloaded, alone = taking()
    model = torch.nn.ParameterList(params_of(offloaded))
    for opt in (offloaded, alone):
        backward(opt, 0)
        if opt is offloaded:
            model.to("cpu")
            model.to("sim")
        opt.step()
        opt.zero_grad()
    assert_equal(offloaded, alone)


def case_checkpoints_and_copies() -> None:
    offloaded, alone = taking()
    for opt in (offloaded, alone):
        train(opt, range(2))
        opt.load_state_dict(copied(opt.state_dict()))
        opt.zero_grad()
        backward(opt, 2)
    assert all_taken(offloaded)
    for opt in (offloaded, alone):
        opt.step()
    assert_equal(offloaded, alone)
    both = [copy.deepcopy(opt) for opt in (offloaded, alone)]
    for opt in both:
        train(opt, range(3, 5))
    assert all_taken(both[0])
    assert_equal(both[0], both[1])


# ---------------------------------------------------------------- what stands in param.grad


def case_what_stands_there_answers_as_the_gradient() -> None:
    offloaded, alone = taking(dtype=torch.bfloat16)
    for opt in (offloaded, alone):
        backward(opt, 0)
    for there, here in zip(params_of(offloaded), params_of(alone), strict=True):
        grad, expected = there.grad, here.grad
        assert grad is not None
        assert expected is not None
        assert (grad.device.type, grad.dtype, grad.shape) == ("sim", expected.dtype, expected.shape)
        assert grad.norm().device.type == "sim"
        assert_same_bits(grad.cpu(), expected)
        assert_same_bits((grad * 2).cpu(), expected * 2)
        assert_same_bits(grad.to(torch.float32).cpu(), expected.float())
        assert_same_bits(copy.deepcopy(grad).cpu(), expected)
        for tensor in (grad, expected):
            tensor.t()[:1].zero_() if tensor.ndim == 2 else tensor.zero_()
        grad.add_(torch.ones_like(expected).to("sim"), alpha=0.5)
        expected.add_(torch.ones_like(expected), alpha=0.5)
        out = torch.empty_like(there)
        assert torch.mul(grad, 3.0, out=out) is out
        assert_same_bits(out.cpu(), expected * 3)
        assert "HostGradient" in repr(grad)
        assert grad.tolist() == expected.tolist()
        stored = io.BytesIO()
        torch.save(grad, stored)
        stored.seek(0)
        assert_same_bits(torch.load(stored, weights_only=True).cpu(), expected)
    for opt in (offloaded, alone):
        opt.step()
    assert_equal(offloaded, alone)


def case_a_gradient_that_somebody_keeps_is_not_written_over() -> None:
    offloaded, _ = taking()
    backward(offloaded, 0)
    kept = [param.grad for param in params_of(offloaded)]
    viewed = kept[0].view(-1)[1:]  # type: ignore[union-attr]
    expected = [grad.cpu() for grad in kept]  # type: ignore[union-attr]
    kept[0] = None  # but for the view
    offloaded.zero_grad()
    backward(offloaded, 1)
    for grad, before in zip(kept[1:], expected[1:], strict=True):
        assert grad is not None
        assert_same_bits(grad.cpu(), before)
    assert_same_bits(viewed.cpu(), expected[0].view(-1)[1:])


def case_memory_is_used_again() -> None:
    offloaded, _ = taking()
    addresses = []
    for step in range(3):
        train(offloaded, range(step, step + 1))
        addresses.append([param.grad.values().data_ptr() for param in params_of(offloaded)])  # type: ignore[union-attr]
    assert addresses[0] == addresses[1] == addresses[2]
    numel = sum(param.numel() for param in params_of(offloaded))
    assert offloaded.memory_report()["gradient_bytes"] == 4 * numel


# ---------------------------------------------------------------- waits


def stale(break_it: Any) -> bool:
    """Whether anything shows of a wait that is left out: other bits, or two streams at the same bytes."""
    offloaded, alone = taking(WIDE)
    train(alone, range(3), batches=2)
    with break_it, sim.holding():
        train(offloaded, range(3), batches=2)
        after = values(offloaded)
    raced = bool(sim.races())
    sim.clear_races()
    return raced or differ(after, values(alone))


def case_nothing_shows_where_every_wait_is_there() -> None:
    assert not stale(contextlib.nullcontext())


def case_a_gradient_taken_before_it_is_computed_shows() -> None:
    follow = offload.Lane.follow

    def follows_in_steps_only(self: offload.Lane) -> None:
        if not taking_now:
            follow(self)

    taking_now: list[int] = []
    take = host_gradients.Descent.take

    def mark(self: host_gradients.Descent, *args: Any, **keywords: Any) -> None:
        taking_now.append(1)
        take(self, *args, **keywords)
        taking_now.pop()

    with mock.patch.object(host_gradients.Descent, "take", mark):
        assert stale(mock.patch.object(offload.Lane, "follow", follows_in_steps_only))


def case_a_gradient_read_before_it_has_arrived_shows() -> None:
    assert stale(mock.patch.object(host_gradients.Descent, "settle", return_value=None))


def case_a_buffer_filled_again_before_it_is_unloaded_shows() -> None:
    def reuse(self: host_gradients.Descent, size: int) -> Any:
        if self._slot is not None and self._used + size > self._room:
            self._close()
        if self._slot is None:
            self._slot, self._used = self._lane.next_slot(), 0
            self._slot.take([self._room])
        return self._slot

    assert stale(mock.patch.object(host_gradients.Descent, "_open", reuse))


def case_memory_given_up_before_its_copy_shows() -> None:
    assert stale(mock.patch.object(Tensor, "record_stream", return_value=None))
