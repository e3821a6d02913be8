"""Our optimizers in accelerate's hands: prepared, clipped, scaled, saved by one rank, sharded by FSDP2."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

pytest.importorskip("accelerate", reason="these are its calls")

from accelerate import Accelerator

from lowmem_adam import Adam8bit, AdamW8bit, agreement, reduce_scatter_hook
from lowmem_adam.local import whole_tensor
from tests.cases import assert_same_bits, copied, gradient, params_of
from tests.fsdp_on_cpu import choose_fsdp
from tests.launching import forget_accelerate
from tests.ranks import NEEDS_GLOO, on_ranks
from tests.shard_jobs import in_order, values
from tests.test_ddp import Model, loss_of
from tests.test_dtensor import Net
from tests.test_shard_accelerate import accelerator_of

SCALE = 2.0**10


def settings_of(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of all groups, with the shapes of their parameters."""
    return [{**group, "params": [tuple(param.shape) for param in group["params"]]} for group in opt.param_groups]


def grouped(model: nn.Module, **settings: Any) -> AdamW8bit:
    """Two groups, of one of which decay is off."""
    decay = [param for param in model.parameters() if param.ndim > 1]
    rest = [param for param in model.parameters() if param.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decay}, {"params": rest, "weight_decay": 0.0, "lr": 3e-2}]
    return AdamW8bit(groups, lr=1e-2, weight_decay=0.1, **settings)


@pytest.fixture(autouse=True)
def a_process_of_its_own() -> Iterator[None]:
    """Tests begin and end without accelerate's state, which is the process's."""
    forget_accelerate()
    yield
    forget_accelerate()


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize("order", ["together", "model first", "optimizer first"])
def test_prepared_in_any_order(order: str) -> None:
    """The same steps as without accelerate, to the bit, and the same param groups."""
    accelerator = Accelerator(cpu=True)
    results: list[Any] = []
    for through in (True, False):
        model = Model()
        opt: Any = grouped(model)
        plain, groups = opt, settings_of(opt)
        if through and order == "together":
            model, opt = accelerator.prepare(model, opt)
        elif through:
            for what in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
                if what == "model":
                    model = accelerator.prepare(model)
                else:
                    opt = accelerator.prepare(opt)
        assert settings_of(plain) == groups
        for step in range(3):
            loss_of(model, 0, step).backward()
            opt.step()
            opt.zero_grad()
        results.append({"params": values(plain), "state": in_order(plain.state_dict())})
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize("cls", [AdamW8bit, Adam8bit])
def test_a_scalers_skipped_step_is_reported(cls: type[Adam8bit]) -> None:
    """On GPUs only does accelerate make a GradScaler; torch's works on the CPU too, and is put where that would be."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    assert accelerator.scaler is None
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    model = Model()
    opt = cls(model.parameters(), lr=1e-2)
    model, through = accelerator.prepare(model, opt)
    accelerator.native_amp = True  # from here on: the model is not run in float16
    plain = Model()
    other = cls(plain.parameters(), lr=1e-2)
    for step in range(4):
        accelerator.backward(loss_of(model, 0, step))
        loss_of(plain, 0, step).backward()
        bad = step == 1
        before = copied(values(opt))
        if bad:
            params_of(opt)[0].grad[3, 5] = torch.inf  # type: ignore[index]
        norms = [
            accelerator.clip_grad_norm_(model.parameters(), 0.5),
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5),
        ]
        through.step()
        assert accelerator.optimizer_step_was_skipped == bad
        if bad:
            assert_same_bits(values(opt), before)
            assert opt.stats()["skipped_blocks"] == 0  # the whole step was left out, and not counted
        else:
            assert_same_bits(*norms)  # gradients were unscaled by a power of two
            other.step()
        through.zero_grad()
        other.zero_grad()
    assert accelerator.scaler.get_scale() == SCALE / 2
    assert_same_bits(values(opt), values(other))
    assert_same_bits(in_order(opt.state_dict()), in_order(other.state_dict()))


# ---------------------------------------------------------------- two ranks


def clip_job(rank: int, folder: Path) -> Any:
    """Both ways to clip that accelerate has, with shards: the steps of clipped gradients, to the bit."""
    accelerator, runs = accelerator_of(rank), []
    for through in (True, False):
        model = Model()
        opt = AdamW8bit(model.parameters(), lr=1e-2, shard_group="world" if through else None)
        wrapped: Any
        prepared: Any
        if through:
            wrapped, prepared = accelerator.prepare(model, opt)
        else:
            wrapped, prepared = nn.parallel.DistributedDataParallel(model), opt
        for step in range(4):
            loss_of(wrapped, rank, step).backward()
            if step % 2:
                (accelerator if through else nn.utils).clip_grad_value_(wrapped.parameters(), 1e-3)
            else:
                clip = accelerator.clip_grad_norm_ if through else nn.utils.clip_grad_norm_
                assert clip(wrapped.parameters(), 0.1) > 0.1
            prepared.step()
            prepared.zero_grad()
        runs.append(values(opt))
    assert_same_bits(runs[0], runs[1])
    accelerator.free_memory()

    # A rank has its part of the gradients only, so the norm of all of them is not a number, and nothing is stepped.
    model = Model()
    opt = AdamW8bit(model.parameters(), lr=1e-2, shard_group="world")
    wrapped, prepared = accelerator.prepare(model, opt)
    wrapped.register_comm_hook(opt, reduce_scatter_hook)
    before = copied(values(opt))
    loss_of(wrapped, rank, 0).backward()
    assert accelerator.clip_grad_norm_(wrapped.parameters(), 0.1).isnan()
    with pytest.warns(RuntimeWarning, match="non-finite gradients"):
        prepared.step()
    assert_same_bits(values(opt), before)
    return None


def one_saves_job(rank: int, folder: Path) -> Any:
    """The state of shards is asked of one rank alone: it says so after a while, and the others are not kept."""
    agreement.MEETING_SECONDS = 1.0
    accelerator = accelerator_of(rank)
    model = Model()
    opt = AdamW8bit(model.parameters(), lr=1e-2, shard_group="world")
    wrapped, prepared = accelerator.prepare(model, opt)
    for step in range(3):
        loss_of(wrapped, rank, step).backward()
        prepared.step()
        prepared.zero_grad()
        if step == 1 and accelerator.is_main_process:
            with pytest.raises(RuntimeError, match=r"state_dict\(\) of a sharded optimizer waited 1 s for the other"):
                accelerator.save_state(str(folder / "alone"))
    agreement.MEETING_SECONDS = 60.0
    # What makes it right: the collective first, on all ranks.
    opt.consolidate_state_dict()
    if accelerator.is_main_process:
        accelerator.save_state(str(folder / "consolidated"))
    accelerator.wait_for_everyone()
    accelerator.save_state(str(folder / "together"))
    accelerator.wait_for_everyone()
    saved = [torch.load(folder / name / "optimizer.bin", weights_only=True) for name in ("consolidated", "together")]
    assert_same_bits(*saved)
    return None


def fsdp_accelerator(rank: int) -> Any:
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    choose_fsdp()
    made = accelerator_of(rank)
    assert made.is_fsdp2
    return made


def step_with(opt: AdamW8bit, step: int) -> None:
    """Gradients of whole parameters, placed as the parameters are."""
    for index, param in enumerate(params_of(opt)):
        grad = gradient(torch.empty(param.shape), 0, index, step)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad
    opt.step()
    opt.zero_grad()


def whole_values(opt: AdamW8bit) -> list[Tensor]:
    return [copied(whole_tensor(param) if isinstance(param, DTensor) else param.detach()) for param in params_of(opt)]


def fsdp_job(rank: int, folder: Path) -> Any:
    """DTensors are put in the place of an optimizer's parameters: groups stay, and steps are right."""
    accelerator = fsdp_accelerator(rank)
    for settings in ({}, {"offload": "cpu", "offload_gradients": True}, {"moments": "32bit"}):
        model, plain = Net(), grouped(Net(), **settings)
        opt = grouped(model, **settings)
        schedules = [LambdaLR(each, lambda step: 1.0 / (step + 1)) for each in (opt, plain)]
        groups = settings_of(opt)
        accelerator.prepare(model, opt)
        assert settings_of(opt) == groups
        assert all(isinstance(param, DTensor) for param in params_of(opt))
        for step in range(3):
            step_with(opt, step)
            step_with(plain, step)
            for schedule in schedules:
                schedule.step()
        assert_same_bits(whole_values(opt), whole_values(plain), f"{settings}")
        accelerator.free_memory()
    return None


def fsdp_train_job(rank: int, folder: Path) -> Any:
    """From batches to parameters, against one process that has them all; saved, and loaded by another optimizer."""
    accelerator = fsdp_accelerator(rank)

    def train(model: Any, opt: Any, steps: range, *, alone: bool) -> None:
        for step in steps:
            rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
            accelerator.backward(model(rows if alone else rows.chunk(2)[rank]).square().mean())
            clip = nn.utils.clip_grad_norm_ if alone else accelerator.clip_grad_norm_
            clip(model.parameters(), 0.05)
            opt.step()
            opt.zero_grad()

    for moments, tolerance in (("32bit", 1e-4), ("8bit", 3e-3)):
        # Gradients are a mean of two and so off in their last bits, with which a few 8-bit moments fall into the next
        # code: three steps of 1e-2, each off by a tenth at most.
        one = grouped(plain := Net(), moments=moments)
        train(plain, one, range(3), alone=True)
        opt = grouped(model := Net(), moments=moments)
        wrapped, prepared = accelerator.prepare(model, opt)
        train(wrapped, prepared, range(3), alone=False)
        for found, expected in zip(whole_values(opt), whole_values(one), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=tolerance)
            assert (found - expected).abs().mean() < 1e-5
        if moments == "32bit":
            accelerator.free_memory()
    accelerator.save_state(str(folder / "fsdp"))
    train(wrapped, prepared, range(3, 5), alone=False)
    straight = whole_values(opt)
    accelerator.free_memory()

    again = Net()
    with torch.no_grad():
        for param in again.parameters():
            param.zero_()
    fresh = grouped(again)
    wrapped, prepared = accelerator.prepare(again, fresh)
    accelerator.load_state(str(folder / "fsdp"))
    train(wrapped, prepared, range(3, 5), alone=False)
    assert_same_bits(whole_values(fresh), straight)
    return None


def fsdp_refusals_job(rank: int, folder: Path) -> Any:
    """What cannot go on when parameters are replaced says so at the first step, on all ranks."""
    accelerator = fsdp_accelerator(rank)
    for settings, words in (
        ({"shard_group": "world"}, "DTensors, which are sharded already.*accepted with DTensors: shard_group=None"),
        ({"moments": "bnb8bit"}, "is a DTensor and moments is 'bnb8bit'"),
    ):
        opt = grouped(model := Net(), **settings)
        accelerator.prepare(model, opt)
        with pytest.raises(ValueError, match=words):
            step_with(opt, 0)
        accelerator.free_memory()
    opt = grouped(model := Net())
    step_with(opt, 0)
    saved = opt.state_dict()
    accelerator.prepare(model, opt)
    before = whole_values(opt)
    with pytest.raises(ValueError, match=r"state is of 6 parameters that are in no param group, where DTensors have"):
        step_with(opt, 1)
    assert_same_bits(whole_values(opt), before)
    opt.state.clear()
    step_with(opt, 1)
    assert all(int(opt.state[param]["step"]) == 1 for param in params_of(opt))
    assert saved["state"]
    with pytest.raises(ValueError, match="model and optimizer must be passed together"):  # accelerate's own word
        accelerator.prepare(Net())
    return None


def two_ranks_job(rank: int, folder: Path) -> Any:
    for job in (clip_job, one_saves_job):
        job(rank, folder)
        forget_accelerate()
    return dist.get_world_size()


def fsdp_ranks_job(rank: int, folder: Path) -> Any:
    for job in (fsdp_job, fsdp_train_job, fsdp_refusals_job):
        job(rank, folder)
        forget_accelerate()
    return dist.get_world_size()


@NEEDS_GLOO
def test_two_ranks_clip_and_save(tmp_path: Path) -> None:
    assert on_ranks(2, two_ranks_job, tmp_path) == [2, 2]


@NEEDS_GLOO
def test_fsdp2(tmp_path: Path) -> None:
    assert on_ranks(2, fsdp_ranks_job, tmp_path) == [2, 2]
