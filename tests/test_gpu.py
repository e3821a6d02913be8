"""On a CUDA device: the kernels, and what only such a device has: graphs, streams, memory, offload from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from lowmem_adam import AdamW8bit, step_in_backward
from lowmem_adam.kernels import reference, triton
from lowmem_adam.kernels.fragment import CodedMoments, Fragment
from lowmem_adam.layout import Layout
from tests import kernel_cases as cases
from tests.cases import DTYPES, SHAPES, assert_same_bits, generator, gradient, make_params
from tests.triton_cases import *  # noqa: F403 (the cases themselves, collected here)
from tests.triton_cases import DEVICE
from tests.triton_optimizer_cases import *  # noqa: F403
from tests.triton_optimizer_cases import FEW, results, set_gradients, there

pytestmark = pytest.mark.gpu


# ---------------------------------------------------------------- graphs


def captured(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of a step that was taken before."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def with_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    set_gradients(params, 0)
    return [param.grad for param in params if param.grad is not None]


def fill(grads: Sequence[Tensor], step: int) -> None:
    for index, grad in enumerate(grads):
        grad.copy_(gradient(torch.empty(grad.shape, dtype=grad.dtype), 0, index, step))


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_are_the_steps_that_would_have_been_taken(dtype: torch.dtype, tensor_lr: bool) -> None:
    rates = [0.01, 0.01, 0.01, 0.02, 0.005, 0.01] if tensor_lr else [0.01] * 6
    eager_params = there(make_params(SHAPES, dtype))
    eager = AdamW8bit(eager_params, lr=0.01)
    params = there(make_params(SHAPES, dtype))
    lr = torch.tensor(0.01, dtype=torch.float64, device=DEVICE) if tensor_lr else 0.01
    opt = AdamW8bit(params, lr=lr, capturable=True)
    grads, eager_grads = with_gradients(params), with_gradients(eager_params)
    graph = None
    for step, rate in enumerate(rates):
        fill(grads, step)
        fill(eager_grads, step)
        eager.param_groups[0]["lr"] = rate
        if isinstance(lr, Tensor):
            lr.fill_(rate)
        eager.step()
        if step < 2:
            opt.step()
        elif graph is None:
            before = results(opt)
            graph = captured(opt.step)
            assert_same_bits(before, results(opt))  # a capture steps nothing
            graph.replay()
        else:
            graph.replay()
        assert_same_bits(results(eager), results(opt))
    assert opt.stats() == eager.stats() == {"skipped_blocks": 0}


def test_scale_clipping_and_skips_in_a_graph() -> None:
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, capturable=capturable)
        grads = with_gradients(params)
        opt.step()
        scale, found_inf = (torch.ones(1, device=DEVICE) for _ in range(2))
        found_inf.zero_()

        def step(opt: Any = opt, scale: Tensor = scale, found_inf: Tensor = found_inf) -> None:
            opt.clip_grad_norm_(0.03)
            opt.grad_scale, opt.found_inf = scale, found_inf
            opt.step()

        step()
        graph = captured(step) if capturable else None
        seen = []
        for number, (by, found) in enumerate([(2.0, 0.0), (0.37, 0.0), (4.0, 1.0), (1.0, 0.0)]):
            fill(grads, number)
            grads[0].view(-1)[number] = torch.nan if number == 3 else 1.0
            scale.fill_(by)
            found_inf.fill_(found)
            step() if graph is None else graph.replay()
            seen.append(results(opt))
        made.append((seen, int(opt._stepper.skipped[params[0].device])))
    assert_same_bits(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]


def test_steps_outside_of_a_graph_between_its_replays() -> None:
    """Neither takes over from the other: learning rates, settings, which parameters have gradients, tables."""
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, capturable=capturable)
        grads = with_gradients(params)
        opt.step()
        graph = captured(opt.step) if capturable else None
        seen = []

        def replay(opt: Any = opt, graph: Any = graph) -> None:
            opt.step() if graph is None else graph.replay()

        def step(opt: Any = opt, **changes: Any) -> None:
            before = {name: opt.param_groups[0][name] for name in changes}
            opt.param_groups[0].update(changes)
            opt.step()
            opt.param_groups[0].update(before)

        for number in range(8):
            fill(grads, number)
            if number in (1, 4):
                step(lr=0.5)
            elif number == 3:
                params[0].grad = None
                step(weight_decay=0.3)
                params[0].grad = grads[0]
                junk = [torch.full((1 << 16,), -1, device=DEVICE) for _ in range(20)]  # in memory that was given up
                del junk
            elif number == 5:
                opt.found_inf = torch.ones(1, device=DEVICE)
                opt.step()
                del opt.found_inf
            elif number == 6:
                step()
            else:
                replay()
            seen.append(results(opt))
        made.append(seen)
    assert_same_bits(made[0], made[1])


def test_two_graphs_of_one_optimizer_and_captures_after_loads_and_copies() -> None:
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, capturable=capturable)
        grads = with_gradients(params)
        opt.step()
        params[1].grad = None
        opt.step()
        few = captured(opt.step) if capturable else None
        params[1].grad = grads[1]
        whole = captured(opt.step) if capturable else None
        seen = []
        for number in range(6):
            fill(grads, number)
            params[1].grad = None if number % 2 else grads[1]
            graph = few if number % 2 else whole
            opt.step() if graph is None else graph.replay()
            seen.append(results(opt))
        params[1].grad = grads[1]
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        if capturable:
            with pytest.raises(RuntimeError, match="the first after a load"):
                captured(opt.step)
            torch.cuda.synchronize()
        opt.step()
        again = captured(opt.step) if capturable else None
        opt.step() if again is None else again.replay()
        seen.append(results(opt))
        other = copy.deepcopy(opt)
        assert other._step_supports_amp_scaling is capturable
        others = [param for group in other.param_groups for param in group["params"]]
        with_gradients(others)
        other.step()
        again = captured(other.step) if capturable else None
        other.step() if again is None else again.replay()
        made.append([*seen, results(other), results(opt)])
    assert_same_bits(made[0], made[1])


def test_a_clipping_outside_of_the_capture_of_its_step_is_refused() -> None:
    params = there(make_params(FEW))
    opt = AdamW8bit(params, lr=0.01, capturable=True)
    with_gradients(params)
    opt.step()
    opt.clip_grad_norm_(0.01)
    with pytest.raises(RuntimeError, match="both in the capture, or both outside"):
        captured(opt.step)
    torch.cuda.synchronize()
    opt.step()


def test_a_training_step_in_a_graph() -> None:
    """Forward, backward and step, as torch documents it; operators without choices of algorithm, so bits are equal."""
    made = []
    for use_graph in (False, True):
        torch.manual_seed(0)
        weight = Parameter(torch.randn(64, 256, device=DEVICE))
        data, target = torch.randn(64, 256, device=DEVICE), torch.randn(64, 256, device=DEVICE)
        opt = AdamW8bit([weight], lr=0.05, capturable=True)

        def train(opt: Any = opt, weight: Tensor = weight, data: Tensor = data, target: Tensor = target) -> Tensor:
            loss = (data * weight - target).square().mean()
            loss.backward()
            opt.step()
            return loss.detach()

        losses = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                opt.zero_grad()
                losses.append(train().clone())
        torch.cuda.current_stream().wait_stream(stream)
        if use_graph:
            opt.zero_grad()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = train()
            for _ in range(20):
                graph.replay()
                losses.append(loss.clone())
        else:
            for _ in range(20):
                opt.zero_grad()
                losses.append(train().clone())
        made.append({"losses": torch.stack(losses).cpu(), **results(opt)})
    assert_same_bits(made[0], made[1])
    assert made[0]["losses"][-1] < made[0]["losses"][0] / 2


def test_refusals_in_a_capture() -> None:
    params = there(make_params(FEW))
    with_gradients(params)
    for capturable, message in (
        (False, "capturable=True"),
        (True, "a first step, or the first after a load"),
    ):
        opt = AdamW8bit(params, capturable=capturable)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
            opt.step()
        torch.cuda.synchronize()
        assert not any(opt.state.values())


# ---------------------------------------------------------------- time and memory


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_waits_for_nothing(capturable: bool) -> None:
    params = there(make_params(SHAPES))
    lr = torch.tensor(0.01, device=DEVICE) if capturable else 0.01
    opt = AdamW8bit(params, lr=lr, capturable=capturable)
    with_gradients(params)
    opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_on_another_stream() -> None:
    """Tables are sent and read on the stream that the step is taken on."""
    made = []
    for streams in (1, 3):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01)
        used = [torch.cuda.Stream() for _ in range(streams)]
        grads = with_gradients(params)
        for step in range(6):
            used[step % streams].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(used[step % streams]):
                fill(grads, step)
                torch.cuda._sleep(1_000_000)
                opt.step()
            torch.cuda.current_stream().wait_stream(used[step % streams])
        torch.cuda.synchronize()
        made.append(results(opt))
    assert_same_bits(made[0], made[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_temporary_of_a_parameters_size(dtype: torch.dtype) -> None:
    param = Parameter(torch.randn(4096, 4096, device=DEVICE, dtype=dtype))
    param.grad = torch.randn_like(param)
    opt = AdamW8bit([param], low_precision_update="split")
    opt.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 1 << 20


def test_more_elements_than_32_bits_count() -> None:
    """2^31 and some: the first blocks, those around 2^31 and the last, against the reference."""
    numel = 2**31 + 300
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of device memory")
    layout = Layout(1, numel)
    param, grad = (torch.empty(numel, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    moments = CodedMoments(
        torch.zeros(numel, dtype=torch.int8, device=DEVICE),
        torch.zeros(numel, dtype=torch.uint8, device=DEVICE),
        *(torch.zeros(layout.n_blocks, dtype=torch.uint8, device=DEVICE) for _ in range(2)),
    )
    places = [(0, 40), (2**24 - 5, 2**24), (2**24, layout.n_blocks)]
    param.zero_()
    grad.zero_()
    wanted = []
    whole = Fragment(param, grad, moments, layout, 0, layout.n_blocks)
    for first, end in places:
        part = cases.cut(whole, first, end)
        for tensor, key in ((part.param, 1), (part.grad, 2)):
            tensor.copy_(torch.randn(tensor.shape, generator=generator(first, key)))
        held = cases.with_state(part, {name: t.cpu() for name, t in cases.state_by_name(part).items()})
        held = held._replace(param=part.param.cpu(), grad=part.grad.cpu())
        reference.adam_step_(held, cases.scalars(1))
        wanted.append(cases.snapshot(held))
    triton.adam_step_([(whole, cases.scalars(1))])
    for (first, end), before in zip(places, wanted, strict=True):
        got = cases.snapshot(cases.cut(whole, first, end))
        assert_same_bits(before, {name: tensor.cpu() for name, tensor in got.items()})


# ---------------------------------------------------------------- offload and DTensors on a real device


def backward(params: Sequence[Tensor], step: int) -> None:
    """A backward pass that gives every parameter its seeded gradient."""
    total = torch.zeros((), device=params[0].device)
    for index, param in enumerate(params):
        grad = gradient(torch.empty(param.shape, dtype=param.dtype), 0, index, step).to(param.device)
        total = total + (param * grad).sum().float()
    total.backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["offload", "gradients", "in backward", "on the device, in backward"])
def test_steps_on_the_host_and_in_the_backward_pass(way: str, dtype: torch.dtype) -> None:
    made = []
    for on_device in (False, True):
        params = make_params(SHAPES, dtype)
        keywords: dict[str, Any] = {}
        if on_device:
            params = there(params)
            keywords = {} if "device" in way else {"offload": "cpu", "bucket_cap_mb": 0.05}
            keywords |= {"offload_gradients": True} if way == "gradients" else {}
        net = nn.ParameterList(params)
        opt = AdamW8bit(net.parameters(), lr=0.01, **keywords)
        handle = step_in_backward(net, opt) if "backward" in way and on_device else None
        for step in range(3):
            opt.zero_grad()
            backward(params, step)
            opt.step()
        if handle is not None:
            handle.remove()
        made.append(results(opt))
    assert_same_bits(made[0], made[1])


def test_a_grad_scaler_leaves_its_scale_to_a_capturable_step() -> None:
    made = []
    for capturable in (False, True):
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, capturable=capturable)
        scaler = torch.amp.GradScaler(init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            opt.zero_grad()
            set_gradients(params, step)
            scale = scaler.scale(torch.ones((), device=DEVICE))
            for param in params:
                assert param.grad is not None
                param.grad.mul_(scale)
            if step == 2:
                assert params[0].grad is not None
                params[0].grad.view(-1)[3] = torch.inf
            scaler.step(opt)
            scaler.update()
        made.append((results(opt), scaler.get_scale()))
    assert made[0][1] == made[1][1]
    assert_same_bits(made[0][0], made[1][0])


@pytest.fixture
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("keywords", [{}, {"offload": "cpu"}, {"offload": "cpu", "offload_gradients": True}], ids=str)
def test_fully_sharded_parameters(keywords: dict[str, Any], one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    made = []
    for sharded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(DEVICE)
        if sharded:
            fully_shard(net)
        opt = AdamW8bit(net.parameters(), lr=0.01, **(keywords if sharded else {}))
        for step in range(4):
            data = torch.randn(32, 64, generator=generator(step)).to(DEVICE)
            opt.zero_grad()
            net(data).square().mean().backward()
            opt.step()
        whole = [param.detach() for param in net.parameters()]
        made.append([(w.full_tensor() if isinstance(w, DTensor) else w).cpu() for w in whole])
    for a, b in zip(made[0], made[1], strict=True):
        assert torch.equal(a, b)


def test_sharded_moments_and_a_compiled_step(one_rank: None) -> None:
    """Of one rank, which sends to nobody."""
    made = []
    rows: list[tuple[dict[str, Any], bool]] = [({}, False), ({"shard_group": "world"}, False), ({}, True)]
    for keywords, compiled in rows:
        params = there(make_params(FEW))
        opt = AdamW8bit(params, lr=0.01, **keywords)
        step = torch.compile(opt.step) if compiled else opt.step
        for number in range(4):
            set_gradients(params, number)
            step()
        made.append(results(opt)["params"])
    assert_same_bits(made[0], made[1])
    assert_same_bits(made[0], made[2])
