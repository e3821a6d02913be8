"""Fine-tuning of bfloat16 models at a small learning rate: real data, pretrained here, nothing to download.

Each task is pretrained as the parity benchmark trains, float32 AdamW at 2e-3 from the seed's own initial weights; then
the model, as it came out rounded to bfloat16, is trained on data of another kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.parity_tasks import (
    WORD_TEXT,
    OptimizerFactory,
    Task,
    byte_windows,
    images,
    train,
    validate,
    vocabulary_of,
    word_windows,
    words_of,
)

PEAK = 1e-5
"""Peak learning rate of the fine-tuning."""


@dataclass(frozen=True)
class FineTuning:
    """What is trained before, in float32, and the task that its model goes on to in bfloat16."""

    before: Task
    after: Task


class MasterWeightAdamW(torch.optim.Optimizer):
    """What torchao's and DeepSpeed's offloading optimizers do: torch's fused AdamW on float32 copies of the parameters.

    Gradients are widened to float32, and the stepped copies rounded to nearest into the parameters.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.pairs = [
            (param, nn.Parameter(param.detach().float())) for group in self.param_groups for param in group["params"]
        ]
        self.inner = torch.optim.AdamW([master for _, master in self.pairs], lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        assert len(self.param_groups) == 1
        self.inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for param, master in self.pairs:
            master.grad = None if param.grad is None else param.grad.float()
        self.inner.step()
        for param, master in self.pairs:
            param.copy_(master)


@dataclass
class Run:
    """Validation losses of one fine-tuning, the first of them before its first step."""

    start: float
    final: float
    curve: list[tuple[int, float]]
    changed: float
    """Share of the parameters' elements that are not what they were at the start."""


def pretrain(task: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = task.model()
    train(
        replace(task, model=lambda: model),
        seed,
        lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
        evaluations=1,
    )
    return model


def fine_tune(
    task: Task,
    pretrained: nn.Module,
    seed: int,
    make_optimizer: OptimizerFactory,
    evaluations: int,
) -> Run:
    """Train a copy whose parameters, gradients and activations are bfloat16; validate that copy as it is."""
    before = copy.deepcopy(pretrained).to(torch.bfloat16)
    model = copy.deepcopy(before)
    start = validate(task, before)
    outcome = train(replace(task, model=lambda: model), seed, make_optimizer, evaluations)
    different = sum(int((a != b).sum()) for a, b in zip(before.parameters(), model.parameters(), strict=True))
    changed = different / sum(param.numel() for param in model.parameters())
    return Run(start, outcome.final, [(0, start), *outcome.curve], changed)


def foreign_text() -> list[Path]:
    """C++ that comes with torch: its headers."""
    include = Path(torch.__file__).parent / "include"
    return [include / "c10", include / "torch"]


@cache
def byte_transfer(quick: bool) -> FineTuning:
    """A small Llama from the bytes of the standard library's Python to those of torch's C++ headers."""
    steps, after = (10, 8) if quick else (300, 400)
    return FineTuning(byte_windows([], 2e-3, steps), byte_windows(foreign_text(), PEAK, after))


@cache
def word_transfer(quick: bool) -> FineTuning:
    """The same texts in words, of a vocabulary from both; a Zipfian embedding whose weights are of the order of 1."""
    from launch.lm_data import load_corpus

    steps, after = (10, 10) if quick else (300, 400)
    limit = WORD_TEXT // 8 if quick else WORD_TEXT
    python = words_of(harness.standard_library_text(limit).numpy().tobytes())
    foreign = words_of(load_corpus(foreign_text()).train[:limit].tobytes())
    known = vocabulary_of(python, foreign)
    return FineTuning(word_windows(python, known, 2e-3, steps), word_windows(foreign, known, PEAK, after))


@cache
def image_transfer(quick: bool) -> FineTuning:
    """A small CNN from MNIST's digits to those of scikit-learn, enlarged from 8 x 8 to 28 x 28."""
    epochs, after = (1, 1) if quick else (6, 16)
    digits = images("digits", after, lr=PEAK, size=28, dtype=torch.bfloat16)
    return FineTuning(images("mnist5k", epochs), digits)


TRANSFERS: dict[str, Callable[[bool], FineTuning]] = {
    "bytes": byte_transfer,
    "words": word_transfer,
    "images": image_transfer,
}
