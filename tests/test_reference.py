"""The reference step: the paper's order spelled out a second time, rounding of 16-bit parameters, tiles and tails."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_adam import codec
from lowmem_adam.kernels import BACKENDS, choose, reference, rounding
from lowmem_adam.kernels.fragment import Fragment, StepScalars
from lowmem_adam.layout import Layout, Tile
from lowmem_adam.state import moments_of, new_state
from tests.oracle import TextbookAdam

SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "decoupled": True,
    "maximize": False,
    "low_precision_update": "nearest",
    "nonfinite": "skip",
    "seed": 0,
}


def scalars(step: int, **changes: Any) -> StepScalars:
    return StepScalars.at_step(step, **{**SETTINGS, **changes})


def step_(param: Tensor, grad: Tensor, state: dict[str, Tensor], record: StepScalars) -> int:
    layout = Layout.of(param.shape)
    fragment = Fragment(param, grad, moments_of(state), layout, 0, layout.n_blocks)
    return int(reference.adam_step_(fragment, record))


def plain_step(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, s: StepScalars) -> tuple[Tensor, Tensor, Tensor]:
    """The step of one element after the other, each operation rounded to float32 by hand."""

    def f32(x: float) -> float:
        return torch.tensor(x, dtype=torch.float64).to(torch.float32).item()

    out = []
    for p, g, mm, vv in zip(param.tolist(), grad.tolist(), m.tolist(), v.tolist(), strict=True):
        g = f32(g * f32(s.grad_scale))
        g = -g if s.maximize else g
        if s.weight_decay:
            g = f32(g + f32(p * f32(s.weight_decay)))
        mm = f32(f32(mm * f32(s.beta1)) + f32(g * f32(1 - s.beta1)))
        vv = f32(f32(vv * f32(s.beta2)) + f32(f32(g * f32(1 - s.beta2)) * g))
        # The square root of a float32, taken in double and rounded, is the correctly rounded one.
        denominator = f32(f32(math.sqrt(vv)) + f32(s.eps))
        out.append((f32(f32(p * f32(s.shrink)) - f32(f32(mm * f32(s.step_size)) / denominator)), mm, vv))
    columns = [torch.tensor(column) for column in zip(*out, strict=True)]
    return columns[0], columns[1], columns[2]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0},
        {"decoupled": False},
        {"maximize": True},
        {"betas": (0.0, 0.99)},
        {"eps": 1e-3},
        {"grad_scale": 0.37},
        {"grad_scale": 0.37, "maximize": True, "decoupled": False},
    ],
)
def test_fp32_moments_take_the_written_order_to_the_bit(changes: dict[str, Any]) -> None:
    param = torch.randn(300)
    state = new_state(param, "32bit")
    want = (param.clone(), torch.zeros(300), torch.zeros(300))
    for t in range(1, 6):
        grad = torch.randn(300) * 10.0 ** torch.randint(-6, 3, (300,))
        record = scalars(t, **changes)
        want = plain_step(want[0], grad, want[1], want[2], record)
        step_(param, grad, state, record)
    for got, wanted in zip((param, state["exp_avg"], state["exp_avg_sq"]), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (33, 129), (820, 5), (3, 2000), (65536,)])
def test_8bit_is_decode_then_adam_then_encode(shape: tuple[int, ...]) -> None:
    """The coded step, tile by tile, equals coding all blocks of the tensor around an fp32 step, to the bit."""
    layout = Layout.of(shape)
    param = torch.randn(shape)
    state = new_state(param, "8bit")
    for t in range(1, 4):
        grad = torch.randn(shape)
        want_param, want_codes = whole_tensor_step(param.clone(), grad, state, layout, scalars(t))
        step_(param, grad, state, scalars(t))
        assert torch.equal(param, want_param)
        assert torch.equal(state["exp_avg_code"], want_codes[0])
        assert torch.equal(state["exp_avg_sq_code"], want_codes[1])
        assert torch.equal(state["block_floor"].flatten(), want_codes[2])
        assert torch.equal(state["block_span"].flatten(), want_codes[3])


def whole_tensor_step(
    param: Tensor, grad: Tensor, state: dict[str, Tensor], layout: Layout, record: StepScalars
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Row by row and block by block in Python; no tiles, no padding."""
    flat_param, flat_grad = param.view(-1), grad.reshape(-1)
    new = [state[k].flatten().clone() for k in ("exp_avg_code", "exp_avg_sq_code", "block_floor", "block_span")]
    for block in range(layout.n_blocks):
        low, high = layout.block_start(block), layout.block_start(block + 1)
        old = codec.Codes(
            state["exp_avg_code"].view(-1)[low:high][None],
            state["exp_avg_sq_code"].view(-1)[low:high][None],
            codec.Grid(
                state["block_floor"].view(-1)[block : block + 1], state["block_span"].view(-1)[block : block + 1]
            ),
        )
        m, root = codec.decode(old)
        full = {"exp_avg": m[0].clone(), "exp_avg_sq": root[0] * root[0]}
        piece = flat_param[low:high].clone()
        step_(piece, flat_grad[low:high], full, record)
        flat_param[low:high] = piece
        dither = codec.Dither(Tile(1, high - low, low, block), record.step, record.seed, torch.device("cpu"))
        codes = codec.encode(full["exp_avg"][None], reference.exact_sqrt(full["exp_avg_sq"])[None], dither)
        new[0][low:high], new[1][low:high] = codes.exp_avg[0], codes.root[0]
        new[2][block], new[3][block] = codes.grid.floor[0], codes.grid.span[0]
    return param, (new[0].view(param.shape), new[1].view(param.shape), new[2], new[3])


def test_the_first_steps_follow_the_textbook() -> None:
    """float64 Adam against fp32 moments over 50 steps.

    A step's update is about 1 * lr and is off by at most some 20 roundings of 2^-24 of it. The parameter is rounded
    twice a step, by at most 2^-24 of its size, and the factor 1 - lr * weight_decay once, by 2^-25.
    """
    param = torch.randn(500)
    oracle = TextbookAdam(param, lr=1e-3, weight_decay=0.1)
    state = new_state(param, "32bit")
    for t in range(1, 51):
        grad = torch.randn(500)
        step_(param, grad, state, scalars(t))
        oracle.step(grad)
    bound = 50 * (20 * 2.0**-24 * 1e-3 + 2.5 * 2.0**-24 * oracle.param.abs())
    assert ((param - oracle.param).abs() <= bound).all()


def test_square_roots_are_correctly_rounded() -> None:
    """Every mantissa of both parities of the exponent: r is the nearest float to sqrt(x).

    That is, x lies between the squares of r's two rounding boundaries, which have 25 bits and whose squares are exact
    in double.
    """
    for exponent in (127, 128):
        for start in range(0, 2**23, 2**21):
            x = (torch.arange(start, start + 2**21, dtype=torch.int32) + (exponent << 23)).view(torch.float32)
            r = reference.exact_sqrt(x)
            half = torch.full_like(r, 2.0**-24, dtype=torch.float64)  # r lies in [1, 2)
            assert ((r.double() - half).square() <= x).all()
            assert (x <= (r.double() + half).square()).all()


# ---------------------------------------------------------------- rounding of 16-bit parameters


@pytest.mark.parametrize(
    ("dtype", "round_", "bits"),
    [(torch.bfloat16, rounding.stochastic_bfloat16, 16), (torch.float16, rounding.stochastic_float16, 13)],
)
def test_stochastic_rounding_takes_a_neighbour_with_the_right_probability(
    dtype: torch.dtype, round_: Any, bits: int
) -> None:
    values = torch.cat(
        [torch.randn(200), torch.randn(100) * 1e-3, torch.randn(50) * 1e3, torch.tensor([0.0, 1.0, -2.5])]
    )
    words = torch.arange(0, 65536, 2 ** (16 - min(bits, 13)), dtype=torch.int32)
    rounded = round_(values[:, None].expand(-1, len(words)).contiguous(), words.expand(len(values), -1)).double()
    down, up = rounded.amin(dim=1), rounded.amax(dim=1)
    exact = values.double()
    assert (down <= exact).all()
    assert (exact <= up).all()
    assert ((rounded == down[:, None]) | (rounded == up[:, None])).all()
    # All words once: the mean is the value itself, up to the words' own step of 2^-13 or 2^-16 of the gap.
    gap = up - down
    assert ((rounded.mean(dim=1) - exact).abs() <= gap * 2.0**-13 + 1e-12 * exact.abs()).all()
    representable = exact == exact.to(dtype).double()
    assert representable.sum() >= 3
    assert torch.equal(down[representable], up[representable])


def test_stochastic_rounding_at_the_edges_of_float16() -> None:
    words = torch.arange(0, 65536, 8, dtype=torch.int32)
    below = torch.full((len(words),), 3.3 * 2.0**-24)
    rounded = rounding.stochastic_float16(below, words).double()
    assert set((rounded * 2**24).tolist()) == {3.0, 4.0}
    assert rounded.mean().item() * 2**24 == pytest.approx(3.3, abs=1e-3)
    for x in (torch.inf, -torch.inf, 1e6, -1e6):
        assert (rounding.stochastic_float16(torch.full((4,), x), words[:4]) == math.copysign(torch.inf, x)).all()
    for round_ in (rounding.stochastic_float16, rounding.stochastic_bfloat16):
        assert round_(torch.full((4,), torch.nan), words[-4:]).isnan().all()
        assert (round_(torch.full((4,), -torch.inf), words[-4:]) == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_the_rounding_step_add_up(dtype: torch.dtype) -> None:
    """400 updates of a 20th of a rounding step: lost by rounding to nearest, there on average when stochastic."""
    travelled = {}
    for mode in ("nearest", "stochastic"):
        param = torch.full((64, 128), 1.0, dtype=dtype)
        state = new_state(param, "8bit")
        for t in range(1, 401):
            grad = torch.ones(64, 128, dtype=dtype)
            # A steady gradient makes every update lr: here a 20th of the gap below 1.
            gap = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
            record = scalars(t, lr=gap / 20, weight_decay=0.0, low_precision_update=mode)
            step_(param, grad, state, record)
        travelled[mode] = (1.0 - param.double()).mean().item() / (400 * gap / 20)
    assert travelled["nearest"] == 0.0
    # The gap does not change below 1 down to 0.5, so the mean is exact up to the spread of 8,192 elements' roundings
    # (at most one gap each, 20 gaps travelled) and 1% for the update itself: m and s are coded.
    assert travelled["stochastic"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_of_nothing_changes_no_parameter(dtype: torch.dtype) -> None:
    param = torch.randn(64, 128).to(dtype)
    before = param.clone()
    for mode in ("nearest", "stochastic"):
        state = new_state(param, "8bit")
        step_(param, torch.zeros_like(param), state, scalars(1, lr=0.0, low_precision_update=mode))
        assert torch.equal(param, before)
        assert all(not state[key].any() for key in ("exp_avg_code", "exp_avg_sq_code", "block_floor", "block_span"))


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("exponent", range(-30, 31, 4))
def test_gradients_of_any_magnitude_leave_everything_finite(exponent: int) -> None:
    param = torch.randn(64, 128)
    state = new_state(param, "8bit")
    for t in range(1, 20):
        step_(param, torch.randn(64, 128) * 10.0**exponent, state, scalars(t))
    assert param.isfinite().all()
    m, root = codec.decode(
        codec.Codes(
            state["exp_avg_code"],
            state["exp_avg_sq_code"],
            codec.Grid(state["block_floor"].view(-1), state["block_span"].view(-1)),
        )
    )
    assert m.isfinite().all()
    assert root.isfinite().all()


def test_without_eps_an_element_without_gradient_stays() -> None:
    for moments in ("8bit", "32bit"):
        param = torch.randn(64, 128)
        before, grad = param.clone(), torch.randn(64, 128)
        grad[:, ::2] = 0
        state = new_state(param, moments)
        for eps in (0.0, 1e-60):
            step_(param, grad, state, scalars(1, eps=eps, weight_decay=0.0))
        assert torch.equal(param[:, ::2], before[:, ::2])
        assert (param[:, 1::2] != before[:, 1::2]).all()
        assert param.isfinite().all()


def test_every_backend_is_chosen_by_its_name() -> None:
    assert choose("reference", torch.device("cpu")) == "reference"
    assert choose(None, torch.device("cpu")) in BACKENDS
    assert choose(None, torch.device("meta")) == "reference"
