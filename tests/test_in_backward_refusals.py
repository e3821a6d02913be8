"""What ``step_in_backward`` cannot serve is an error where it is tried."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lowmem_adam import AdamW8bit, step_in_backward
from tests.cases import assert_same_bits
from tests.test_in_backward import Net, everything, loss_of, make, train


@pytest.fixture
def pair() -> Iterator[tuple[Net, AdamW8bit]]:
    net, opt = make()
    with step_in_backward(net, opt):
        yield net, opt


def test_a_second_backward_pass_is_an_error(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair
    loss_of(net, 0).backward()
    before = everything(opt)
    with pytest.raises(RuntimeError, match=r"accepted: one backward pass a step, with zero_grad\(\) before it"):
        loss_of(net, 1).backward()
    assert_same_bits(before, everything(opt))


def test_clipping_is_an_error(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="accepted with it: no clipping by the global norm"):
        opt.clip_grad_norm_(1.0)
    for foreach in (None, False):
        with pytest.raises(RuntimeError, match="clipping by their global norm, a GradScaler or"):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=foreach)
    with pytest.raises(RuntimeError, match="step_in_backward has stepped with"):
        nn.utils.clip_grad_value_(net.parameters(), 1.0)


def test_gradient_scalers_are_an_error(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, 0)).backward()
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(RuntimeError, match="GradScaler"):
            call(opt)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="accepted with it: gradients that are not scaled"):
        opt.step()
    del opt.grad_scale, opt.found_inf


def test_reentrant_checkpointing_of_a_layer_that_is_used_twice_is_an_error(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair
    net.checkpointing = True
    with pytest.raises(RuntimeError, match="reentrant checkpointing"):
        train(net, opt, range(1))


def test_a_weight_that_is_still_needed_is_an_error_of_torch() -> None:
    """Nothing that was saved for the pass is changed unseen: here a weight is used once more without a gradient."""
    weight, x = nn.Parameter(torch.randn(64, 64)), torch.randn(3, 64, requires_grad=True)
    model = nn.ParameterList([weight])
    opt = AdamW8bit(model.parameters())
    with step_in_backward(model, opt):
        early = x @ weight.detach()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (early.sin() @ weight).sum().backward()


def test_wrong_arguments() -> None:
    net, opt = make()
    other = nn.Linear(3, 5)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (list(net.parameters()), opt, TypeError, "model is a list; accepted: a torch.nn.Module"),
        (net, torch.optim.AdamW(net.parameters()), TypeError, "optimizer is a AdamW; accepted: Adam8bit, AdamW8bit"),
        (other, opt, ValueError, "none of the 2 parameters of the model; accepted"),
        (*make(nonfinite="error"), ValueError, 'nonfinite is "error".*accepted: "skip", "propagate"'),
    ]
    for model, optimizer, kind, message in wrong:
        with pytest.raises(kind, match=message):
            step_in_backward(model, optimizer)
    loss_of(net, 0).backward()
    with pytest.raises(ValueError, match=r"5 parameters have gradients; accepted: none, as after zero_grad\(\)"):
        step_in_backward(net, opt)
    assert opt._in_backward is None
    opt.step()
    opt.zero_grad()
    with step_in_backward(net, opt):
        with pytest.raises(RuntimeError, match=r"accepted: remove\(\) of that handle first"):
            step_in_backward(net, opt)
        opt.param_groups[0]["nonfinite"] = "error"
        with pytest.raises(ValueError, match='nonfinite is "error"'):
            loss_of(net, 1).backward()


def test_two_optimizers_of_one_model() -> None:
    net, one = make()
    two = AdamW8bit(net.parameters())
    handle = step_in_backward(net, one)
    with pytest.raises(ValueError, match=r"another optimizer steps parameters .* accepted: remove\(\) of its handle"):
        step_in_backward(net, two)
    loss_of(net, 0).backward()
    with pytest.raises(ValueError, match="another optimizer has stepped with its gradient"):
        two.step()
    assert not two.state
    handle.remove()
    with step_in_backward(net, two):
        train(net, two, range(1))
    assert two.state
    del handle, one  # without remove()
    net, one = make()
    two = AdamW8bit(net.parameters())
    step_in_backward(net, one)
    del one
    gc.collect()
    with step_in_backward(net, two):
        train(net, two, range(1))
    assert two.state


def test_it_is_said_what_reads_a_stepped_gradient(pair: tuple[Net, AdamW8bit]) -> None:
    net, _ = pair
    loss_of(net, 0).backward()
    weight = net.middle.weight
    assert weight.grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="was asked of a gradient that step_in_backward"):
        weight.add_(weight.grad)
    torch._foreach_zero_([weight.grad, torch.ones(3)])
    assert weight.grad.next().count_nonzero() == 0  # type: ignore[attr-defined]


def test_a_sparse_gradient_is_refused_in_the_pass() -> None:
    net = nn.Embedding(64, 96, sparse=True)
    opt = AdamW8bit(net.parameters())
    with step_in_backward(net, opt):
        with pytest.raises(ValueError, match=r"layout torch.sparse_coo; accepted: dense"):
            net(torch.tensor([1, 2])).sum().backward()
        assert not opt.state
