"""``step_in_backward`` with offload on the simulated device: cases for a process that has it; each asserts."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from lowmem_adam import AdamW8bit, in_backward, offload, step_in_backward, updating
from lowmem_adam.stand_ins import HostGradient
from tests import sim_device as sim
from tests.cases import DTYPES, FEW, SHAPES, Shape, assert_same_bits, copied, differ, gradient, make_params, params_of
from tests.host_gradient_cases import all_taken, backward, taking
from tests.host_gradient_fault_cases import peaks_of_passes
from tests.offload_cases import BUCKET, CUT, UPDATES, WIDE, on_device, optimizer, random_delays, values


def model_of(opt: AdamW8bit) -> nn.Module:
    return nn.ParameterList(params_of(opt))


def both(
    shapes: tuple[Shape, ...] = FEW, dtype: torch.dtype = torch.float32, bucket: float = BUCKET, **keywords: Any
) -> tuple[AdamW8bit, AdamW8bit]:
    """An offloaded optimizer, and the same of parameters on the host, which is stepped as usual."""
    params = make_params(shapes, dtype)
    return optimizer(on_device(params), offload="cpu", bucket_cap_mb=bucket, **keywords), optimizer(params, **keywords)


def train(opt: AdamW8bit, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        backward(opt, step)
        opt.step()


def assert_alike(offloaded: AdamW8bit, alone: AdamW8bit, where: str = "") -> None:
    """As ``assert_equal``; states come about in another order in a backward pass."""
    keys = {key for param in params_of(alone) for key in alone.state[param]}
    for there, here in zip(params_of(offloaded), params_of(alone), strict=True):
        states = [
            {key: opt.state[p][key] for key in sorted(keys) if key in opt.state[p]}
            for opt, p in ((offloaded, there), (alone, here))
        ]
        assert_same_bits(copied(states[0]), copied(states[1]), where)
    assert_same_bits(values(offloaded), values(alone), where)
    if all(param.is_contiguous() for param in params_of(offloaded)):
        assert not sim.races(), sim.races()
    sim.clear_races()


def case_steps_have_the_bits_of_a_step_on_the_host() -> None:
    for dtype, moments in itertools.product(DTYPES, ("8bit", "32bit")):
        for update in UPDATES if dtype == torch.bfloat16 else UPDATES[:1]:
            offloaded, alone = both(CUT, dtype, moments=moments, **update)
            with step_in_backward(model_of(offloaded), offloaded):
                with random_delays():
                    train(offloaded, range(8))
                with sim.holding():
                    train(offloaded, range(8, 10))
            train(alone, range(10))
            assert_alike(offloaded, alone, f"{dtype}, {moments}, {update}")


def case_every_shape_and_memory_format() -> None:
    for shapes, bucket in ((FEW, 2.0**-12), (SHAPES, BUCKET), (SHAPES, 64.0)):
        offloaded, alone = both(shapes, torch.bfloat16, bucket)
        with step_in_backward(model_of(offloaded), offloaded):
            train(offloaded, range(3))
        train(alone, range(3))
        assert_alike(offloaded, alone, f"buckets of {bucket} MiB")


def case_without_offload_on_a_device() -> None:
    params = make_params(FEW)
    there, here = optimizer(on_device(params)), optimizer(params)
    with step_in_backward(model_of(there), there):
        train(there, range(4))
    train(here, range(4))
    assert_same_bits(values(there), values(here))


def case_parameters_of_the_host_and_of_the_device_together() -> None:
    params = make_params(SHAPES)
    mixed = [Parameter(p.detach().to("sim" if index % 2 else "cpu")) for index, p in enumerate(params)]
    offloaded, alone = optimizer(mixed, offload="cpu", bucket_cap_mb=BUCKET), optimizer(params)
    with step_in_backward(model_of(offloaded), offloaded):
        for step in range(12):
            offloaded.zero_grad()
            # Autograd has a thread for each device, and both call hooks.
            sums: dict[str, Any] = {"cpu": 0.0, "sim": 0.0}
            for index, param in enumerate(params_of(offloaded)):
                grad = gradient(torch.empty(param.shape), 0, index, step).to(param.device)
                sums[param.device.type] = sums[param.device.type] + (param * grad).sum()
            with random_delays():
                torch.autograd.backward(list(sums.values()))
            offloaded.step()
    train(alone, range(12))
    assert_alike(offloaded, alone)


def case_it_goes_before_gradients_taken_to_the_host() -> None:
    """With ``offload_gradients`` too, which takes them again when the handle is gone."""
    offloaded, alone = taking()
    handle = step_in_backward(model_of(offloaded), offloaded)
    train(offloaded, range(3))
    handle.remove()
    train(offloaded, range(3, 5))
    assert all_taken(offloaded)
    train(alone, range(5))
    assert_alike(offloaded, alone)


def case_a_pass_that_is_broken_off_is_finished() -> None:
    """What was begun is stepped whole, and whatever comes after zero_grad() finds nothing begun."""
    for bucket, follows in itertools.product((BUCKET, 64.0), ("nothing", "load", "another pass")):
        offloaded, alone = both(WIDE, bucket=bucket)
        with step_in_backward(model_of(offloaded), offloaded), sim.holding():
            last = params_of(offloaded)[0]  # gradients come in the order of the last one first

            def fail(_: Any) -> None:
                raise RuntimeError("broken off")

            hook = last.register_hook(fail)
            with pytest.raises(RuntimeError, match="broken off"):
                backward(offloaded, 0)
            hook.remove()
            offloaded.zero_grad()
            stepped = [index for index, param in enumerate(params_of(offloaded)) if param in offloaded.state]
            if follows == "load":
                with torch.no_grad():
                    for param in params_of(offloaded):
                        param.fill_(0.5)
                offloaded.state_dict()
            if follows == "another pass":
                backward(offloaded, 1)
            after = values(offloaded)
        assert stepped
        assert 0 not in stepped
        for index, param in enumerate(params_of(alone)):
            param.grad = gradient(torch.empty(param.shape), 0, index, 0) if index in stepped else None
        alone.step()
        if follows == "load":
            assert all(bool((value == 0.5).all()) for value in after)
            continue
        if follows == "another pass":
            train(alone, range(1, 2))
        assert_same_bits(after, values(alone), f"{bucket}, {follows}")
        assert not sim.races(), sim.races()


def case_gradients_that_are_made_on_several_streams() -> None:
    """Autograd runs a hook on the stream of its parameter's part of the forward pass."""
    for bucket in (BUCKET, 64.0):
        offloaded, alone = both(WIDE, bucket=bucket)
        other = torch.Stream(device="sim")
        params = params_of(offloaded)
        grads = [gradient(torch.empty(param.shape), 0, index, 0) for index, param in enumerate(params)]
        with step_in_backward(model_of(offloaded), offloaded):
            torch.accelerator.synchronize()
            with sim.holding():
                sums = []
                for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                    there = grad.pin_memory().to("sim", non_blocking=True)
                    there.record_stream(other)
                    other.wait_event(torch.accelerator.current_stream().record_event())
                    with other if index % 2 else contextlib.nullcontext():
                        sums.append((param * there).sum())
                torch.accelerator.current_stream().wait_event(other.record_event())
                torch.stack(sums).sum().backward()
                after = values(offloaded)
        assert not sim.races(), sim.races()
        for param, grad in zip(params_of(alone), grads, strict=True):
            param.grad = grad
        alone.step()
        assert_same_bits(after, values(alone), str(bucket))


def case_host_gradients_of_another_model_are_kept_while_it_steps() -> None:
    """One optimizer of two models: what one of them has left in the buffers, and adds, does not get lost."""
    for added in (False, True):
        offloaded, alone = taking(WIDE)
        first, rest = params_of(offloaded)[:1], params_of(offloaded)[1:]
        grads = [gradient(torch.empty(param.shape), 0, index, 0) for index, param in enumerate(params_of(offloaded))]

        def run(params: list[Any], start: int, grads: list[Any] = grads) -> None:
            torch.stack([(p * grads[start + i].to(p.device)).sum() for i, p in enumerate(params)]).sum().backward()

        run(rest, 1)
        with step_in_backward(nn.ParameterList(first), offloaded):
            for _ in range(2 if added else 0):
                run(rest, 1)
            run(first, 0)
            offloaded.step()
        for index, param in enumerate(params_of(alone)):
            times = 3 if added and index else 1
            total = grads[index]
            for _ in range(times - 1):
                total = total + grads[index]
            param.grad = total
        alone.step()
        assert_alike(offloaded, alone)


# ---------------------------------------------------------------- waits


def stale(break_it: contextlib.AbstractContextManager[Any]) -> bool:
    """Whether anything shows of a wait that is left out: other bits, or two streams at the same bytes."""
    offloaded, alone = both(WIDE)
    train(alone, range(4))
    with break_it, sim.holding(), step_in_backward(model_of(offloaded), offloaded):
        for step in range(4):
            offloaded.zero_grad()
            backward(offloaded, step)  # what follows it may read parameters: nobody need call step() before
        after = values(offloaded)
    raced = bool(sim.races())
    sim.clear_races()
    return raced or differ(after, values(alone))


def case_nothing_shows_where_every_wait_is_there() -> None:
    assert not stale(contextlib.nullcontext())


def case_a_gradient_read_before_its_event_shows() -> None:
    assert stale(mock.patch.object(offload.Passage, "wait", return_value=None))


def case_a_parameter_used_before_its_copy_back_shows() -> None:
    assert stale(mock.patch.object(offload.Lane, "join", return_value=None))


def case_a_gradient_copied_before_it_is_computed_shows() -> None:
    assert stale(mock.patch.object(offload.Lane, "follow", return_value=None))


def case_a_pass_whose_end_is_not_waited_for_shows() -> None:
    finish = in_backward.StepInBackward._finish

    def late(self: in_backward.StepInBackward, flow: updating.Flow) -> None:
        with mock.patch.object(updating.Flow, "finish", return_value=None):
            finish(self, flow)

    assert stale(mock.patch.object(in_backward.StepInBackward, "_finish", late))


# ---------------------------------------------------------------- memory


def case_gradients_are_never_there_together() -> None:
    layers, size = 16, 64 * 256 * 4
    bucket = 2 * size  # a buffer takes a parameter
    params = [Parameter(torch.full((64, 256), float(i), device="sim")) for i in range(layers)]
    opt = AdamW8bit(params, offload="cpu", bucket_cap_mb=bucket / 2**20)
    with step_in_backward(nn.ParameterList(params), opt):
        most = max(device for device, _ in peaks_of_passes(opt, params))
    assert most <= 2 * bucket + 4 * size, most
    assert min(device for device, _ in peaks_of_passes(opt, params)) >= layers * size


# ---------------------------------------------------------------- DTensors, as FSDP2 has them


@contextlib.contextmanager
def one_rank() -> Any:
    """A process group of one rank that sends nothing: gloo takes no tensors of the simulated device."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("sim", (1,))
    finally:
        dist.destroy_process_group()


def case_dtensors_are_taken_as_fsdp2_hands_them_over() -> None:
    """It adds to the local part of a gradient, and calls the hooks of parameters itself."""
    shapes = WIDE[:2]
    with one_rank() as mesh:
        alone = optimizer(make_params(shapes))
        params = [Parameter(DTensor.from_local(p, mesh, [Shard(0)])) for p in on_device(make_params(shapes))]
        opt = optimizer(params, offload="cpu", offload_gradients=True, bucket_cap_mb=BUCKET)
        for step, batch in itertools.product(range(3), range(2)):
            for index, param in enumerate(params):
                new = gradient(torch.empty(param.shape), batch, index, step)
                here = params_of(alone)[index]
                here.grad = new if batch == 0 else here.grad + new  # type: ignore[operator]
                there = new.pin_memory().to("sim", non_blocking=True)
                if batch == 0:
                    param.grad = DTensor.from_local(there, mesh, [Shard(0)])
                else:
                    param.grad._local_tensor += there  # type: ignore[union-attr]
                for hook in param._post_accumulate_grad_hooks.values():
                    hook(param)
                assert isinstance(param.grad._local_tensor, HostGradient)  # type: ignore[union-attr]
            if batch == 1:
                norms = [nn.utils.clip_grad_norm_(params_of(o), 0.5) for o in (opt, alone)]
                assert float(norms[0].full_tensor()) == float(norms[1])  # type: ignore[attr-defined]
                opt.step()
                alone.step()
                opt.zero_grad()
                alone.zero_grad()
        for param, here in zip(params, params_of(alone), strict=True):
            assert_same_bits(param.detach()._local_tensor.cpu(), here.detach())  # type: ignore[attr-defined]


def case_gradients_of_dtensors_that_have_a_graph_stay() -> None:
    with one_rank() as mesh:
        for way in ("offload_gradients", "step_in_backward"):
            param: Any = Parameter(DTensor.from_local(torch.full((8, 128), 0.5, device="sim"), mesh, [Shard(0)]))
            opt = AdamW8bit([param], offload="cpu", offload_gradients=way == "offload_gradients")
            if way == "step_in_backward":
                step_in_backward(nn.ParameterList([param]), opt)
            (param**3).sum().full_tensor().backward(create_graph=True)
            grad: Any = param.grad
            assert type(grad._local_tensor) is torch.Tensor, way
            penalty: Any = torch.autograd.grad(grad.square().sum().full_tensor(), param)[0]
            assert bool((penalty.full_tensor() == 2 * 3 * 0.5**2 * 6 * 0.5).all()), way
            assert not opt.state
