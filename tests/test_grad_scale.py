"""The factor that a step multiplies gradients by: clipping, and the attributes of a gradient scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowmem_adam import Adam8bit, AdamW8bit
from tests.cases import CLASSES, FEW, OptimizerClass, assert_same_bits, copied, everything, make_params, set_gradients

ALL = ("8bit", "32bit")


def twins(cls: OptimizerClass = AdamW8bit, **settings: Any) -> tuple[Adam8bit, list[Any], Adam8bit, list[Any]]:
    params, others = make_params(FEW), make_params(FEW)
    return cls(params, lr=0.01, **settings), params, cls(others, lr=0.01, **settings), others


def total_norm(params: list[Any], norm_type: float = 2.0) -> torch.Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in params], norm_type)


@pytest.mark.parametrize("moments", ALL)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("factor", [0.5, 0.25])
def test_a_factor_is_the_same_as_scaled_gradients(cls: OptimizerClass, moments: str, factor: float) -> None:
    """A power of two scales exactly, so that both ways agree to the bit, L2 decay and all."""
    one, params, other, others = twins(cls, moments=moments, weight_decay=0.1)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        one._clip_coefficient = factor
        for param in others:
            param.grad.mul_(factor)
        one.step()
        other.step()
    assert_same_bits(everything(one), everything(other))


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
def test_clipping_leaves_gradients_alone_and_moves_as_torchs_clipping_does(norm_type: float) -> None:
    one, params, other, others = twins(moments="32bit")
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        before = copied([p.grad for p in params])
        limit = 0.3 * total_norm(params, norm_type).item()
        norm = one.clip_grad_norm_(limit, norm_type)
        assert_same_bits(copied([p.grad for p in params]), before)
        theirs = torch.nn.utils.clip_grad_norm_(others, limit, norm_type)
        assert norm.item() == theirs.item() == total_norm(params, norm_type).item()
        one.step()
        other.step()
    for param, twin in zip(params, others, strict=True):
        # An update is about lr and off by some ten roundings of 2^-24: of the coefficient, of the gradient times it,
        # and of the moments, which are held alike.
        bound = 3 * 20 * 2.0**-24 * (0.01 + twin.detach().abs())
        assert ((param.detach() - twin.detach()).abs() <= bound).all()


def test_clipping_a_small_norm_changes_nothing() -> None:
    one, params, other, others = twins()
    set_gradients(params, 0)
    set_gradients(others, 0)
    one.clip_grad_norm_(1e9)
    one.step()
    other.step()
    assert_same_bits(everything(one), everything(other))


def test_clipping_holds_for_one_step_only() -> None:
    one, params, other, others = twins()
    for step in range(2):
        set_gradients(params, step)
        set_gradients(others, step)
        if step == 0:
            one.clip_grad_norm_(0.1)
            other._clip_coefficient = one._clip_coefficient
        one.step()
        other.step()
        assert one._clip_coefficient == 1.0
    assert_same_bits(everything(one), everything(other))


def test_clipping_twice_clips_what_is_left() -> None:
    one, params, _, _ = twins()
    set_gradients(params, 0)
    first = one.clip_grad_norm_(0.5)
    assert first.item() > 0.5
    assert one.clip_grad_norm_(0.5).item() == pytest.approx(0.5, rel=1e-5)
    assert one.clip_grad_norm_(0.1).item() == pytest.approx(0.5, rel=1e-5)
    assert one.clip_grad_norm_(9.9).item() == pytest.approx(0.1, rel=1e-4)


def test_zero_grad_takes_a_clipping_back() -> None:
    one, params, other, others = twins()
    set_gradients(params, 0)
    one.clip_grad_norm_(0.1)
    one.zero_grad()
    assert all(p.grad is None for p in params)
    set_gradients(params, 0)
    set_gradients(others, 0)
    one.step()
    other.step()
    assert_same_bits(everything(one), everything(other))


def test_a_clipping_goes_with_gradients_that_are_replaced_without_a_step() -> None:
    """What a scaler does that leaves a step out, in a loop that calls model.zero_grad()."""
    one, params, other, others = twins()
    set_gradients(params, 0)
    one.clip_grad_norm_(0.1)
    for param in params:
        param.grad = None
    set_gradients(params, 1)
    set_gradients(others, 1)
    one.step()
    other.step()
    assert_same_bits(everything(one), everything(other))
    for opt, own in ((one, params), (other, others)):
        set_gradients(own, 2)
        opt.clip_grad_norm_(0.1)
    set_gradients(params, 3)
    set_gradients(others, 3)
    other.zero_grad()
    set_gradients(others, 3)
    assert one.clip_grad_norm_(0.2) == other.clip_grad_norm_(0.2)
    one.step()
    other.step()
    assert_same_bits(everything(one), everything(other))


@pytest.mark.filterwarnings("ignore:non-finite:RuntimeWarning")
def test_a_norm_that_is_not_finite() -> None:
    """As in torch the coefficient of NaN is NaN: all blocks have non-finite gradients then and keep what they have."""
    one, params, _, _ = twins()
    set_gradients(params, 0)
    params[0].grad.view(-1)[3] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        one.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert one._clip_coefficient == 1.0
    before = copied(params)
    assert one.clip_grad_norm_(1.0).isnan()
    one.step()
    assert_same_bits(copied(params), before)
    assert one.stats()["skipped_blocks"] > 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1", None, True])
def test_a_max_norm_that_is_refused(value: Any) -> None:
    one, params, _, _ = twins()
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=r"max_norm is .*accepted: numbers from 0"):
        one.clip_grad_norm_(value)
    assert one._clip_coefficient == 1.0


def test_error_mode_looks_at_the_product() -> None:
    one, params, _, _ = twins(nonfinite="error")
    set_gradients(params, 0)
    params[0].grad.fill_(1e30)
    before = everything(one)
    one.grad_scale = torch.tensor(1e-30)
    with pytest.raises(ValueError, match="gradient elements are not finite"):
        one.step()
    del one.grad_scale
    assert_same_bits(everything(one), before)
    one.step()


# ---------------------------------------------------------------- gradient scalers


def test_the_attributes_of_a_scaler_divide_and_skip() -> None:
    one, params, other, others = twins()
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        for param in params:
            param.grad.mul_(1024.0)
        one.grad_scale = torch.tensor(1024.0)
        one.found_inf = torch.tensor(float(step == 1))
        before = everything(one)
        if step == 1:
            one.clip_grad_norm_(1e-3)
        one.step()
        if step == 1:
            assert_same_bits(everything(one), before)
        else:
            other.step()
        del one.grad_scale, one.found_inf
    assert_same_bits(everything(one), everything(other))


def test_torchs_scaler_unscales_and_skips() -> None:
    """float16 training on the CPU: the scaler's own pass unscales, and it sees which step to leave out."""
    param = torch.nn.Parameter(torch.randn(64, 128))
    opt = AdamW8bit([param], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (False, True, False):
        opt.zero_grad()
        scaler.scale((param * param).sum()).backward()
        if bad:
            assert param.grad is not None
            param.grad[3, 5] = torch.inf
        before = param.detach().clone()
        scaler.unscale_(opt)
        opt.clip_grad_norm_(1.0)
        scaler.step(opt)
        scaler.update()
        assert torch.equal(param.detach(), before) == bad
    assert scaler.get_scale() == 512.0
    assert int(opt.state[param]["step"]) == 2
    assert opt.stats() == {"skipped_blocks": 0}
