"""Runs that are left alone: hundreds of steps beside fp32 Adam, each optimizer with its own state and parameters.

Other 8-bit optimizers' tests copy state and parameters from one side to the other after every step (bitsandbytes'
``test_optimizer8bit``) or stop after two to five (torchao's), and their gradients are normal. What a format does with
scales that lie decades apart, with outliers and with zeros shows only later and only when nothing is put right.
Statistics of bf16's stochastic rounding are below.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from benchmarks.peer_formats import FormatAdamW, Linear
from lowmem_adam import AdamW8bit, codec
from lowmem_adam.layout import BLOCK_SIZE
from tests.cases import DTYPES, bits, generator
from tests.peer_cases import (
    FORMATS,
    ROUNDINGS,
    UNIT,
    Gradients,
    Kind,
    decoded,
    every_kind,
    gap,
    kind_named,
    on_every_device,
    with_all_moments,
)

STEPS = 300
SHAPE = (64, 512)
LR = 1e-3
BETA1, BETA2 = 0.9, 0.999

MARGIN = 1.12
"""Of a format's figures, as in tests/test_against_torch.py: draws differ by 1%, figures are rounded down."""

Make = Callable[[list[Parameter]], torch.optim.Optimizer]


class Run:
    """An optimizer and torch's fp32 AdamW on the same gradients, and how far from one another they may end."""

    def __init__(
        self,
        make: Make,
        kind: Kind,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
        *,
        roundings: bool = False,
    ) -> None:
        gradients = Gradients(kind, SHAPE, STEPS, dtype, device)
        self.start = (torch.randn(SHAPE, generator=generator(2)) * 0.02).to(dtype).to(device)
        self.param, self.full = Parameter(self.start.clone()), Parameter(self.start.float().clone())
        self.opt = make([self.param])
        self.yardstick = torch.optim.AdamW([self.full], lr=LR, weight_decay=0.0, foreach=False)
        self.largest = self.full.detach().abs()
        self.rounded = torch.zeros(SHAPE, dtype=torch.float64, device=device)
        first, second = torch.zeros_like(self.rounded), torch.zeros_like(self.rounded)
        for t in range(1, STEPS + 1):
            self.param.grad = gradients.at(t - 1)
            self.full.grad = self.param.grad.float()
            self.opt.step()
            self.yardstick.step()
            self.largest = torch.maximum(self.largest, self.full.detach().abs())
            if roundings:
                self._add_roundings(first, second, t)
        self.moved = self.full.detach().double() - self.start.double()

    def _add_roundings(self, first: Tensor, second: Tensor, t: int) -> None:
        """The worst that fp32's roundings can do to an element in one run; errors of both moments fade as they do."""
        assert self.full.grad is not None
        held, size = self.yardstick.state[self.full], self.full.grad.double().abs()
        exp_avg, exp_avg_sq = held["exp_avg"].double().abs(), held["exp_avg_sq"].double()
        first.mul_(BETA1).add_(ROUNDINGS * (exp_avg + 2 * (1 - BETA1) * size))  # parts: |b1 m| + |(1 - b1) g|
        second.mul_(BETA2).add_(ROUNDINGS * exp_avg_sq)
        square = exp_avg_sq.clamp(min=torch.finfo(torch.float64).tiny)
        root = (square / (1 - BETA2**t)).sqrt() + 1e-8
        scale = LR / (1 - BETA1**t) / root
        self.rounded += scale * (first + exp_avg * (second / (2 * square) + 8 * UNIT)) + 4 * UNIT * self.largest

    def error(self, weight: Tensor) -> float:
        """How far a weight ended from fp32's, relative to the way that went."""
        return float((weight.detach().double() - self.full.detach().double()).norm() / self.moved.norm())

    def spread(self) -> Tensor:
        """Decades between the largest and smallest root in every block that has one, float64 ``(blocks, 1)``."""
        root = self.yardstick.state[self.full]["exp_avg_sq"].double().sqrt().view(-1, BLOCK_SIZE)
        least = torch.where(root > 0, root, torch.inf).amin(dim=1, keepdim=True)
        most = root.amax(dim=1, keepdim=True)
        return torch.where(most > 0, (most / least).log10(), 0.0)

    def allowed(self, moments: str, stochastic: bool) -> float:
        """The bound on ``error``.

        A block counts with the figure for the decades that its own roots ended apart (between two figures, beyond the
        last: on the line through them), squared, as squares of errors add up; its weight is the way it went. fp32
        moments may differ by what both optimizers' roundings add up to. Stochastic rounding adds at most a quarter of
        a squared gap a step: errors of mean zero, which do not reach the gradients.
        """
        if moments == "32bit":
            assert bool(self.rounded.any()), "a run without roundings=True"
            own = float(2 * self.rounded.norm())
        else:
            way = self.moved.view(-1, BLOCK_SIZE).square().sum(dim=1, keepdim=True)
            own = MARGIN * float((way * figure(moments, self.spread()).square()).sum().sqrt())
        noise = float((STEPS / 4 * gap(self.largest, self.start.dtype).square()).sum().sqrt()) if stochastic else 0.0
        return (own**2 + noise**2) ** 0.5 / float(self.moved.norm())


def figure(moments: str, decades: Tensor) -> Tensor:
    """The documented figures, on straight lines between and beyond them."""
    rows = FORMATS[moments].figures
    value = torch.full_like(decades, rows[0][1])
    for (before, low), (after, high) in pairwise(rows):
        value = torch.where(decades > before, low + (high - low) * (decades - before) / (after - before), value)
    return value


UPDATES = tuple((dtype, update) for dtype in DTYPES for update in ("fp32", "stochastic"))[1:]
"""Where the weight is a float32 (kept beside 16 bits), and where 16 bits are all there is; float32 is stepped alike."""


@on_every_device
@with_all_moments
@pytest.mark.parametrize(("dtype", "update"), UPDATES, ids=str)
@every_kind
def test_a_free_run_stays_beside_fp32(kind: Kind, dtype: torch.dtype, update: str, moments: str, device: str) -> None:
    run = Run(
        lambda params: AdamW8bit(params, LR, weight_decay=0.0, moments=moments, low_precision_update=update),
        kind,
        dtype,
        device,
        roundings=moments == "32bit",
    )
    assert isinstance(run.opt, AdamW8bit)
    stochastic = update == "stochastic" and dtype != torch.float32
    error, allowed = run.error(run.opt.master_weight(run.param)), run.allowed(moments, stochastic)
    if FORMATS[moments].stays and kind.name not in FORMATS[moments].stays:
        assert error > run.allowed("8bit", stochastic)
        return
    assert error <= allowed
    # 0 would mean that nothing was coded, or rounded.
    assert (error > 1e-4) == (moments != "32bit" or stochastic)

    exp_avg_sq = run.yardstick.state[run.full]["exp_avg_sq"].double()
    ratio = (decoded(run.opt, run.param)[1] / exp_avg_sq).sqrt()
    assert torch.equal(exp_avg_sq == 0, ratio.isnan())  # of what never had a gradient, and of nothing else: 0 / 0
    if moments == "32bit":
        assert bool(((ratio[exp_avg_sq > 0] - 1).abs() <= 2 * ROUNDINGS * STEPS).all())
    near = (run.spread() <= 2).expand(-1, BLOCK_SIZE).reshape(SHAPE) & (exp_avg_sq > 0)
    if int(near.sum()) > 1000:
        low, high = torch.quantile(ratio[near], torch.tensor([0.05, 0.95], dtype=torch.float64, device=device))
        assert low >= FORMATS[moments].root_ratio[0]
        assert high <= FORMATS[moments].root_ratio[1]


def bitsandbytes_own(params: list[Parameter]) -> torch.optim.Optimizer:
    optim = pytest.importorskip("bitsandbytes.optim", reason="the negative control is bitsandbytes itself")
    made: torch.optim.Optimizer = optim.AdamW8bit(params, lr=LR, weight_decay=0.0)
    return made


def linear(params: list[Parameter]) -> torch.optim.Optimizer:
    return FormatAdamW(params, Linear, lr=LR, weight_decay=0.0)


@pytest.mark.parametrize("name", ["six decades", "half stops", "outliers anywhere"])
@pytest.mark.parametrize("make", [bitsandbytes_own, linear])
def test_formats_that_lose_small_second_moments_leave(make: Make, name: str) -> None:
    """The negative control: the same runs, judged alike, of formats that do not keep what ours keeps.

    Both store v against its block's largest, so that it becomes 0 where a gradient is some hundred times smaller (ten
    times, stored linearly) while m survives.
    """
    run = Run(make, kind_named(name))
    assert run.error(run.param) > 2 * run.allowed("8bit", stochastic=False)


@pytest.mark.parametrize("name", ["six decades", "constant", "stops"])
def test_rounding_codes_to_nearest_leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another negative control: our format without its dither, which only a run that is left alone can miss."""
    thresholds = codec.Dither.moment_thresholds

    def middle(dither: codec.Dither) -> tuple[Tensor, Tensor, Tensor]:
        root, ratio, nearest = thresholds(dither)
        return torch.full_like(root, 1.5), torch.full_like(ratio, 128.5), torch.ones_like(nearest)

    monkeypatch.setattr(codec.Dither, "moment_thresholds", middle)
    run = Run(lambda params: AdamW8bit(params, LR, weight_decay=0.0, backend="reference"), kind_named(name))
    assert run.error(run.param) > 2 * run.allowed("8bit", stochastic=False)


def test_what_stores_small_second_moments_differently_is_judged_by_the_same_rule() -> None:
    """The rule is no harder than what others say of themselves: bitsandbytes is near where scales are equal."""
    run = Run(bitsandbytes_own, kind_named("normal"))
    assert run.error(run.param) <= run.allowed("bnb8bit", stochastic=False)


def test_slightly_wrong_settings_leave_too() -> None:
    """fp32 moments with another beta2, judged by the bound of fp32 moments; with a wrong lr by that of 8 bits."""
    settings: dict[str, Any] = {"weight_decay": 0.0, "moments": "32bit"}
    run = Run(lambda params: AdamW8bit(params, LR, (BETA1, 0.998), **settings), kind_named("normal"), roundings=True)
    assert run.error(run.param) > run.allowed("32bit", stochastic=False)
    run = Run(lambda params: AdamW8bit(params, LR * 1.05, **settings), kind_named("normal"))
    assert run.error(run.param) > run.allowed("8bit", stochastic=False)


# ---------------------------------------------------------------- stochastic rounding of 16-bit parameters

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
STANDARD_ERRORS = 5.0
"""A normal variable is farther from its mean once in two million times."""


@on_every_device
@with_all_moments
@HALVES
def test_of_one_step_many_copies_are_right_on_average(dtype: torch.dtype, moments: str, device: str) -> None:
    """32 values with 16,384 copies each, one step: neighbours only, and both in proportion to their nearness.

    The number of copies rounded up is binomial, if they are rounded independently of one another, so its mean is off by
    ``gap * sqrt(f (1 - f) / copies)`` in one standard error, f being where between the two the value lies.
    """
    copies = 16384
    values = (torch.rand(32, 1, generator=generator(3)) * 100).to(dtype).to(device)
    param, full = (Parameter(values.expand(-1, copies).contiguous().to(kind)) for kind in (dtype, torch.float32))
    settings: dict[str, Any] = {"lr": 0.0123, "weight_decay": 0.0, "moments": moments}
    opts = AdamW8bit([param], **settings), AdamW8bit([full], **settings)
    for one in (param, full):
        one.grad = torch.ones_like(one)
    for opt in opts:
        opt.step()
    exact, got = full.detach()[:, 0].double(), param.detach().double()
    assert bool((full == full[:, :1]).all())
    down, up = got.amin(dim=1), got.amax(dim=1)
    assert bool(((down <= exact) & (exact <= up)).all())
    assert bool(((got == down[:, None]) | (got == up[:, None])).all())
    step = torch.nextafter(down.to(dtype), torch.full_like(down, torch.inf).to(dtype)).double() - down
    assert bool(((up == down) | (up - down == step)).all())
    share = (exact - down) / step
    error = step * (share * (1 - share) / copies).sqrt()
    inside = (share > 0.01) & (share < 0.99)
    assert int(inside.sum()) >= 16
    assert bool((up > down)[inside].all())
    assert bool(((got.mean(dim=1) - exact).abs() <= STANDARD_ERRORS * error + 1e-12 * exact).all())


@on_every_device
@with_all_moments
@HALVES
@pytest.mark.parametrize("share", [0.004, 0.05, 0.3])
def test_many_tiny_updates_add_up_on_average_and_are_lost_to_nearest(
    share: float, dtype: torch.dtype, moments: str, device: str
) -> None:
    """200 steps of a share of the rounding step, of 32,768 elements with moments like those of a float32 twin.

    A step's rounding is off by a Bernoulli variable of variance ``f (1 - f)`` of squared gaps, at most ``share`` while
    f is that, and errors of steps and elements have mean zero: the mean of all is off by at most
    ``gap * sqrt(steps * share / elements)`` in one standard error.
    """
    steps, shape = 200, (64, 512)
    start = torch.full(shape, 1.5, dtype=dtype, device=device)
    step = float(gap(start, dtype)[0, 0])
    moved: dict[str, float] = {}
    for name, kind in (("stochastic", dtype), ("nearest", dtype), ("exact", torch.float32)):
        param = Parameter(start.to(kind).clone())
        settings: dict[str, Any] = {"moments": moments, "weight_decay": 0.0}
        update = "stochastic" if name == "exact" else name
        opt = AdamW8bit([param], lr=share * step, low_precision_update=update, **settings)
        for _ in range(steps):
            param.grad = torch.full_like(param, 0.25)
            opt.step()
        moved[name] = float((start.double() - param.detach().double()).mean())
        if name == "nearest":
            assert torch.equal(bits(param), bits(start))
    assert moved["nearest"] == 0.0
    assert moved["exact"] > 0.95 * steps * share * step
    error = step * (steps * share / start.numel()) ** 0.5
    # fp32 rounds the twin's 1.5 at every step.
    assert abs(moved["stochastic"] - moved["exact"]) <= STANDARD_ERRORS * error + steps * UNIT * 2


@on_every_device
@with_all_moments
@HALVES
def test_a_16_bit_layer_loses_loss_as_a_float32_one_does(dtype: torch.dtype, moments: str, device: str) -> None:
    """The scenario of torchao of a tiny lr, with a bound: the loss is a known linear function of the weights.

    So the roundings' effect on it has mean zero, and gradients do not depend on the weights. A weight begins a step on
    a value of its dtype, so an update is rounded up with a chance of f = its share of the gap: a variance of f (1 - f)
    squared gaps, times the squared coefficient of the weight. An update is the learning rate, but for 10% of coding.
    """
    steps, lr = 100, 1e-6
    weights = (torch.randn(128, 256, generator=generator(4)) * 0.05).to(dtype).to(device)
    inputs = torch.randn(256, generator=generator(5)).to(dtype).float().to(device)
    fallen: dict[str, float] = {}
    for name, kind in (("exact", torch.float32), ("stochastic", dtype), ("nearest", dtype)):
        param = Parameter(weights.to(kind).clone())
        update = "stochastic" if name == "exact" else name
        opt = AdamW8bit([param], lr, weight_decay=0.0, moments=moments, low_precision_update=update)
        for _ in range(steps):
            opt.zero_grad()
            (param.float() @ inputs).sum().backward()
            opt.step()
        change = weights.double() - param.detach().double()
        fallen[name] = float((change @ inputs.double()).sum())
    wide = gap(weights.float().abs() + steps * 1.1 * lr, dtype)
    variance = steps * (1.1 * lr / wide).clamp(max=0.25) * wide.square()
    one = float((variance * inputs.double().square()).sum().sqrt())
    assert fallen["exact"] > 2 * STANDARD_ERRORS * one  # or the comparison would say nothing
    assert abs(fallen["stochastic"] - fallen["exact"]) <= STANDARD_ERRORS * one
    assert fallen["nearest"] < 0.5 * fallen["exact"]
