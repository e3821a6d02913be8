"""One training of the long run, and what it records of its optimizer: loss, size of the update, drift of the moments.

A run that keeps moments in 8 bits carries exact float32 moments of the same gradients beside it. What the optimizer
would do with these is the measure of what it does: no other run's path comes into it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import harness
from benchmarks.peer_formats import FormatAdamW, bitsandbytes_format
from lowmem_adam import AdamW8bit
from lowmem_adam.foreign.moments import decode_into
from lowmem_adam.layout import is_coded

EXACT, OURS, PEER = "torch.optim.AdamW", "lowmem-adam 8-bit", "bitsandbytes map"
EPS, BETA1 = 1e-8, 0.9
AT = (0.05, 0.5, 0.95)

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Shape:
    """The model, its batches and how often a run is looked at."""

    hidden: int = 192
    layers: int = 4
    length: int = 128
    batch: int = 16
    every: int = 100
    windows: int = 128
    lr: float = 1e-3
    warmup: int = 200


@dataclass(frozen=True)
class Job:
    """One run: who steps, which beta2, which seed."""

    optimizer: str
    beta2: float
    seed: int

    @property
    def label(self) -> str:
        return f"{self.optimizer}, beta2 {self.beta2:g}, seed {self.seed}"


@dataclass
class Record:
    """A run's figures at ``steps``, one entry each; those of the drift stay empty where moments are exact.

    ``loss`` is the mean training loss since the entry before, ``update_norm`` the norm over all parameters of
    u = m / (sqrt(v) + eps), bias-corrected. Over the tensors that are held in 8 bits: ``norm_ratio`` is the norm of u
    over that of exact moments of the same gradients, ``update_error`` the norm of their difference over the latter,
    and ``root_ratio`` has quantiles of sqrt(v) over the exact one.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    update_norm: list[float] = field(default_factory=list)
    norm_ratio: list[float] = field(default_factory=list)
    update_error: list[float] = field(default_factory=list)
    root_ratio: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


def build(job: Job, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    betas = (BETA1, job.beta2)
    if job.optimizer == EXACT:
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=EPS, fused=True)
    if job.optimizer == OURS:
        return AdamW8bit(params, lr=lr, betas=betas, eps=EPS, seed=job.seed)
    return FormatAdamW(params, bitsandbytes_format, lr=lr, betas=betas, eps=EPS)


def moments_held(opt: torch.optim.Optimizer, param: Tensor) -> Moments:
    """exp_avg and exp_avg_sq in float32, as the next step will read them."""
    state: Mapping[str, Any] = opt.state[param]
    if isinstance(opt, FormatAdamW):
        coder = opt.coder if is_coded(param.shape) else opt.exact
        exp_avg, exp_avg_sq = coder.decode(state["coded"])
        return exp_avg.view_as(param), exp_avg_sq.view_as(param)
    if isinstance(opt, AdamW8bit):
        made = torch.empty_like(param), torch.empty_like(param)
        decode_into(state, *made)
        return made
    return state["exp_avg"], state["exp_avg_sq"]


def update_of(moments: Moments, beta2: float, step: int) -> Tensor:
    """Adam's u, from moments after `step` steps."""
    exp_avg, exp_avg_sq = moments
    return exp_avg / (1 - BETA1**step) / ((exp_avg_sq / (1 - beta2**step)).sqrt() + EPS)


class Shadow:
    """Exact float32 moments of the gradients that a run's 8-bit tensors got."""

    def __init__(self, params: Iterable[Tensor], beta2: float) -> None:
        self.params, self.beta2 = [p for p in params if is_coded(p.shape)], beta2
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def take(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        assert len(grads) == len(self.params)
        torch._foreach_lerp_(self.exp_avg, grads, 1 - BETA1)
        torch._foreach_mul_(self.exp_avg_sq, self.beta2)
        torch._foreach_addcmul_(self.exp_avg_sq, grads, grads, 1 - self.beta2)

    @torch.no_grad()
    def compare(self, opt: torch.optim.Optimizer, step: int, into: Record) -> None:
        held, exact, apart, roots = 0.0, 0.0, 0.0, []
        for param, *own in zip(self.params, self.exp_avg, self.exp_avg_sq, strict=True):
            moments = moments_held(opt, param)
            u, wanted = (update_of(pair, self.beta2, step).double() for pair in (moments, (own[0], own[1])))
            held += float(u.square().sum())
            exact += float(wanted.square().sum())
            apart += float((u - wanted).square().sum())
            there = own[1] > 0
            roots.append((moments[1][there] / own[1][there]).sqrt().flatten().cpu())
        into.norm_ratio.append(math.sqrt(held / exact))
        into.update_error.append(math.sqrt(apart / exact))
        into.root_ratio.append(harness.quantiles(torch.cat(roots), AT))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    inputs, targets = (t.to(device, non_blocking=True) for t in batch)
    logits = model(input_ids=inputs).logits
    return cross_entropy(logits.flatten(0, -2), targets.flatten())


def train(job: Job, steps: int, shape: Shape, device_name: str, seconds: float) -> Record:
    """Take `steps` steps, or as many as the seconds allow; after the warm-up the learning rate stays as it is.

    The last entry of the record is of the last multiple of ``shape.every`` that was reached.
    """
    from launch.lm_data import WindowSampler, cut_windows, load_corpus, validation_starts

    device = torch.device(device_name)
    corpus = load_corpus(())
    starts = validation_starts(corpus.validation, shape.length, shape.windows)
    held_out = cut_windows(corpus.validation, starts, shape.length)
    sampler = WindowSampler(corpus.train, shape.length, shape.batch, 0, 1, job.seed)
    torch.manual_seed(job.seed)
    model = harness.build_byte_llama(shape.hidden, shape.layers, shape.length).to(device)
    opt = build(job, model.parameters(), shape.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, (step + 1) / shape.warmup))
    shadow = None if job.optimizer == EXACT else Shadow(model.parameters(), job.beta2)
    record, total = Record(), torch.zeros((), device=device)
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model, sampler.batch(step - 1), device)
        loss.backward()
        total += loss.detach()
        if shadow is not None:
            shadow.take()
        opt.step()
        schedule.step()
        opt.zero_grad()
        if step % shape.every == 0:
            _look(model, opt, shadow, record, step, job.beta2)
            record.loss.append(float(total) / shape.every)
            with torch.no_grad():
                record.validation.append(float(loss_of(model, held_out, device)))
            total.zero_()
            if not math.isfinite(record.loss[-1]) or time.perf_counter() - begin > seconds:
                break
    record.seconds = time.perf_counter() - begin
    return record


@torch.no_grad()
def _look(
    model: nn.Module, opt: torch.optim.Optimizer, shadow: Shadow | None, record: Record, step: int, beta2: float
) -> None:
    record.steps.append(step)
    norms: Callable[[Tensor], float] = lambda p: float(update_of(moments_held(opt, p), beta2, step).norm())  # noqa: E731
    record.update_norm.append(math.hypot(*(norms(p) for p in model.parameters())))
    if shadow is not None:
        shadow.compare(opt, step, record)
