"""A small model, its batches and its Trainer, for tests under PyTorch Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lowmem_adam import AdamW8bit

BATCHES, ACCUMULATED = 6, 2
"""In an epoch, and in an optimizer step."""
STEPS = BATCHES // ACCUMULATED
"""In an epoch; a run has two."""
CLIP = 0.05
"""Small enough for every step to be clipped."""


def batch(rank: int, index: int) -> Tensor:
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(100 * rank + index))


class Model(lightning.LightningModule):
    """Two matrices in 8 bits that decay and two biases in fp32 that do not, with a falling learning rate."""

    def __init__(self, **keywords: Any):
        super().__init__()
        self.keywords = keywords
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 64))
        self.losses: list[float] = []

    def configure_optimizers(self) -> dict[str, Any]:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.ndim > 1]},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW8bit(groups, lr=1e-2, weight_decay=0.1, **self.keywords)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, inputs: Tensor, _: int) -> Tensor:
        inputs = inputs.to(next(self.parameters()).dtype)
        loss = (self.net(inputs).float() - inputs.float()).square().mean()
        self.losses.append(float(loss))
        return loss


def own(model: lightning.LightningModule) -> AdamW8bit:
    """The optimizer itself, out of its wrapper."""
    optimizer = model.optimizers(use_pl_optimizer=False)
    assert type(optimizer) is AdamW8bit
    return optimizer


def trainer_of(folder: Path | None = None, **keywords: Any) -> lightning.Trainer:
    """A Trainer on the CPU, silent; with a folder, it saves epoch-0.ckpt and epoch-1.ckpt there."""
    saving = (
        []
        if folder is None
        else [ModelCheckpoint(folder, "epoch-{epoch}", save_top_k=-1, auto_insert_metric_name=False)]
    )
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "accumulate_grad_batches": ACCUMULATED,
        "gradient_clip_val": CLIP,
        "callbacks": saving,
        "enable_checkpointing": bool(saving),
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**{**settings, **keywords})


def fit(
    trainer: lightning.Trainer, model: lightning.LightningModule, batches: Sequence[Tensor], **keywords: Any
) -> None:
    dealt: Any = list(batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and folders
        trainer.fit(model, DataLoader(dealt, batch_size=None), **keywords)
