"""Non-finite gradients in the three modes."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import AdamW8bit
from lowmem_adam.layout import Layout
from tests.cases import (
    DTYPES,
    SHAPES,
    assert_same_bits,
    bits,
    copied,
    everything,
    make_params,
    params_of,
    set_gradients,
    train,
)

HIT = tuple(s for s in SHAPES if s.name not in ("long vector", "flat partition", "one column"))
BAD = (math.inf, -math.inf, math.nan)


def spoil(params: list[Any], turn: int = 0) -> list[Tensor]:
    """Make some gradient elements non-finite, in every third block; returns the masks of the blocks hit."""
    masks = []
    for param in params:
        layout = Layout.of(param.shape)
        flat, mask = param.grad.reshape(-1), torch.zeros(param.numel(), dtype=torch.bool)
        for block in range(turn % 3, layout.n_blocks, 3):
            low, high = layout.block_start(block), layout.block_start(block + 1)
            mask[low:high] = True
            flat[low + (block * 7) % (high - low)] = BAD[block // 3 % 3]
        param.grad = flat.view(param.shape)
        masks.append(mask.view(param.shape))
    return masks


def blocks_hit(params: list[Any], turn: int = 0) -> int:
    return sum(len(range(turn % 3, Layout.of(param.shape).n_blocks, 3)) for param in params)


def per_block(mask: Tensor) -> Tensor:
    """A mask of elements, whole blocks, as a mask of the metadata."""
    layout = Layout.of(mask.shape)
    starts = torch.tensor([layout.block_start(block) for block in range(layout.n_blocks)], dtype=torch.int64)
    return mask.reshape(-1)[starts].view(layout.rows, layout.blocks_per_row)


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.filterwarnings("ignore:non-finite:RuntimeWarning")
def test_skip_keeps_the_blocks_hit_and_moves_the_others(dtype: torch.dtype, moments: str, warm: int) -> None:
    params, twins = make_params(HIT, dtype), make_params(HIT, dtype)
    opt, twin = (AdamW8bit(p, lr=0.01, weight_decay=0.1, moments=moments) for p in (params, twins))
    train(opt, params, warm)
    train(twin, twins, warm)
    before, held = copied(params), [copied(dict(opt.state.get(p, {}))) for p in params]
    set_gradients(params, warm)
    set_gradients(twins, warm)
    masks = spoil(params)
    opt.step()
    twin.step()
    assert opt.stats() == {"skipped_blocks": blocks_hit(params)}
    for i, mask in enumerate(masks):
        assert_same_bits(params[i].detach()[mask], before[i][mask], f"{HIT[i].name}: kept")
        assert_same_bits(params[i].detach()[~mask], twins[i].detach()[~mask], f"{HIT[i].name}: moved")
        for key, value in opt.state[params[i]].items():
            if key == "step":
                assert int(value) == warm + 1
                continue
            where = per_block(mask) if key.startswith("block") else mask
            old = held[i].get(key, torch.zeros_like(value))
            assert_same_bits(value[where], old[where], f"{HIT[i].name}: {key} kept")
            assert_same_bits(value[~where], twin.state[twins[i]][key][~where], f"{HIT[i].name}: {key} moved")
    train(opt, params, 2, start=warm + 1)
    assert all(bool(p.isfinite().all()) for p in params)


def test_one_warning_and_a_count_that_goes_on() -> None:
    params = make_params(HIT)
    opt = AdamW8bit(params)
    train(opt, params, 1)
    expected = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(4):
            set_gradients(params, turn)
            spoil(params, turn)
            opt.step()
            expected += blocks_hit(params, turn)
            assert opt.stats() == {"skipped_blocks": expected}
        train(opt, params, 1)
        copy.deepcopy(opt).step()
    assert opt.stats() == {"skipped_blocks": expected}
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert "skipped_blocks" in str(caught[0].message)


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("steps", [0, 2])
def test_error_changes_nothing_and_names_the_parameter(steps: int, bad: float, moments: str) -> None:
    def named() -> list[Any]:
        return [(f"layer.{i}", param) for i, param in enumerate(make_params(HIT, torch.bfloat16))]

    opt, twin = (AdamW8bit(named(), nonfinite="error", moments=moments) for _ in range(2))
    train(opt, params_of(opt), steps)
    train(twin, params_of(twin), steps)
    before = everything(opt)
    set_gradients(params_of(opt), steps)
    grad = params_of(opt)[3].grad
    assert grad is not None
    grad.view(-1)[:2] = bad
    with pytest.raises(ValueError, match=f"parameter 3.*'layer.3'.*2 of {grad.numel()} gradient elements"):
        opt.step()
    assert_same_bits(before, everything(opt))
    opt.load_state_dict(copied(opt.state_dict()))
    train(opt, params_of(opt), 2, start=steps)
    train(twin, params_of(twin), 2, start=steps)
    assert_same_bits(everything(twin), everything(opt))


def test_error_looks_at_all_groups_before_it_changes_one() -> None:
    first, second = make_params(HIT), make_params(HIT, seed=1)
    groups: list[dict[str, Any]] = [{"params": first}, {"params": second, "nonfinite": "error"}]
    opt = AdamW8bit(groups)
    train(opt, [*first, *second], 1)
    before = everything(opt)
    set_gradients([*first, *second], 1)
    second[0].grad = torch.full_like(second[0], math.nan)
    with pytest.raises(ValueError, match="param group 1, parameter 0"):
        opt.step()
    assert_same_bits(before, everything(opt))


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_propagate_is_as_torch(dtype: torch.dtype, moments: str) -> None:
    # In float32 on torch's side: in float16 its eps vanishes, and healthy parameters become infinite.
    params, twins = make_params(HIT, dtype), make_params(HIT)
    opt = AdamW8bit(params, nonfinite="propagate", moments=moments)
    theirs = torch.optim.AdamW(twins, foreach=False)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 1:
            spoil(params)
            spoil(twins)
        opt.step()
        theirs.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param.isnan(), twin.isnan())
        assert torch.equal(param.isfinite(), twin.isfinite())
    assert any(bool(param.isnan().any()) for param in params)
    assert opt.stats() == {"skipped_blocks": 0}


@pytest.mark.parametrize("nonfinite", ["skip", "error", "propagate"])
def test_finite_gradients_give_the_same_bits_in_all_modes(nonfinite: str) -> None:
    params, twins = make_params(HIT), make_params(HIT)
    opt, twin = AdamW8bit(params, nonfinite=nonfinite), AdamW8bit(twins)
    train(opt, params, 3)
    train(twin, twins, 3)
    assert_same_bits(copied(params), copied(twins))
    assert_same_bits(opt.state_dict()["state"], twin.state_dict()["state"])


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_the_largest_finite_gradients_are_finite(moments: str) -> None:
    """Their squares overflow, their sums would too: neither is an infinite gradient."""
    (param,) = make_params((HIT[0],))
    before = bits(param).clone()
    opt = AdamW8bit([param], nonfinite="skip", moments=moments, weight_decay=0.1)
    param.grad = torch.full_like(param, torch.finfo(torch.float32).max)
    opt.step()
    assert opt.stats() == {"skipped_blocks": 0}
    assert bool(param.isfinite().all())
    assert not torch.equal(before, bits(param))
