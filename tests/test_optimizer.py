"""The classes as torch optimizers: everything that works with ``torch.optim.AdamW`` works with them."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import lr_scheduler

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.layout import is_coded
from lowmem_adam.state import expected_tensors
from tests.cases import (
    CLASSES,
    DTYPES,
    FEW,
    SHAPES,
    OptimizerClass,
    Shape,
    assert_same_bits,
    copied,
    differ,
    everything,
    gradient,
    make_params,
    need_other_gradients,
    set_gradients,
    train,
)

MATRIX = tuple(s for s in SHAPES if s.name == "matrix")


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 64))


def loss_of(net: nn.Module, step: int) -> Tensor:
    data = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
    loss: Tensor = net(data).square().mean()
    return loss


def train_model(net: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()


# ---------------------------------------------------------------- shapes and memory


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_steps_and_keeps_the_state_it_should(shape: Shape, dtype: torch.dtype) -> None:
    (param,) = make_params((shape,), dtype)
    before, strides = param.detach().clone(), param.stride()
    opt = AdamW8bit([param], lr=0.01)
    train(opt, [param], 3)
    assert param.stride() == strides
    assert bool(param.isfinite().all())
    assert param.numel() == 0 or float((param != before).double().mean()) > 0.5
    assert is_coded(shape.shape) == shape.coded == ("exp_avg_code" in opt.state[param])
    held = {key: (tuple(value.shape), value.dtype) for key, value in opt.state[param].items()}
    assert held == expected_tensors(shape.shape, "8bit")
    assert int(opt.state[param]["step"]) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_memory_layout_does_not_matter(dtype: torch.dtype, moments: str) -> None:
    params, twins = make_params(SHAPES, dtype), make_params(SHAPES, dtype, as_is=False)
    assert sum(not p.is_contiguous() for p in params) >= 5
    assert all(p.is_contiguous() for p in twins)
    opts = [AdamW8bit(p, lr=0.01, moments=moments) for p in (params, twins)]
    train(opts[0], params, 3)
    train(opts[1], twins, 3)
    assert_same_bits(everything(opts[0]), everything(opts[1]))


@pytest.mark.parametrize(
    "strided",
    [lambda g: g.t().contiguous().t(), lambda g: torch.stack([g, g + 1], -1)[..., 0], lambda g: g[:1, :1].expand_as(g)],
    ids=["transposed", "gaps", "expanded"],
)
def test_memory_layout_of_gradients_does_not_matter(strided: Callable[[Tensor], Tensor]) -> None:
    (param,), (twin,) = make_params(MATRIX), make_params(MATRIX)
    opts = AdamW8bit([param]), AdamW8bit([twin])
    for step in range(3):
        param.grad = strided(gradient(param, 0, 0, step))
        twin.grad = param.grad.clone(memory_format=torch.contiguous_format)
        for opt in opts:
            opt.step()
    assert param.grad is not None
    assert not param.grad.is_contiguous()
    assert_same_bits(everything(opts[0]), everything(opts[1]))


def test_memory_around_a_view_is_left_alone() -> None:
    around = torch.full((40, 301), math.nan)
    param = Parameter(around[:, 1::2])
    param.data.copy_(torch.ones(40, 150))
    opt = AdamW8bit([param])
    train(opt, [param], 2)
    assert bool(around[:, ::2].isnan().all())
    assert bool((around[:, 1::2] != 1).any())


def test_fp32_gradients_of_16_bit_parameters() -> None:
    (param,), (twin,) = make_params(MATRIX, torch.bfloat16), make_params(MATRIX, torch.bfloat16)
    need_other_gradients()
    param.grad_dtype = torch.float32
    opts = AdamW8bit([param]), AdamW8bit([twin])
    for step in range(2):
        twin.grad = gradient(twin, 0, 0, step)
        param.grad = twin.grad.float()
        for opt in opts:
            opt.step()
    assert_same_bits(everything(opts[0]), everything(opts[1]))


# ---------------------------------------------------------------- calling


def test_closure_is_called_once_with_gradients_and_its_loss_returned() -> None:
    net, twin = model(), model()
    opt, plain = AdamW8bit(net.parameters()), AdamW8bit(twin.parameters())
    calls = []

    def closure() -> Any:
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        returned: Any = opt.step(closure)
    assert returned is calls[0]
    assert len(calls) == 1
    train_model(twin, plain, range(1))
    assert_same_bits(everything(opt), everything(plain))
    assert plain.step() is None


def test_step_hooks_run_once_a_step() -> None:
    (param,) = make_params(MATRIX)
    opt = AdamW8bit([param])
    seen: list[tuple[str, bool]] = []
    start = param.detach().clone()
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", torch.equal(param, start))))
    handle = opt.register_step_post_hook(lambda o, args, kwargs: seen.append(("post", torch.equal(param, start))))
    train(opt, [param], 1)
    handle.remove()
    train(opt, [param], 1)
    assert seen == [("pre", True), ("post", False), ("pre", False)]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    net = model()
    opt = AdamW8bit(net.parameters())
    train_model(net, opt, range(1))
    opt.zero_grad(set_to_none=set_to_none)
    for param in net.parameters():
        assert (param.grad is None) if set_to_none else not bool(torch.as_tensor(param.grad).any())


def test_parameters_without_gradient_are_left_alone() -> None:
    params = make_params(FEW)
    before = copied(params)
    opt = AdamW8bit(params, weight_decay=0.5)
    set_gradients(params, 0)
    for param in params[::2]:
        param.grad = None
    opt.step()
    assert_same_bits(copied(params[::2]), before[::2])
    assert all(differ(a, b) for a, b in zip(copied(params[1::2]), before[1::2], strict=True))
    assert set(opt.state_dict()["state"]) == set(range(1, len(params), 2))


def test_frozen_then_unfrozen_parameter_starts_with_its_own_first_step() -> None:
    net = model()
    late = next(net.parameters())
    fresh = Parameter(late.detach().clone())
    late.requires_grad_(False)
    opt = AdamW8bit(net.parameters())
    train_model(net, opt, range(3))
    assert torch.equal(late, fresh)
    late.requires_grad_(True)
    opt.zero_grad()
    loss_of(net, 3).backward()
    assert late.grad is not None
    fresh.grad = late.grad.clone()
    opt.step()
    other = AdamW8bit([fresh])
    other.step()
    assert_same_bits(late.detach(), fresh.detach())
    assert_same_bits(dict(opt.state[late]), dict(other.state[fresh]))


def test_accumulated_gradients_equal_one_step_on_their_sum() -> None:
    net, twin = model(), model()
    opt, one = AdamW8bit(net.parameters()), AdamW8bit(twin.parameters())
    for micro in range(3):
        loss_of(net, micro).backward()
    opt.step()
    for param, parameter in zip(net.parameters(), twin.parameters(), strict=True):
        assert param.grad is not None
        parameter.grad = param.grad.clone()
    one.step()
    assert_same_bits(everything(opt), everything(one))


def test_tied_weights_are_one_parameter_stepped_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 64)
            self.head = nn.Linear(64, 100, bias=False)
            self.head.weight = self.embed.weight

    net = Tied()
    opt = AdamW8bit(net.parameters())
    net.head(net.embed(torch.arange(10))).square().mean().backward()
    twin = Parameter(net.embed.weight.detach().clone())
    twin.grad = torch.as_tensor(net.embed.weight.grad).clone()
    opt.step()
    other = AdamW8bit([twin])
    other.step()
    assert net.head.weight is net.embed.weight
    assert len(opt.state) == 1
    assert_same_bits(net.embed.weight.detach(), twin.detach())


def test_maximize_is_descent_on_the_negative_gradient() -> None:
    up, down = make_params(), make_params()
    opts = AdamW8bit(up, maximize=True), AdamW8bit(down)
    for step in range(3):
        set_gradients(up, step)
        set_gradients(down, step)
        for param in down:
            param.grad = -torch.as_tensor(param.grad)
        for opt in opts:
            opt.step()
    assert_same_bits(copied(up), copied(down))
    assert_same_bits(opts[0].state_dict()["state"], opts[1].state_dict()["state"])


# ---------------------------------------------------------------- param groups


def test_groups_with_different_settings_equal_separate_optimizers() -> None:
    rows: list[dict[str, Any]] = [
        {"lr": 0.01, "betas": (0.8, 0.99)},
        {"weight_decay": 0.3, "moments": "32bit", "eps": 1e-6},
        {"maximize": True, "seed": 7, "nonfinite": "error"},
        {"low_precision_update": "nearest", "backend": "reference"},
    ]
    sets = [make_params(FEW, torch.bfloat16, seed=i) for i in range(len(rows))]
    twins = [make_params(FEW, torch.bfloat16, seed=i) for i in range(len(rows))]
    opt = AdamW8bit([{"params": params, **row} for params, row in zip(sets, rows, strict=True)])
    others = [AdamW8bit(params, **row) for params, row in zip(twins, rows, strict=True)]
    for step in range(3):
        for params in (*sets, *twins):
            set_gradients(params, step)
        for any_opt in (opt, *others):
            any_opt.step()
    for params, other, twin in zip(sets, others, twins, strict=True):
        assert_same_bits(copied(params), copied(twin))
        assert_same_bits([dict(opt.state[p]) for p in params], [dict(other.state[p]) for p in twin])


@pytest.mark.parametrize("after", ["steps", "load_state_dict", "deepcopy", "pickle"])
def test_a_group_added_later_starts_with_its_own_first_step(after: str) -> None:
    opt = AdamW8bit(make_params(FEW), lr=0.01)
    train(opt, opt.param_groups[0]["params"], 3)
    if after == "load_state_dict":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif after != "steps":
        opt = copy.deepcopy(opt) if after == "deepcopy" else pickle.loads(pickle.dumps(opt))
    params, twins = make_params(FEW, seed=5), make_params(FEW, seed=5)
    opt.add_param_group({"params": params, "lr": 0.02})
    set_gradients(params, 9)
    opt.step()
    other = AdamW8bit(twins, lr=0.02)
    set_gradients(twins, 9)
    other.step()
    assert_same_bits(copied(params), copied(twins))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()


@pytest.mark.parametrize("kind", ["generator", "tensor", "named", "named groups"])
def test_parameters_may_be_given_in_every_way_torch_takes(kind: str) -> None:
    net = model()
    given: dict[str, Any] = {
        "generator": (p for p in net.parameters()),
        "tensor": [{"params": p} for p in net.parameters()],
        "named": net.named_parameters(),
        "named groups": [{"params": list(net[i].named_parameters())} for i in (0, 2)],
    }
    opt = AdamW8bit(given[kind])
    train_model(net, opt, range(2))
    twin = model()
    train_model(twin, AdamW8bit(twin.parameters()), range(2))
    assert_same_bits(copied(list(net.parameters())), copied(list(twin.parameters())))
    if kind == "named":
        names = [name for name, _ in net.named_parameters()]
        assert opt.state_dict()["param_groups"][0]["param_names"] == names
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert opt.param_groups[0]["param_names"] == names


@pytest.mark.parametrize("cls", CLASSES)
def test_subclasses_and_repr(cls: OptimizerClass) -> None:
    opt = cls(make_params(FEW), 0.5, (0.1, 0.2), 1e-3, 0.25)
    assert isinstance(opt, torch.optim.Optimizer)
    group = opt.param_groups[0]
    assert [group[k] for k in ("lr", "betas", "eps", "weight_decay")] == [0.5, (0.1, 0.2), 1e-3, 0.25]
    assert "weight_decay: 0.25" in repr(opt)
    mine, theirs = (
        cls(make_params(FEW)),
        {AdamW8bit: torch.optim.AdamW, Adam8bit: torch.optim.Adam}[cls](make_params(FEW)),
    )
    for key in ("lr", "betas", "eps", "weight_decay", "maximize"):
        assert mine.defaults[key] == theirs.defaults[key]


# ---------------------------------------------------------------- learning rates

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=8),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 1e-4, 1e-2, step_size_up=3),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=1, factor=0.5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_drive_it_as_they_drive_torch(name: str, tensor_lr: bool) -> None:
    params, twins, others = make_params(FEW), make_params(FEW), make_params(FEW)
    opt = AdamW8bit(params, lr=torch.tensor(0.01) if tensor_lr else 0.01)
    theirs = torch.optim.AdamW(others, lr=torch.tensor(0.01) if tensor_lr else 0.01, foreach=False)
    by_hand = AdamW8bit(twins)
    schedules = SCHEDULERS[name](opt), SCHEDULERS[name](theirs)
    rates, betas = set(), set()
    for step in range(6):
        group, theirs_group = opt.param_groups[0], theirs.param_groups[0]
        assert (float(group["lr"]), group["betas"]) == (float(theirs_group["lr"]), theirs_group["betas"])
        rates.add(float(group["lr"]))
        betas.add(group["betas"])
        by_hand.param_groups[0].update(lr=float(group["lr"]), betas=group["betas"])
        train(opt, params, 1, start=step)
        train(by_hand, twins, 1, start=step)
        train(theirs, others, 1, start=step)
        for schedule in schedules:
            schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 1
    # Of a tensor ReduceLROnPlateau made a number in torch 2.9.
    assert type(opt.param_groups[0]["lr"]) is type(theirs.param_groups[0]["lr"])
    assert_same_bits(copied(params), copied(twins))
    assert (len(betas) > 1) == (name in ("OneCycleLR", "CyclicLR"))


def test_tensor_lr_survives_saving_and_is_not_shared() -> None:
    lr = torch.tensor(0.01)
    opt = AdamW8bit(make_params(FEW), lr=lr)
    other = AdamW8bit(make_params(FEW), lr=torch.tensor(0.5))
    other.load_state_dict(opt.state_dict())
    assert isinstance(other.param_groups[0]["lr"], Tensor)
    lr.fill_(0.7)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.01)
    assert float(opt.param_groups[0]["lr"]) == pytest.approx(0.7)


def test_grad_scaler() -> None:
    net, twin = model(), model()
    opt, plain = AdamW8bit(net.parameters(), nonfinite="error"), AdamW8bit(twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(3):
        opt.zero_grad()
        scaler.scale(loss_of(net, step)).backward()
        scaler.step(opt)
        scaler.update()
    train_model(twin, plain, range(3))
    assert_same_bits(copied(list(net.parameters())), copied(list(twin.parameters())))

    before = everything(opt)
    opt.zero_grad()
    scaler.scale(loss_of(net, 3) * math.inf).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**11
    assert_same_bits(before, everything(opt))


def test_a_compiled_training_step_gives_the_same_bits() -> None:
    """The step stays outside of what torch.compile traces: compilers round as they like."""
    nets = [model(), model()]
    opts = [AdamW8bit(net.parameters(), lr=0.01) for net in nets]
    for net, opt in zip(nets, opts, strict=True):
        train_model(net, opt, range(1))  # state exists: what is compiled is the usual step
    for net in nets:
        loss_of(net, 1).backward()
    opts[0].step()
    torch.compile(opts[1].step, backend="eager")()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same_bits(opts[0].state_dict(), opts[1].state_dict())
