"""``step_in_backward``: parameters are stepped in the backward pass, with the bits of ``step()``."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowmem_adam import AdamW8bit, reduce_scatter_hook, step_in_backward
from lowmem_adam.stand_ins import SteppedGradient, part_of
from tests.cases import DTYPES, assert_same_bits, copied
from tests.cases import everything as everything_in_order
from tests.kernel_cases import UPDATES
from tests.ranks import NEEDS_GLOO, on_ranks


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
    runs = []
    for in_backward in (False, True):
        net, opt = make()
        if in_backward:
            step_in_backward(net, opt)
        for step in range(4):
            loss_of(net, step).backward()
            opt.step()
            (opt if whose == "optimizer" else net).zero_grad(set_to_none)
        runs.append(copied(list(net.embedding.parameters())))
    # A gradient that is zero is stepped with, and none is not: what is used in each step has the same.
    assert_same_bits(runs[0], runs[1])


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
    with step_in_backward(other, loaded):
        train(other, loaded, range(2, 4))
    assert_same_bits(everything(loaded), everything(ordinary))
    assert both[1]._in_backward is None


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


def test_checkpointed_layers_are_recomputed_with_what_they_were() -> None:
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


# ---------------------------------------------------------------- what cannot be served


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
        with pytest.raises(RuntimeError, match="clipping by their global norm or a GradScaler"):
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


def test_a_sparse_gradient_is_refused_in_the_pass() -> None:
    net = nn.Embedding(64, 96, sparse=True)
    opt = AdamW8bit(net.parameters())
    with step_in_backward(net, opt):
        with pytest.raises(ValueError, match=r"layout torch.sparse_coo; accepted: dense"):
            net(torch.tensor([1, 2])).sum().backward()
        assert not opt.state


# ---------------------------------------------------------------- several ranks


def refused_on_ranks(rank: int, _: Path) -> list[str]:
    said = []
    net, _opt = make()
    ddp = DistributedDataParallel(net, find_unused_parameters=True)
    for shard_group, model in ((None, ddp), ("world", net)):
        opt = AdamW8bit(net.parameters(), shard_group=shard_group)
        try:
            step_in_backward(model, opt)
        except ValueError as error:
            said.append(str(error))
    hooked, opt = make(shard_group="world")
    reduced = DistributedDataParallel(hooked, find_unused_parameters=True)
    reduced.register_comm_hook(opt, reduce_scatter_hook)
    try:
        step_in_backward(reduced, opt)
    except ValueError as error:
        said.append(str(error))
    # The module inside does not show what is around it, until gradients are to be reduced.
    opt = AdamW8bit(net.parameters())
    step_in_backward(net, opt)
    try:
        loss_of(ddp, rank).backward()
    except RuntimeError as error:
        said.append(str(error))
    return said


@NEEDS_GLOO
def test_data_parallel_replicas_and_shared_moments_are_refused(tmp_path: Path) -> None:
    for said in on_ranks(2, refused_on_ranks, tmp_path):
        assert [
            word in sentence
            for word, sentence in zip(
                ("DistributedDataParallel", "2 ranks share the moments", "DistributedDataParallel", "step_in_backward"),
                said,
                strict=True,
            )
        ] == [True] * 4, said


def train_fsdp2(rank: int, _: Path) -> list[Any]:
    runs = []
    net: Any
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for in_backward, batches in itertools.product((False, True), (1, 2)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 96), nn.LayerNorm(96))
        for layer in (net[0], net[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        opt = AdamW8bit(net.parameters(), lr=1e-2)
        if in_backward:
            step_in_backward(net, opt)
        for step in range(4):
            opt.zero_grad()
            for batch in range(batches):
                # FSDP2's own accumulation: gradients are reduced, and final, with the last pass.
                net.set_requires_gradient_sync(batch == batches - 1)
                seed = 100 * step + 10 * batch + rank
                x = torch.randn(8, 96, generator=torch.Generator().manual_seed(seed))
                net(x).square().sum().backward()
            opt.step()
        stepped = [isinstance(part_of(param.grad), SteppedGradient) for param in net.parameters()]
        assert stepped == [in_backward] * len(stepped)
        if in_backward:
            with pytest.raises(RuntimeError, match="clipping by their global norm"):
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        runs.append([param.detach().full_tensor() for param in net.parameters()])
    return runs


@NEEDS_GLOO
def test_fsdp2_is_stepped_in_its_backward_pass(tmp_path: Path) -> None:
    for runs in on_ranks(2, train_fsdp2, tmp_path):
        assert_same_bits(runs[0], runs[2])
        assert_same_bits(runs[1], runs[3])
        assert not torch.equal(runs[0][0], runs[1][0])


# ---------------------------------------------------------------- what is said where it is not used


def test_nothing_of_accelerate_is_imported_for_it() -> None:
    code = (
        "import sys, torch; from lowmem_adam import AdamW8bit, step_in_backward; net = torch.nn.Linear(3, 5);"
        "step_in_backward(net, AdamW8bit(net.parameters())); assert 'accelerate' not in sys.modules"
    )
    with warnings.catch_warnings():
        subprocess.run([sys.executable, "-c", code], check=True)
