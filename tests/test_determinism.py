"""Equal seeds give equal bits: across runs, a resume, tile sizes, thread counts and cuts into fragments."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.kernels import reference
from lowmem_adam.kernels.fragment import CodedMoments, Fragment, FullMoments, StepScalars
from lowmem_adam.layout import Layout, cut_into_shards
from lowmem_adam.state import moments_of, new_state
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
    make_params,
    params_of,
    set_gradients,
    train,
)

SETTINGS = [
    pytest.param(dtype, moments, update, id=f"{str(dtype).removeprefix('torch.')}-{moments}-{update}")
    for dtype in DTYPES
    for moments in ("8bit", "32bit")
    for update in ("stochastic", "nearest")
]

SMALL = tuple(s for s in SHAPES if s.shape not in ((65535,), (65536 + 72,)))
CUT = tuple(s for s in SHAPES if s.memory == "contiguous" and s.name != "long vector")


def run(cls: OptimizerClass, dtype: torch.dtype, steps: int, *, seed: int = 0, **settings: Any) -> Adam8bit:
    params = make_params(SMALL, dtype)
    opt = cls(params, lr=0.01, seed=seed, **settings)
    train(opt, params, steps)
    return opt


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("dtype", "moments", "update"), SETTINGS)
def test_resume_equals_never_stopping(cls: OptimizerClass, dtype: torch.dtype, moments: str, update: str) -> None:
    whole = run(cls, dtype, 6, moments=moments, low_precision_update=update)

    first = run(cls, dtype, 3, moments=moments, low_precision_update=update)
    file = io.BytesIO()
    torch.save({"params": copied(params_of(first)), "opt": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = make_params(SMALL, dtype, seed=99)
    with torch.no_grad():
        for param, value in zip(params, saved["params"], strict=True):
            param.copy_(value)
    second = cls(params, moments=moments)
    second.load_state_dict(saved["opt"])
    train(second, params, 3, start=3)
    assert_same_bits(everything(whole), everything(second))


@pytest.mark.parametrize(("dtype", "moments", "update"), SETTINGS)
def test_one_seed_gives_one_result(dtype: torch.dtype, moments: str, update: str) -> None:
    settings: dict[str, Any] = {"moments": moments, "low_precision_update": update}
    one, again = run(AdamW8bit, dtype, 4, **settings), run(AdamW8bit, dtype, 4, **settings)
    assert_same_bits(everything(one), everything(again))
    other = run(AdamW8bit, dtype, 4, seed=1, **settings)
    rounds_by_seed = moments == "8bit" or (update == "stochastic" and dtype != torch.float32)
    assert differ(everything(one)["params"], everything(other)["params"]) == rounds_by_seed


@pytest.mark.parametrize("seed", [1, 2**31, 2**32, 2**40, 2**63 - 1])
def test_all_bits_of_the_seed_count(seed: int) -> None:
    one, other = run(AdamW8bit, torch.float32, 2), run(AdamW8bit, torch.float32, 2, seed=seed)
    assert differ(one.state_dict()["state"], other.state_dict()["state"])


def test_torchs_generator_is_neither_read_nor_moved() -> None:
    before = torch.get_rng_state()
    one = run(AdamW8bit, torch.bfloat16, 2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1234)
    assert_same_bits(everything(one), everything(run(AdamW8bit, torch.bfloat16, 2)))


@pytest.mark.parametrize("tile", [128, 1000, 65536, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tile_size_does_not_matter(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tile: int) -> None:
    shapes = FEW if tile == 128 else SHAPES

    def result() -> dict[str, Any]:
        params = make_params(shapes, dtype)
        opt = AdamW8bit(params)
        train(opt, params, 2)
        return everything(opt)

    usual = result()
    monkeypatch.setattr(reference, "TILE_ELEMENTS", tile)
    assert_same_bits(usual, result())


@pytest.mark.parametrize("threads", [2, 3])
def test_thread_count_does_not_matter(threads: int) -> None:
    def result() -> dict[str, Any]:
        params = make_params()
        opt = AdamW8bit(params)
        train(opt, params, 2)
        return everything(opt)

    one = result()
    torch.set_num_threads(threads)
    assert_same_bits(one, result())


def test_order_and_grouping_of_parameters_do_not_matter() -> None:
    params, again = make_params(SMALL), make_params(SMALL)
    one = AdamW8bit(params)
    two = AdamW8bit([{"params": again[5:]}, {"params": again[:5]}])
    train(one, params, 3)
    train(two, again, 3)
    assert_same_bits(copied(params), copied(again))


# ---------------------------------------------------------------- fragments


def scalars(step: int) -> StepScalars:
    return StepScalars.at_step(
        step,
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        decoupled=True,
        maximize=False,
        low_precision_update="stochastic",
        nonfinite="skip",
        seed=5,
    )


def piece(param: Tensor, state: dict[str, Tensor], first: int, end: int) -> Fragment:
    """Blocks ``[first, end)`` of a contiguous parameter, as views of it and of its state."""
    layout = Layout.of(param.shape)
    low, high = layout.block_start(first), layout.block_start(end)
    assert param.grad is not None
    whole = moments_of(state)
    moments: CodedMoments | FullMoments
    if isinstance(whole, CodedMoments):
        moments = CodedMoments(
            whole.exp_avg_code.view(-1)[low:high],
            whole.exp_avg_sq_code.view(-1)[low:high],
            whole.block_floor.view(-1)[first:end],
            whole.block_span.view(-1)[first:end],
        )
    else:
        assert isinstance(whole, FullMoments)
        moments = FullMoments(whole.exp_avg.view(-1)[low:high], whole.exp_avg_sq.view(-1)[low:high])
    return Fragment(param.detach().view(-1)[low:high], param.grad.view(-1)[low:high], moments, layout, first, end)


def poison(params: list[Any]) -> None:
    """A non-finite gradient in the third block of every parameter that has one."""
    for param in params:
        layout = Layout.of(param.shape)
        if layout.n_blocks > 2:
            param.grad.view(-1)[layout.block_start(2)] = torch.inf


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64, 5000])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_stepped_one_by_one_equal_the_whole(dtype: torch.dtype, moments: str, world_size: int) -> None:
    shapes = tuple(s for s in CUT if world_size < 5000 or s.name in ("matrix", "ragged rows", "bias", "scalar"))
    whole, cut = make_params(shapes, dtype), make_params(shapes, dtype)
    states = [[new_state(p, moments) for p in params] for params in (whole, cut)]
    shards = cut_into_shards([Layout.of(p.shape) for p in cut], world_size)
    for step in (1, 2):
        for params in (whole, cut):
            set_gradients(params, step)
            poison(params)
        skipped_whole = skipped_cut = 0
        for param, state in zip(whole, states[0], strict=True):
            fragment = piece(param, state, 0, Layout.of(param.shape).n_blocks)
            skipped_whole += int(reference.adam_step_(fragment, scalars(step)))
        for run_ in reversed([run_ for shard in shards for run_ in shard]):
            fragment = piece(cut[run_.param], states[1][run_.param], run_.first_block, run_.end_block)
            skipped_cut += int(reference.adam_step_(fragment, scalars(step)))
        assert skipped_whole == skipped_cut > 0
        assert_same_bits(copied(whole), copied(cut), "parameters")
        assert_same_bits(states[0], states[1], "state")


@pytest.mark.parametrize("shape", [(16, 300), (600, 9), (1, 5000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cut_at_any_block_start(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    row = (Shape("cut", shape, True),)

    def stepped(cuts: list[int]) -> tuple[Any, Any]:
        (param,) = make_params(row, dtype)
        state = new_state(param, "8bit")
        for step in (1, 2):
            set_gradients([param], step)
            for first, end in zip([0, *cuts], [*cuts, Layout.of(shape).n_blocks], strict=True):
                reference.adam_step_(piece(param, state, first, end), scalars(step))
        return param, state

    whole = stepped([])
    blocks = Layout.of(shape).n_blocks
    for cut in range(1, blocks, max(1, blocks // 40)):
        assert_same_bits(whole, stepped([cut]), f"cut at {cut}")
    assert_same_bits(whole, stepped(list(range(1, blocks))), "one block at a time")


def test_the_optimizer_steps_as_its_kernel_does() -> None:
    shapes = tuple(s for s in CUT if s.coded)
    params, direct = make_params(shapes, torch.bfloat16), make_params(shapes, torch.bfloat16)
    opt = AdamW8bit(params, lr=0.01, weight_decay=0.1, seed=5)
    states = [new_state(p, "8bit") for p in direct]
    for step in (1, 2, 3):
        set_gradients(params, step)
        set_gradients(direct, step)
        opt.step()
        for param, state in zip(direct, states, strict=True):
            reference.adam_step_(piece(param, state, 0, Layout.of(param.shape).n_blocks), scalars(step))
    assert_same_bits(copied(params), copied(direct))
    for param, state in zip(params, states, strict=True):
        held = {key: value for key, value in opt.state[param].items() if key != "step"}
        assert_same_bits(held, {key: value for key, value in state.items() if key != "step"})
