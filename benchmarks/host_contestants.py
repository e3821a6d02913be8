"""Ways to step a parameter on the host, in its own precision or with wider weights, checked and timed together.

Every contestant first has to follow the textbook Adam in float64; then all take turns, in another order every round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from benchmarks import harness
from benchmarks.step_contestants import (
    SETTINGS,
    UNAVAILABLE,
    VALIDATION_SHAPE,
    VALIDATION_STEPS,
    Shape,
    make_params,
    why_unavailable,
)
from benchmarks.step_timing import WARM_STEPS, Plan, bandwidth_row, bandwidth_runs, interleaved
from lowmem_adam import AdamW8bit
from lowmem_adam.layout import BLOCK_SIZE
from tests.oracle import TextbookAdam

MOMENTS = 2 * (2 + 2 / BLOCK_SIZE)
"""Bytes that our moments move, read and written."""

Draw = Callable[[Shape, torch.Generator], Tensor]
"""Draws the gradient of a step, in float32."""


class Running(NamedTuple):
    """Something that steps one parameter: with the gradient that lies in ``param.grad``."""

    step: Callable[[], Any]
    weight: Callable[[], Tensor]
    arrive: Callable[[], Any] = lambda: None
    """What happens to the gradient before the host has it, and is not timed."""
    state: Callable[[], list[Tensor]] = list
    """Moments, and what is kept of the weight."""
    passing: Callable[[], list[Tensor]] = list
    """What else of the parameter's size lies on the host for a step: gradients, and parameters on their way back."""


class Contestant(NamedTuple):
    """A way to step a parameter with a gradient of its dtype."""

    build: Callable[[Parameter], Running]
    moved_bytes: float
    """Least traffic of an element, its parameter and gradient included."""
    error: float
    """What its format allows of the displacement, beside the rounding of its weights."""
    weight_eps: float
    """Between two weights that it can hold, over their magnitude."""
    optional: bool = False
    """Whether it is of a package that need not be there."""


# ---------------------------------------------------------------- ways to step


def ours(**settings: Any) -> Callable[[Parameter], Running]:
    """Our optimizer; under offload parameter and gradient pass through buffers and are not kept on the host."""

    def build(param: Parameter) -> Running:
        optimizer = AdamW8bit([param], **SETTINGS, **settings)
        return Running(optimizer.step, lambda: optimizer.master_weight(param), state=lambda: tensors_of(optimizer))

    return build


def in_place(make: Callable[[list[Parameter]], Optimizer]) -> Callable[[Parameter], Running]:
    """An optimizer of the parameter itself, which with its gradient lies on the host."""

    def build(param: Parameter) -> Running:
        optimizer = make([param])
        return Running(
            optimizer.step,
            lambda: param.detach().clone(),
            state=lambda: [param, *tensors_of(optimizer)],
            passing=lambda: gradients_of(param),
        )

    return build


def with_weights(
    make: Callable[[list[Parameter]], Optimizer], dtype: torch.dtype, *, widens: bool
) -> Callable[[Parameter], Running]:
    """An optimizer of weights of its own, rounded into the parameter after each step, in memory that is there already.

    Args:
        make: the optimizer.
        dtype: of the weights and of the gradients that it steps with.
        widens: whether the host makes gradients of that dtype, or gets them so.
    """

    def build(param: Parameter) -> Running:
        weight = Parameter(param.detach().to(dtype, copy=True))
        weight.grad = torch.zeros_like(weight)
        optimizer = make([weight])

        def widen() -> None:
            assert weight.grad is not None
            assert param.grad is not None
            weight.grad.copy_(param.grad)

        def step() -> None:
            if widens:
                widen()
            optimizer.step()
            param.data.copy_(weight.data)

        return Running(
            step,
            lambda: weight.detach().clone(),
            arrive=(lambda: None) if widens else widen,
            state=lambda: [weight, *tensors_of(optimizer)],
            passing=lambda: [param, *gradients_of(weight), *(gradients_of(param) if widens else [])],
        )

    return build


def tensors_of(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def gradients_of(param: Parameter) -> list[Tensor]:
    return [] if param.grad is None else [param.grad]


# ---------------------------------------------------------------- gradients


def normal(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).mul_(0.01)


def heavy_tailed(shape: Shape, generator: torch.Generator) -> Tensor:
    """Normal values with log-normal scales, over some six decades, which stay an element's own; none of them zero."""
    scales = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul_(2.0).exp_().mul_(1e-3)
    values = torch.randn(shape, generator=generator).mul_(scales)
    return values.masked_fill_(values == 0, 1e-6)


# ---------------------------------------------------------------- checks


def displacement(
    contestant: Contestant, dtype: torch.dtype = torch.bfloat16, draw: Draw = normal
) -> tuple[float, float]:
    """Error of the weights' displacement after a few steps against float64, and what is allowed."""
    (param,) = make_params([VALIDATION_SHAPE], dtype)
    start, oracle = param.detach().double(), TextbookAdam(param, **SETTINGS)
    running, path = contestant.build(param), []
    generator = torch.Generator().manual_seed(1)
    for _ in range(VALIDATION_STEPS):
        param.grad = draw(VALIDATION_SHAPE, generator).to(dtype)
        running.arrive()
        running.step()
        path.append(float(oracle.step(param.grad).norm()))
    moved, weight = oracle.param - start, running.weight()
    if float((param.detach().double() - weight.double()).abs().max()) > float(weight.abs().max()) * 2.0**-8:
        raise RuntimeError("the parameter is not what the weight rounds to")
    allowed = contestant.error + contestant.weight_eps * math.hypot(*path) / float(moved.norm())
    return harness.relative_error(weight.double() - start, moved), allowed


def missing(contestants: Mapping[str, Contestant], dtype: torch.dtype) -> dict[str, str]:
    """Those of optional packages that cannot be built here, and why not."""
    out = {}
    for name, contestant in contestants.items():
        if contestant.optional:
            try:
                contestant.build(*make_params([VALIDATION_SHAPE], dtype))
            except UNAVAILABLE as problem:
                out[name] = why_unavailable(problem)
    return out


# ---------------------------------------------------------------- times


class Times(NamedTuple):
    """What was found out about contestants: a row for each, and seconds of all rounds."""

    rows: list[dict[str, Any]]
    samples: dict[str, list[float]]

    def ratio(self, name: str, base: str) -> dict[str, float]:
        """Of two contestants: the ratio of their medians, and quantiles of the ratios round by round."""
        low, middle, high = harness.quantiles(
            mine / other for mine, other in zip(self.samples[name], self.samples[base], strict=True)
        )
        of_medians = harness.median(self.samples[name]) / harness.median(self.samples[base])
        return {"ratio": of_medians, "ratio_p5": low, "ratio_of_rounds": middle, "ratio_p95": high}


def timed(
    contestants: Mapping[str, Contestant],
    numel: int,
    stream: int,
    plan: Plan,
    dtype: torch.dtype = torch.bfloat16,
    draw: Draw = normal,
) -> Times:
    """Check all contestants, then let them take turns with one another and with the memory's bandwidth.

    Args:
        contestants: by name; all of them can be built.
        numel: of the parameter that is stepped.
        stream: of the arrays by which the bandwidth is measured.
        plan: how long.
        dtype: of parameter and gradient.
        draw: draws the gradient, which stays as it is: what is timed is the step alone.
    """
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    shape = (numel // 1024, 1024)
    gradient = draw(shape, torch.Generator().manual_seed(3)).to(dtype)
    for name, contestant in contestants.items():
        error, allowed = displacement(contestant, dtype, draw)
        if not error <= allowed:
            raise RuntimeError(f"{name}: error {error:.3g}, allowed {allowed:.3g}")
        (param,) = make_params([shape], dtype)
        param.grad = gradient.clone()
        running = contestant.build(param)
        running.arrive()
        for _ in range(WARM_STEPS):
            running.step()
        runs[name] = running.step
        rows[name] = {"name": name, "error": error, "allowed": allowed, "moved_bytes": contestant.moved_bytes}
        for kind in ("state", "passing"):
            tensors: Sequence[Tensor] = getattr(running, kind)()
            rows[name][f"{kind}_bytes"] = sum(tensor.nbytes for tensor in tensors) / param.numel()
    streams = bandwidth_runs(stream)
    samples = interleaved({**runs, **streams}, plan)
    best = max(bandwidth_row(name, samples[name], stream)["allocating_gb_s"] for name in streams)
    for name, row in rows.items():
        low, middle, high = harness.quantiles(seconds / numel * 1e9 for seconds in samples[name])
        row |= {"ns": middle, "p5": low, "p95": high, "rounds": len(samples[name])}
        row["bandwidth_share"] = row["moved_bytes"] / middle / best
    return Times(list(rows.values()), {name: samples[name] for name in rows})
