"""Steps in functions that torch.compile traces: one graph, compiled once, with the bits of a step outside of them."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lowmem_adam import AdamW8bit
from tests.cases import FEW, assert_same_bits, everything, make_params, set_gradients
from tests.compile_cases import (
    BACKENDS,
    Twins,
    breaks,
    compiled_once,
    graphs,
    loss_of,
    of_all_dtypes,
    trainable,
    training,
)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with compiled_once():
        yield


# ---------------------------------------------------------------- one graph


@pytest.mark.parametrize("backend", BACKENDS)
def test_ten_steps_are_one_graph_compiled_once(backend: str) -> None:
    """While a scheduler changes learning rates, step numbers rise and gradients are other tensors."""
    opts = [of_all_dtypes() for _ in range(2)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.9) for opt in opts]

    @torch.compile(backend=backend, fullgraph=True)
    def step() -> None:
        opts[1].step()
        opts[1].zero_grad()

    kept = []  # so that no gradient lies where one lay before
    for number in range(10):
        for opt in opts:
            set_gradients(trainable(opt), number)
            kept += [param.grad for param in trainable(opt)]
        opts[0].step()
        opts[0].zero_grad()
        step()
        for scheduler in schedulers:
            scheduler.step()
        assert graphs() == 1
    assert not breaks()
    assert all(param.grad is None for param in trainable(opts[1]))
    assert_same_bits(everything(opts[0]), everything(opts[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_method_that_is_compiled(backend: str) -> None:
    opts = [of_all_dtypes() for _ in range(2)]
    steps = [opts[0].step, torch.compile(opts[1].step, backend=backend, fullgraph=True)]
    for number in range(4):
        for opt, step in zip(opts, steps, strict=True):
            set_gradients(trainable(opt), number)
            assert step() is None
    assert graphs() == 1
    assert_same_bits(everything(opts[0]), everything(opts[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_before_between_and_after_steps(backend: str) -> None:
    """Parameters read before and after, and changed in between; gradients that are made and changed there."""

    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        params = list(net.parameters())

        def function(batch: Tensor) -> Any:
            with torch.no_grad():
                before = params[0] * 2.0
                for param in params:
                    param.grad = param.sign() * batch[0, 0]  # exact, whatever compiles it
                    param.mul_(0.5)
                opt.step()
                between = params[0] * 2.0
                for param in params:
                    assert param.grad is not None
                    param.grad.mul_(2.0)
                    param.add_(1.0)
                opt.step()
                after = params[0] * 2.0
                params[1].neg_()
            opt.zero_grad()
            return before, between, after

        return function

    Twins().run(make, 4, backend=backend, fullgraph=True)
    assert (graphs(), breaks()) == (1, [])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_breaks_only_where_torch_does(backend: str) -> None:
    Twins().run(training, 5, backend=backend)
    assert graphs() == 2  # up to the backward pass, and from there on
    (reason,) = breaks()
    assert "backward" in reason


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch breaks at backward()")
def test_a_training_step_with_its_backward_pass_is_one_graph() -> None:
    # In a process that compiles nothing afterwards: torch 2.13, having traced a backward pass, gives another function
    # that returns None a tensor to return.
    program = "from tests.compile_cases import compiled_once, train_in_one_graph; train_in_one_graph()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_a_compiled_model_with_a_step_outside() -> None:
    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        return lambda batch: loss_of(net, batch)

    twins = Twins()
    plain, traced = (make(net, opt) for net, opt in zip(twins.nets, twins.opts, strict=True))
    traced = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        batch = torch.randn(4, 70)
        for forward, opt in zip((plain, traced), twins.opts, strict=True):
            forward(batch).backward()
            opt.step()
            opt.zero_grad()
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert graphs() == 1


# ---------------------------------------------------------------- clipping and scaling


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("within", [True, False])
def test_clipping(backend: str, within: bool) -> None:
    """In the function, for which its graph breaks once, and outside before a function that steps."""

    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        def function(batch: Tensor) -> Any:
            norm = opt.clip_grad_norm_(0.01) if within else None
            opt.step()
            return norm

        return function

    twins = Twins()
    functions = [make(net, opt) for net, opt in zip(twins.nets, twins.opts, strict=True)]
    functions[1] = torch.compile(functions[1], backend=backend, fullgraph=not within)
    for _ in range(4):
        batch = torch.randn(4, 70)
        found = []
        for net, opt, function in zip(twins.nets, twins.opts, functions, strict=True):
            opt.zero_grad()
            loss_of(net, batch).backward()
            norm = None if within else opt.clip_grad_norm_(0.01)
            found.append([norm, function(batch)])
        assert_same_bits(found[0], found[1])
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert len(breaks()) == within


def test_clipping_of_other_gradients_is_an_error() -> None:
    """Clipped outside, changed in the function: it cannot be told whether the clipping is of what is stepped."""
    opt = Twins().opts[0]
    params = trainable(opt)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step() -> None:
        for param in params:
            assert param.grad is not None
            param.grad.mul_(2.0)
        opt.step()

    set_gradients(params, 0)
    opt.clip_grad_norm_(1e-3)
    before = everything(opt)
    with pytest.raises(RuntimeError, match="clip_grad_norm_ was called before a compiled function"):
        step()
    assert_same_bits(before, everything(opt))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_gradient_scaler_steps_by_a_compiled_function(backend: str) -> None:
    twins = Twins()
    twins.opts[1].step = torch.compile(twins.opts[1].step, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for step in range(4):
        batch = torch.randn(4, 70) * (math.inf if step == 1 else 1.0)
        for net, opt, scaler in zip(twins.nets, twins.opts, scalers, strict=True):
            opt.zero_grad()
            scaler.scale(loss_of(net, batch)).backward()
            scaler.step(opt)
            scaler.update()
    assert_same_bits(everything(twins.opts[0]), everything(twins.opts[1]))
    assert (graphs(), breaks()) == (1, [])
    assert not {"grad_scale", "found_inf"} & set(twins.opts[1].__dict__)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_attributes_of_a_scaler(backend: str) -> None:
    """Set outside, and in the function itself, before its graph has run."""
    # torch 2.11 does not trace functions that set attributes of optimizers.
    for within in (False,) if torch.__version__ < "2.13" else (False, True):
        torch._dynamo.reset()

        def make(net: nn.Module, opt: AdamW8bit, within: bool = within) -> Callable[[Tensor], Any]:
            params = list(net.parameters())

            def function(batch: Tensor) -> None:
                for param in params:
                    param.grad = param.detach() * 8.0
                if within:
                    opt.grad_scale, opt.found_inf = batch.new_tensor(4.0), (batch[0, 0] > 0.0).float()
                opt.step()

            return function

        twins = Twins()
        for opt in twins.opts if not within else []:
            opt.grad_scale, opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        twins.run(make, 5, backend=backend, fullgraph=True)


# ---------------------------------------------------------------- other gradients and parameters


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_parameters_without_gradients(backend: str) -> None:
    """Which have gradients is compiled in; another set of them is compiled once more, and no more than that."""
    opts = [of_all_dtypes() for _ in range(2)]
    steps = [opts[0].step, torch.compile(opts[1].step, backend=backend, fullgraph=True)]
    with torch._dynamo.config.patch(error_on_recompile=False):
        for number in range(6):
            for opt, step in zip(opts, steps, strict=True):
                set_gradients(trainable(opt), number)
                for param in trainable(opt)[:: 2 + number % 2]:
                    param.grad = None
                step()
    assert graphs() == 2
    assert not breaks()
    assert_same_bits(everything(opts[0]), everything(opts[1]))
    stepped = [param in opts[1].state for param in trainable(opts[1])]
    assert stepped == [index % 6 > 0 for index in range(len(stepped))]


def cut(opt: AdamW8bit) -> None:
    opt.param_groups = [{**opt.param_groups[1], "params": opt.param_groups[1]["params"][:2]}, opt.param_groups[3]]


def load(opt: AdamW8bit) -> None:
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def add(opt: AdamW8bit) -> None:
    opt.add_param_group({"params": make_params(FEW, seed=9), "lr": 0.1})


@pytest.mark.parametrize("change", [cut, load, add])
def test_param_groups_that_are_changed_or_replaced(change: Callable[[AdamW8bit], None]) -> None:
    opts = [of_all_dtypes() for _ in range(2)]
    steps = [opts[0].step, torch.compile(opts[1].step, backend="aot_eager", fullgraph=True)]
    params = [trainable(opt) for opt in opts]
    for number in range(3):
        for opt, step, own in zip(opts, steps, params, strict=True):
            if number == 1:
                change(opt)
            set_gradients(
                [*own, *(param for param in trainable(opt) if all(param is not held for held in own))], number
            )
            with torch._dynamo.config.patch(error_on_recompile=number == 2):
                step()
    plain, traced = (
        [[param.detach() for param in own], list(opt.state.values())] for opt, own in zip(opts, params, strict=True)
    )
    assert_same_bits(plain, traced)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_settings_that_are_changed_in_the_function(backend: str) -> None:
    """They are those of the step that follows, for which the graph breaks, and of the next one."""

    def make(net: nn.Module, opt: AdamW8bit) -> Callable[[Tensor], Any]:
        def function(batch: Tensor) -> None:
            for param in net.parameters():
                param.grad = torch.full_like(param, 2.0)
            opt.param_groups[0]["lr"] = 0.25
            opt.step()
            opt.param_groups[0]["lr"] = 0.125
            opt.step()

        return function

    with torch._dynamo.config.patch(error_on_recompile=False):
        Twins().run(make, 4, backend=backend)
    assert 2 <= graphs() <= 6
    assert breaks()
