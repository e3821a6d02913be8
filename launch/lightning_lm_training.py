"""The language-model job of lightning_lm.py: a LightningModule with AdamW8bit, and its Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning
import reporting
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lm_data import WindowSampler, cut_windows, load_corpus, validation_starts
from lm_job import build_model
from lm_settings import TrainingSettings
from lm_training import language_model_loss, weights_digest
from processes import settle
from schedules import warmup_cosine
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lowmem_adam import AdamW8bit

Batch = tuple[torch.Tensor, torch.Tensor]


class Windows(IterableDataset[Batch]):
    """This rank's windows of one step after the other, without end, from a given step on."""

    def __init__(self, sampler: WindowSampler, first_step: int):
        self.sampler = sampler
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        return map(self.sampler.batch, itertools.count(self.first_step))


class Held(Dataset[Batch]):
    """Batches that are there already."""

    def __init__(self, batches: Sequence[Batch]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


class LanguageModel(lightning.LightningModule):
    """A Llama on bytes. Its batches, of which Lightning saves no place, begin at the step that it has restored."""

    def __init__(self, settings: TrainingSettings):
        super().__init__()
        self.settings = settings
        self.model = build_model(settings)
        self.corpus = load_corpus(settings.data, settings.validation_every)
        self.metrics: reporting.MetricsLog | None = None

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.settings
        # Matrices decay, the weights of norms do not.
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW8bit(
            groups, lr=settings.lr, seed=settings.seed, shard_group="world" if settings.shard else None
        )
        schedule = partial(warmup_cosine, steps=settings.steps, warmup_steps=settings.warmup_steps, final_fraction=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val:
            assert isinstance(optimizer, AdamW8bit)
            # Within the step, instead of a pass of its own over all gradients, as Lightning would take.
            optimizer.clip_grad_norm_(gradient_clip_val)

    def train_dataloader(self) -> DataLoader[Batch]:
        sampler = WindowSampler(
            self.corpus.train,
            sequence_length=self.settings.seq_len,
            batch_size=self.settings.batch_size,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            seed=self.settings.seed,
        )
        return DataLoader(Windows(sampler, self.trainer.global_step), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        starts = validation_starts(self.corpus.validation, self.settings.seq_len, self.settings.eval_windows)
        mine = starts[self.global_rank :: self.trainer.world_size]
        firsts = range(0, len(mine), self.settings.batch_size)
        cuts = [mine[first : first + self.settings.batch_size] for first in firsts]
        batches = [cut_windows(self.corpus.validation, cut, self.settings.seq_len) for cut in cuts]
        return DataLoader(Held(batches), batch_size=None)

    def on_train_start(self) -> None:
        self.metrics = reporting.MetricsLog(
            self.settings.output_dir, self.trainer.is_global_zero, self.trainer.global_step
        )
        self.metrics.__enter__()

    def on_train_end(self) -> None:
        assert self.metrics is not None
        self.metrics.__exit__()

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = language_model_loss(self.model, *batch)
        mean = self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")
        self._write("train", self.trainer.global_step + 1, loss=float(mean))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, _: int) -> None:
        loss = language_model_loss(self.model, *batch)
        self.total += torch.tensor([float(loss) * len(batch[0]), len(batch[0])], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        loss, windows = self.trainer.strategy.reduce(self.total, reduce_op="sum").tolist()
        self._write("validation", self.trainer.global_step, val_loss=loss / windows)

    def _write(self, kind: str, step: int, **figures: float) -> None:
        assert self.metrics is not None
        self.metrics.write({"kind": kind, "step": step, **figures})


def train(settings: TrainingSettings, processes: int, precision: str, checkpoint_every: int) -> None:
    """The whole run; the summary is written by the first process."""
    lightning.seed_everything(settings.seed, verbose=False)
    model = LanguageModel(settings)
    every_checkpoint = ModelCheckpoint(
        settings.output_dir / "checkpoints", "{step:06d}", save_top_k=-1, every_n_train_steps=checkpoint_every
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        precision=precision,
        max_steps=settings.steps,
        gradient_clip_val=settings.clip,
        callbacks=[every_checkpoint],
        val_check_interval=checkpoint_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        # The windows are dealt out already.
        use_distributed_sampler=False,
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path=settings.resume)
    summarise(trainer, model)
    settle(trainer.world_size)


def summarise(trainer: lightning.Trainer, model: LanguageModel) -> None:
    """Write summary.json. Each process holds its own part of the state, so all of them come here."""
    optimizer = model.optimizers()
    assert isinstance(optimizer, AdamW8bit)
    state_bytes = optimizer.memory_report()["ranks"]
    if trainer.is_global_zero:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        summary = {
            "world_size": trainer.world_size,
            "steps": trainer.global_step,
            "parameters": parameters,
            "optimizer_state_bytes": state_bytes,
            "weights_sha256": weights_digest(model),
            "settings": model.settings.as_json(),
        }
        model.settings.output_dir.mkdir(parents=True, exist_ok=True)
        reporting.write_json(model.settings.output_dir / reporting.SUMMARY_FILE, summary)
        held = max(state_bytes) / parameters
        print(f"{trainer.world_size} processes, optimizer state of the largest: {held:.3f} bytes a parameter")
