"""Saved state as users see it: hooks, copies, pickles, torch.distributed.checkpoint, and what a load may alias."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.state import expected_tensors
from tests.cases import (
    CLASSES,
    FEW,
    SHAPES,
    OptimizerClass,
    assert_same_bits,
    copied,
    differ,
    everything,
    make_params,
    params_of,
    train,
)


def trained(cls: OptimizerClass = AdamW8bit, steps: int = 2, **settings: Any) -> Adam8bit:
    params = make_params(FEW, torch.bfloat16)
    opt = cls(params, lr=0.01, **settings)
    train(opt, params, steps)
    return opt


def linear_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(96, 80), nn.LayerNorm(80), nn.Linear(80, 64))


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_a_round_trip_changes_no_bit_and_holds_plain_values(cls: OptimizerClass, moments: str) -> None:
    opt = trained(cls, moments=moments, seed=11, betas=(0.8, 0.99), maximize=True)
    saved = through_file(opt.state_dict())
    assert_same_bits(saved, opt.state_dict())
    for index, param in enumerate(params_of(opt)):
        held = {key: (tuple(value.shape), value.dtype) for key, value in saved["state"][index].items()}
        assert held == expected_tensors(param.shape, moments)
        assert all(type(value) is Tensor and value.is_contiguous() for value in saved["state"][index].values())
    other = cls(make_params(FEW, torch.bfloat16), moments=moments)
    other.load_state_dict(saved)
    assert_same_bits(opt.state_dict(), other.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
def test_loading_its_own_state_changes_nothing(steps: int) -> None:
    opt, twin = trained(steps=steps), trained(steps=steps)
    before = everything(opt)
    opt.load_state_dict(opt.state_dict())
    assert_same_bits(before, everything(opt))
    train(opt, params_of(opt), 2, start=5)
    train(twin, params_of(twin), 2, start=5)
    assert_same_bits(everything(opt), everything(twin))


def test_state_saved_before_the_first_step_resets() -> None:
    opt, fresh = trained(), trained(steps=0)
    opt.load_state_dict(copy.deepcopy(fresh.state_dict()))
    assert opt.state_dict()["state"] == {}
    assert opt.memory_report()["total_bytes"] == 0
    with torch.no_grad():
        for param, value in zip(params_of(opt), params_of(fresh), strict=True):
            param.copy_(value)
    train(opt, params_of(opt), 2)
    assert_same_bits(everything(opt), everything(trained()))


def test_reading_the_state_of_a_parameter_without_any_does_not_spoil_a_checkpoint() -> None:
    opt, fresh = trained(), trained(steps=0)
    idle = torch.nn.Parameter(torch.zeros(3))
    for each in (opt, fresh):
        each.add_param_group({"params": [idle]})
        assert each.state[idle] == {}
    saved = through_file(opt.state_dict())
    fresh.load_state_dict(saved)
    assert_same_bits(opt.state_dict()["state"][0], fresh.state_dict()["state"][0])
    assert not fresh.state.get(idle)


def test_loaded_state_shares_no_memory_with_what_was_given() -> None:
    opt, other = trained(), trained(steps=0)
    given = copied(opt.state_dict())
    other.load_state_dict(given)
    before = copied(given)
    train(other, params_of(other), 2)
    assert_same_bits(before, given)
    other.param_groups[0]["lr"] = 0.5
    assert given["param_groups"][0]["lr"] == 0.01


def test_a_load_takes_settings_from_the_file_but_not_the_backend() -> None:
    opt = trained(seed=9, nonfinite="propagate", low_precision_update="nearest", backend="reference")
    other = trained(steps=0)
    other.load_state_dict(opt.state_dict())
    group = other.param_groups[0]
    assert (group["seed"], group["nonfinite"], group["low_precision_update"]) == (9, "propagate", "nearest")
    assert group["backend"] is None


def test_state_of_another_memory_layout_loads() -> None:
    """State is row-major whatever the strides, so channels_last may be switched on between runs."""
    first, second = make_params(SHAPES), make_params(SHAPES, as_is=False)
    opts = AdamW8bit(first), AdamW8bit(second)
    train(opts[0], first, 2)
    train(opts[1], second, 2)
    opts[0].load_state_dict(copied(opts[1].state_dict()))
    train(opts[0], first, 2, start=2)
    train(opts[1], second, 2, start=2)
    assert_same_bits(everything(opts[0]), everything(opts[1]))


def test_hooks_see_plain_tensors() -> None:
    opt = trained()
    seen: list[str] = []

    def plain(name: str, state: Any) -> None:
        tensors = [value for entry in state.values() for value in entry.values()]
        assert tensors
        assert all(type(value) is Tensor for value in tensors)
        seen.append(name)

    opt.register_state_dict_pre_hook(lambda o: plain("save pre", o.state))
    opt.register_state_dict_post_hook(lambda o, saved: plain("save post", saved["state"]))
    opt.register_load_state_dict_pre_hook(lambda o, saved: plain("load pre", saved["state"]))
    opt.register_load_state_dict_pre_hook(lambda o, saved: plain("load pre first", saved["state"]), prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: plain("load post", o.state))
    opt.register_load_state_dict_post_hook(lambda o: plain("load post first", o.state), prepend=True)
    for _ in range(2):
        opt.load_state_dict(copied(opt.state_dict()))
    once = ["save pre", "save post", "load pre first", "load pre", "load post first", "load post"]
    assert seen == once * 2


def test_a_hook_may_replace_what_is_loaded_and_saved() -> None:
    opt, other = trained(), trained(steps=0)
    opt.register_state_dict_post_hook(lambda o, saved: {"wrapped": saved})
    other.register_load_state_dict_pre_hook(lambda o, saved: saved["wrapped"])
    other.load_state_dict(copied(opt.state_dict()))
    assert_same_bits(opt.state_dict()["wrapped"], other.state_dict())


def test_a_hook_that_fails_changes_nothing() -> None:
    opt, other = trained(), trained(steps=1)

    def fail(*_: Any) -> None:
        raise RuntimeError("mine")

    before = everything(opt)
    handle = opt.register_load_state_dict_pre_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        opt.load_state_dict(copied(other.state_dict()))
    handle.remove()
    assert_same_bits(before, everything(opt))
    opt.register_load_state_dict_post_hook(fail)
    with pytest.raises(RuntimeError, match="mine"):
        opt.load_state_dict(copied(other.state_dict()))
    assert_same_bits(copied(other.state_dict()), copied(opt.state_dict()))
    train(opt, params_of(opt), 1)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_with_the_same_bits_and_alone(how: str) -> None:
    opt = trained(nonfinite="skip")
    params = params_of(opt)
    train(opt, params, 1, start=2)
    twin = COPIES[how](opt)
    assert_same_bits(everything(opt), everything(twin))
    assert {id(p) for p in params_of(twin)}.isdisjoint(id(p) for p in params)
    assert list(map(id, twin.state)) == list(map(id, params_of(twin)))
    before = everything(twin)
    train(opt, params, 2, start=3)
    assert_same_bits(before, everything(twin))
    train(twin, params_of(twin), 2, start=3)
    assert_same_bits(everything(opt), everything(twin))
    assert twin.stats() == opt.stats()
    assert twin.memory_report() == opt.memory_report()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_model_and_optimizer_stays_connected(how: str) -> None:
    net = linear_model()
    opt = AdamW8bit(net.parameters(), lr=0.01)

    def steps(net: nn.Module, opt: torch.optim.Optimizer, n: int) -> None:
        for step in range(n):
            opt.zero_grad()
            net(torch.randn(4, 96, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            opt.step()

    steps(net, opt, 2)
    other_net, other = COPIES[how]((net, opt))
    assert all(p is q for p, q in zip(other_net.parameters(), params_of(other), strict=True))
    before = copied(list(net.parameters()))
    steps(other_net, other, 2)
    assert_same_bits(before, copied(list(net.parameters())))
    assert differ(before, copied(list(other_net.parameters())))
    steps(net, opt, 2)
    assert_same_bits(everything(opt), everything(other))


def test_counters_are_copied_and_not_shared() -> None:
    opt = trained()
    params = params_of(opt)
    params[0].grad = torch.full_like(params[0], torch.inf)
    with pytest.warns(RuntimeWarning, match="non-finite"):
        opt.step()
    twin = copy.deepcopy(opt)
    count = opt.stats()["skipped_blocks"]
    assert count == twin.stats()["skipped_blocks"] > 0
    opt.step()
    assert (opt.stats()["skipped_blocks"], twin.stats()["skipped_blocks"]) == (2 * count, count)


def test_distributed_checkpoint_functions() -> None:
    """``get_optimizer_state_dict`` takes a real step with zero gradients and lr 0 where there is no state yet."""
    net, twin = linear_model(), linear_model()
    opt = AdamW8bit(net.parameters(), lr=0.01)
    before = copied(list(net.parameters()))
    empty = get_optimizer_state_dict(net, opt)
    assert_same_bits(before, copied(list(net.parameters())))
    assert opt.param_groups[0]["lr"] == 0.01
    assert all(not bool(value.any()) for s in empty["state"].values() for k, value in s.items() if k != "step")  # type: ignore[union-attr]

    train(opt, list(net.parameters()), 2)
    saved = through_file(get_optimizer_state_dict(net, opt))
    other = AdamW8bit(twin.parameters())
    set_optimizer_state_dict(twin, other, saved)
    twin.load_state_dict(net.state_dict())
    assert_same_bits(copied(opt.state_dict()["state"]), copied(other.state_dict()["state"]))
    train(opt, list(net.parameters()), 2, start=2)
    train(other, list(twin.parameters()), 2, start=2)
    assert_same_bits(copied(list(net.parameters())), copied(list(twin.parameters())))
