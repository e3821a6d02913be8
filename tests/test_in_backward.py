"""``step_in_backward``: parameters are stepped in the backward pass, with the bits of ``step()``."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowmem_adam import AdamW8bit, step_in_backward
from lowmem_adam.stand_ins import SteppedGradient
from tests.cases import DTYPES, assert_same_bits, copied
from tests.cases import everything as everything_in_order
from tests.kernel_cases import UPDATES


class Net(nn.Module):
    """Embedding and head share a weight; there is a norm, a bias, and a layer that is not used at all."""

    def __init__(self, checkpointing: bool | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 96)
        self.middle = nn.Linear(96, 96)
        self.norm = nn.LayerNorm(96)
        self.unused = nn.Linear(96, 64)
        self.checkpointing = checkpointing

    def block(self, x: Tensor) -> Tensor:
        return x + functional.gelu(self.middle(self.norm(x)))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            if self.checkpointing is None:
                x = self.block(x)
            else:
                x = checkpoint(self.block, x, use_reentrant=self.checkpointing)
        return functional.linear(x, self.embedding.weight)


def make(dtype: torch.dtype = torch.float32, **keywords: Any) -> tuple[Net, AdamW8bit]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    decayed = [param for param in net.parameters() if param.ndim > 1]
    others = [param for param in net.parameters() if param.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0, "lr": 3e-3}]
    return net, AdamW8bit(groups, **{"lr": 1e-2, **keywords})


def loss_of(net: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
    logits: Tensor = net(tokens)
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(1, 1).flatten())


def train(net: nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()


def everything(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and saved state; states come about in another order in a backward pass."""
    found = everything_in_order(opt)
    return {**found, "state": dict(sorted(found["state"].items()))}


@pytest.fixture
def pair() -> Iterator[tuple[Net, AdamW8bit]]:
    net, opt = make()
    with step_in_backward(net, opt):
        yield net, opt


# ---------------------------------------------------------------- the same steps


@pytest.mark.parametrize(
    ("dtype", "moments", "offload"), list(itertools.product(DTYPES, ("8bit", "32bit"), (None, "cpu")))
)
def test_has_the_bits_of_step(dtype: torch.dtype, moments: str, offload: str | None) -> None:
    runs = []
    for in_backward in (False, True):
        net, opt = make(dtype, moments=moments, offload=offload)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        if in_backward:
            step_in_backward(net, opt)
        for step in range(6):
            train(net, opt, range(step, step + 1))
            schedule.step()
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


@pytest.mark.parametrize("update", UPDATES)
def test_has_the_bits_of_step_in_every_update_mode(update: str) -> None:
    runs = []
    for in_backward in (False, True):
        net, opt = make(torch.bfloat16, **UPDATES[update])
        if in_backward:
            step_in_backward(net, opt)
        train(net, opt, range(4))
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_gradients_are_freed_as_the_pass_goes_on() -> None:
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    opt = AdamW8bit(layers.parameters())
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def look(param: Tensor) -> None:
        alive.append(sum(gradient() is not None for gradient in made))
        assert param.grad is not None
        made.append(weakref.ref(param.grad))

    for layer in layers.parameters():
        layer.register_post_accumulate_grad_hook(look)
    layers(torch.randn(3, 64)).sum().backward()
    assert alive == list(range(8))
    opt.zero_grad()
    made.clear()
    alive.clear()
    with step_in_backward(layers, opt):
        layers(torch.randn(3, 64)).sum().backward()
    assert len(alive) == 8
    assert max(alive) <= 1


def test_other_parameters_are_stepped_by_step() -> None:
    """Of another model, added later, frozen at first."""
    runs = []
    for in_backward in (False, True):
        net, opt = make()
        net.middle.weight.requires_grad_(False)
        apart = nn.Parameter(torch.ones(64, 128))
        if in_backward:
            step_in_backward(net, opt)
        opt.add_param_group({"params": [apart]})
        for step in range(4):
            if step == 2:
                net.middle.weight.requires_grad_(True)
            opt.zero_grad()
            (loss_of(net, step) + (apart * 0.1).square().sum()).backward()
            assert type(apart.grad) is Tensor
            opt.step()
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_either_zero_grad_makes_room_for_the_next_gradients(set_to_none: bool, whose: str) -> None:
    """A gradient that is zero is stepped with, and none is not."""
    runs = []
    for in_backward in (False, True):
        net, opt = make()
        handle = step_in_backward(net, opt) if in_backward else None
        for step in range(6):
            if step == 5 and handle is not None:
                handle.remove()
            if step in (1, 4):
                net.unused(torch.ones(96)).sum().backward()  # of the others there is none, or a zero
            else:
                loss_of(net, step).backward()
            opt.step()
            (opt if whose == "optimizer" else net).zero_grad(set_to_none)
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_after_remove_gradients_set_to_zero_in_place_are_ordinary_ones() -> None:
    runs = []
    for in_backward in (False, True):
        net, opt = make()
        if in_backward:
            with step_in_backward(net, opt):
                train(net, opt, range(1))
        else:
            train(net, opt, range(1))
        for step in range(1, 4):
            opt.zero_grad(set_to_none=False)
            loss_of(net, step).backward()
            assert type(net.middle.weight.grad) is Tensor
            opt.step()
        runs.append(copied([*net.embedding.parameters(), *net.middle.parameters()]))
    assert_same_bits(runs[0], runs[1])


def test_a_model_may_be_converted_after_a_step() -> None:
    net, opt = make()
    handle = step_in_backward(net, opt)
    train(net, opt, range(1))
    net.to(torch.bfloat16)
    assert {param.dtype for param in net.parameters()} == {torch.bfloat16}
    assert isinstance(net.middle.weight.grad, SteppedGradient)
    assert net.middle.weight.grad.dtype == torch.bfloat16
    train(net, opt, range(1, 2))
    net.share_memory()
    handle.remove()
    net.to(torch.float32)
    train(net, opt, range(2, 3))
    assert int(opt.state[net.middle.weight]["step"]) == 3


def test_gradients_with_a_graph_are_left_to_step() -> None:
    runs = []
    for in_backward in (False, True):
        weight = nn.Parameter(torch.full((64, 128), 0.5))
        opt = AdamW8bit([weight])
        if in_backward:
            step_in_backward(nn.ParameterList([weight]), opt)
        for _ in range(3):
            (weight**3).sum().backward(create_graph=True)
            grad = weight.grad
            assert grad is not None
            assert grad.requires_grad
            (penalty,) = torch.autograd.grad(grad.square().sum(), weight)
            weight.grad = grad.detach() + penalty
            opt.step()
            opt.zero_grad()
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_nothing_keeps_an_optimizer_alive() -> None:
    net, opt = make()
    handle = step_in_backward(net, opt)
    train(net, opt, range(1))
    gone = weakref.ref(opt)
    del opt, handle
    gc.collect()
    assert gone() is None
    net.zero_grad()
    loss_of(net, 1).backward()
    assert type(net.middle.weight.grad) is Tensor


def test_removed_it_leaves_an_ordinary_optimizer() -> None:
    expected, ordinary = make()
    train(expected, ordinary, range(6))
    net, opt = make()
    handle = step_in_backward(net, opt)
    train(net, opt, range(2))
    handle.remove()
    handle.remove()
    train(net, opt, range(2, 4))
    assert type(net.middle.weight.grad) is Tensor
    opt.zero_grad()
    with step_in_backward(net, opt):
        train(net, opt, range(4, 6))
        assert isinstance(net.middle.weight.grad, SteppedGradient)
    assert_same_bits(everything(opt), everything(ordinary))


def test_state_is_saved_loaded_and_copied() -> None:
    expected, ordinary = make()
    train(expected, ordinary, range(4))
    net, opt = make()
    with step_in_backward(net, opt):
        train(net, opt, range(2))
        other, loaded = make()
        other.load_state_dict(net.state_dict())
        loaded.load_state_dict(opt.state_dict())
        both = copy.deepcopy((net, opt))
        whole = io.BytesIO()
        torch.save(net, whole)
        whole.seek(0)
        assert_same_bits(torch.load(whole, weights_only=False).state_dict(), net.state_dict())
    with step_in_backward(other, loaded):
        train(other, loaded, range(2, 4))
    assert_same_bits(everything(loaded), everything(ordinary))
    train(*both, range(2, 4))
    assert type(both[0].middle.weight.grad) is Tensor
    assert_same_bits(everything(both[1]), everything(ordinary))


def test_blocks_that_are_not_finite_are_skipped_and_counted(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair
    train(net, opt, range(1))
    before = copied(list(net.parameters()))
    opt.zero_grad()
    (loss_of(net, 1) * torch.nan).backward()
    with pytest.warns(RuntimeWarning, match="non-finite gradients"):
        opt.step()
    assert opt.stats()["skipped_blocks"] > 0
    assert_same_bits(before, list(net.parameters()))


def test_a_pass_that_is_broken_off_does_not_disturb_the_next(pair: tuple[Net, AdamW8bit]) -> None:
    net, opt = pair

    def fail(_: Tensor) -> None:
        raise RuntimeError("broken off")

    hook = net.norm.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="broken off"):
        train(net, opt, range(1))
    hook.remove()
    train(net, opt, range(1, 3))
    assert int(opt.state[net.embedding.weight]["step"]) == 2


def test_checkpointed_layers_take_the_same_steps() -> None:
    runs = []
    for in_backward in (False, True):
        net, opt = make()
        net.checkpointing = False
        if in_backward:
            step_in_backward(net, opt)
        train(net, opt, range(3))
        runs.append(everything(opt))
    assert_same_bits(runs[0], runs[1])


def test_accelerate_prepares_it() -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, ordinary = make()
    train(expected, ordinary, range(3))
    net, opt = make()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(net, opt)
    with step_in_backward(prepared, wrapped):
        for step in range(3):
            wrapped.zero_grad()
            accelerator.backward(loss_of(prepared, step))
            wrapped.step()
    assert_same_bits(everything(opt), everything(ordinary))
    with (
        accelerate_settings(accelerator, gradient_accumulation_steps=4),
        pytest.raises(ValueError, match="is 4; accep"),
    ):
        step_in_backward(prepared, wrapped)
    wrapped.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="fp16"):
        step_in_backward(prepared, wrapped)
    wrapped.scaler = None


@pytest.fixture(autouse=True)
def _accelerate_is_forgotten() -> Iterator[None]:
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


class accelerate_settings:  # noqa: N801 - reads as a function
    """Other settings of an accelerator for a while."""

    def __init__(self, accelerator: Any, **settings: Any) -> None:
        self.accelerator, self.settings = accelerator, settings
        self.before = {name: getattr(accelerator, name) for name in settings}

    def __enter__(self) -> None:
        for name, value in self.settings.items():
            setattr(self.accelerator, name, value)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            setattr(self.accelerator, name, value)


# ---------------------------------------------------------------- what is said where it is not used


def test_nothing_of_accelerate_is_imported_for_it() -> None:
    code = (
        "import sys, torch; from lowmem_adam import AdamW8bit, step_in_backward; net = torch.nn.Linear(3, 5);"
        "step_in_backward(net, AdamW8bit(net.parameters())); assert 'accelerate' not in sys.modules"
    )
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True)
