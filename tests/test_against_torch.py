"""Against torch's own Adam and AdamW and the float64 textbook: how near, and what must not move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lowmem_adam import Adam8bit, AdamW8bit
from lowmem_adam.kernels import rounding
from tests.cases import Shape, assert_same_bits, bits, generator, gradient, make_params
from tests.oracle import TextbookAdam

UNIT = 2.0**-24
"""Largest relative error of one fp32 rounding."""


class Row(NamedTuple):
    name: str
    decoupled: bool
    settings: dict[str, Any]


ROWS = (
    Row("AdamW", True, {"weight_decay": 0.0}),
    Row("AdamW with decay", True, {"weight_decay": 0.1}),
    Row("AdamW as it comes", True, {}),
    Row("AdamW maximizes", True, {"maximize": True, "weight_decay": 0.1}),
    Row("no first moment", True, {"betas": (0.0, 0.99)}),
    Row("beta1 squared above beta2", True, {"betas": (0.95, 0.9)}),
    Row("long memory", True, {"betas": (0.9, 0.9999)}),
    Row("neither moment", True, {"betas": (0.0, 0.0)}),
    Row("large eps", True, {"eps": 1e-4}),
    Row("large lr", True, {"lr": 0.05}),
    Row("Adam", False, {}),
    Row("Adam with decay", False, {"weight_decay": 0.01}),
    Row("Adam maximizes", False, {"maximize": True, "weight_decay": 0.01, "eps": 1e-4}),
)


def by_name(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


class Race:
    """Our fp32 moments, torch's optimizer and the textbook on the same gradients, and what rounding may do.

    The bound adds up, step by step, the worst that rounding to fp32 can do to one element (u is the update):

    * the parameter is rounded at most three times a step (decay, product, difference): 3 units of its own size;
    * the first moment takes three roundings a step, which fade with beta1: 3 / (1 - beta1) units of the largest
      gradient, which in these runs is at most 5 roots large;
    * so does the second, all of one sign: 3 * min(t, 1 / (1 - beta2)) units, half of that in its root and in u;
    * corrections, division and step size: 5 more roundings of u.

    Errors of several steps add at most linearly; with L2 decay an error of the parameter returns through the
    gradient, at most `lr * weight_decay / smallest root` of it a step, which the rows keep below 1 / steps.
    Both optimizers round, so they may differ by twice the bound.
    """

    def __init__(self, row: Row, **ours: Any) -> None:
        defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01 if row.decoupled else 0.0}
        self.settings: dict[str, Any] = {**defaults, **row.settings}
        values = torch.randn(6, 150, generator=generator(1)) * 0.1
        self.ours, self.torchs = Parameter(values.clone()), Parameter(values.clone())
        mine, theirs = (AdamW8bit, torch.optim.AdamW) if row.decoupled else (Adam8bit, torch.optim.Adam)
        self.opt = mine([self.ours], moments="32bit", **{**row.settings, **ours})
        self.torch_opt = theirs([self.torchs], foreach=False, **row.settings)
        self.textbook = TextbookAdam(values, decoupled=row.decoupled, **self.settings)
        self.bound = 0.0

    def run(self, steps: int) -> None:
        beta1, beta2 = self.settings["betas"]
        lr = self.settings["lr"]
        for t in range(1, steps + 1):
            grad = gradient(self.ours, 3, 0, t, decades=2.0)
            self.ours.grad, self.torchs.grad = grad, grad.clone()
            self.opt.step()
            self.torch_opt.step()
            before = self.textbook.param
            moved = float((self.textbook.step(grad) - before).abs().max())
            largest = float(self.textbook.param.abs().max())
            of_update = 1.5 * min(t, 1 / (1 - beta2)) + 5
            self.bound += UNIT * (3 * largest + 15 * lr / (1 - beta1) + moved * of_update)

    def errors(self) -> tuple[Tensor, Tensor]:
        """Ours and torch's, from the textbook, float64."""
        return self.ours.detach().double() - self.textbook.param, self.torchs.detach().double() - self.textbook.param

    def follows(self) -> bool:
        """Within the bound, and no farther from the textbook than torch: its rounding errors add up the same way."""
        ours, torchs = self.errors()
        near = float(ours.abs().max()) <= self.bound and float((ours - torchs).abs().max()) <= 2 * self.bound
        return near and float(ours.norm()) <= 1.5 * float(torchs.norm())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_fp32_moments_follow_torch_to_rounding(row: Row) -> None:
    race = Race(row)
    race.run(1000)
    assert race.follows(), f"bound {race.bound}, errors {[float(e.abs().max()) for e in race.errors()]}"
    exp_avg_sq = race.opt.state[race.ours]["exp_avg_sq"].double()
    worst = 3 * min(1000, 1 / (1 - race.settings["betas"][1])) * UNIT
    assert float((exp_avg_sq / race.textbook.exp_avg_sq - 1).abs().max()) <= worst + 1e-6


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("AdamW", {"betas": (0.9, 0.9989)}),
        ("AdamW", {"betas": (0.8999, 0.999)}),
        ("AdamW", {"weight_decay": 1e-4}),
        ("large eps", {"eps": 1.01e-4}),
        ("Adam with decay", {"weight_decay": 0.01001}),
        ("AdamW as it comes", {"lr": 1.001e-3}),
        ("Adam maximizes", {"maximize": False}),
    ],
    ids=str,
)
def test_a_slightly_wrong_setting_is_seen(name: str, wrong: dict[str, Any]) -> None:
    race = Race(by_name(name), **wrong)
    race.run(300)
    assert not race.follows()


@pytest.mark.parametrize(("decades", "most"), [(0, 0.022), (2, 0.044), (4, 0.067), (6, 0.083)])
@pytest.mark.parametrize("seed", [0, 1])
def test_8_bit_moments_stay_near(decades: int, most: float, seed: int) -> None:
    """Distance between 8-bit and fp32 after 300 free steps, relative to the way gone, by spread of gradient scales."""
    noise = generator(seed)
    start = torch.randn(64, 512, generator=noise) * 0.02
    scale = 0.01 * 10.0 ** (-decades * torch.rand(64, 512, generator=noise))
    eight, full = Parameter(start.clone()), Parameter(start.clone())
    opt = AdamW8bit([eight], weight_decay=0.0)
    torch_opt = torch.optim.AdamW([full], weight_decay=0.0, foreach=False)
    for _ in range(300):
        eight.grad = full.grad = torch.randn(64, 512, generator=noise) * scale
        opt.step()
        torch_opt.step()
    error = float((eight.detach() - full.detach()).norm() / (full.detach() - start).norm())
    assert 1e-4 < error <= most  # 0 would mean that nothing was coded


# ---------------------------------------------------------------- what never had a gradient


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-46])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_without_gradient_only_weight_decay_moves(
    moments: str, weight_decay: float, eps: float, maximize: bool
) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
    (param,) = make_params((Shape("matrix", (40, 300), True),))
    never = torch.zeros(param.shape, dtype=torch.bool)
    never[:, ::3] = True  # lonely elements in busy blocks
    never[7, :] = True  # whole blocks
    expected = param.detach().clone()
    opt = AdamW8bit([param], moments=moments, **settings)
    for step in range(50):
        param.grad = gradient(param, 1, 0, step).masked_fill(never, -0.0 if step % 2 else 0.0)
        opt.step()
        expected = expected * (1 - 0.01 * weight_decay)
    assert torch.equal(param[never], expected[never])
    assert bool(param.isfinite().all())
    assert not bool((param[~never] == expected[~never]).any())


@pytest.mark.parametrize("cls", [AdamW8bit, Adam8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moments", ["8bit", "32bit"])
def test_without_gradient_and_decay_every_value_keeps_its_bits(
    cls: Callable[..., Adam8bit], dtype: torch.dtype, moments: str
) -> None:
    """Every finite 16-bit value (in float32 random bit patterns, -0.0 and subnormals included)."""
    if dtype == torch.float32:
        patterns = torch.randint(-(2**31), 2**31, (256, 256), generator=generator(1), dtype=torch.int64)
        values = patterns.to(torch.int32).view(dtype)
    else:
        values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).view(256, 256)
    values = values.nan_to_num(0.0, 0.0, 0.0)
    param = Parameter(values.clone())
    opt = cls([param], moments=moments, weight_decay=0.0)
    for _ in range(20):
        param.grad = torch.zeros_like(param)
        opt.step()
    assert torch.equal(param.detach(), values)
    assert_same_bits(param.detach()[values != 0], values[values != 0])


@pytest.mark.parametrize("word", [0, 1, 255, 32767, 32768, 65280, 65534, 65535])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_every_value_that_needs_none(dtype: torch.dtype, word: int) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = values[values.isfinite()]
    round_ = rounding.stochastic_bfloat16 if dtype == torch.bfloat16 else rounding.stochastic_float16
    wide = values.float()
    assert_same_bits(round_(wide, torch.full(wide.shape, word, dtype=torch.int32)), values)


@pytest.mark.parametrize("moments", ["8bit", "32bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lr_zero_changes_no_parameter(dtype: torch.dtype, moments: str) -> None:
    (param,) = make_params((Shape("matrix", (64, 128), True),), dtype)
    before = bits(param).clone()
    opt = AdamW8bit([param], lr=0.0, moments=moments, weight_decay=0.1)
    for step in range(3):
        param.grad = gradient(param, 1, 0, step)
        opt.step()
    assert torch.equal(bits(param), before)


def test_a_large_gradient_does_not_stop_its_neighbours() -> None:
    """A finite gradient whose square overflows: the 127 others of its block move on as without it."""
    (param,) = make_params((Shape("matrix", (32, 128), True),))
    (twin,) = make_params((Shape("matrix", (32, 128), True),))
    opts = AdamW8bit([param]), AdamW8bit([twin])
    for step in range(20):
        param.grad, twin.grad = gradient(param, 1, 0, step), gradient(twin, 1, 0, step)
        if step == 5:
            param.grad[3, 17] = 3e30
        for opt in opts:
            opt.step()
    assert bool(param.isfinite().all())
    others = torch.ones(param.shape, dtype=torch.bool)
    others[3, 17] = False
    assert torch.equal(param[others], twin[others])
