"""Every choice of a language-model run, checked where it is made."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from optimizers import check_optimizer_name, check_place, check_seed

PRECISIONS = ("no", "bf16")
PARAMETER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Settings in which two runs may differ and still be the same run: a resumed run may change them, and a comparison of
# runs passes over them.
IMMATERIAL = frozenset(
    {
        "output_dir",
        "log_every",
        "eval_every",
        "checkpoint_dir",
        "checkpoint_every",
        "resume",
        "resume_latest",
        "collective_timeout",
        # Compared by what they lead to: the text itself, the world size, the precision in use, the batches.
        "data",
        "expect_world_size",
        "precision",
        "total_batch_size",
        # Any number of shards gives the same bits, on the host or not, and a checkpoint holds the whole state.
        "shard",
        "offload",
        "offload_gradients",
    }
)


@dataclass(frozen=True)
class TrainingSettings:
    """Every choice of a run. The defaults make a run of about two minutes on two CPU cores."""

    output_dir: Path
    optimizer: str = "adamw8bit"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    shard: bool = False
    offload: bool = False
    offload_gradients: bool = False
    seed: int = 0
    steps: int = 250
    warmup_steps: int = 25
    final_lr_fraction: float = 0.1
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    # Windows an optimizer step over all processes: the accumulation follows from it and from the world size.
    total_batch_size: int | None = None
    clip: float = 1.0
    # None: what the launcher configured.
    precision: str | None = None
    param_dtype: str = "float32"
    data: tuple[Path, ...] = ()
    validation_every: int = 20
    seq_len: int = 128
    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 4
    log_every: int = 1
    eval_every: int = 50
    eval_windows: int = 128
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 0
    resume: Path | None = None
    resume_latest: bool = False
    expect_world_size: int | None = None
    # Seconds; None: what torch takes.
    collective_timeout: float | None = None

    def __post_init__(self) -> None:
        check_optimizer_name(self.optimizer)
        check_place(self.optimizer, shard=self.shard, offload=self.offload, offload_gradients=self.offload_gradients)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        check_choice("param_dtype", self.param_dtype, tuple(PARAMETER_DTYPES))
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "seq_len", "layers", "heads"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("log_every", "eval_every", "eval_windows", "hidden_size", "intermediate_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "checkpoint_every", "clip", "weight_decay"):
            _check_at_least(name, getattr(self, name), 0)
        # torch's own optimizers take a learning rate, betas and a decay that are not finite.
        if not (math.isfinite(self.lr) and self.lr > 0.0):
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in 0..1, 1 excluded, got {self.betas}")
        check_seed(self.seed)
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size must be a multiple of twice the heads, got hidden_size={self.hidden_size}, "
                f"heads={self.heads}"
            )
        if not 0.0 <= self.final_lr_fraction <= 1.0:
            raise ValueError(f"final_lr_fraction must lie in 0..1, got {self.final_lr_fraction}")
        if self.checkpoint_every and self.checkpoint_dir is None:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} needs a checkpoint_dir")
        if self.resume_latest and (self.checkpoint_dir is None or self.resume is not None):
            raise ValueError(
                f"resume_latest goes with a checkpoint_dir, in which it looks, and without resume; got "
                f"checkpoint_dir={self.checkpoint_dir}, resume={self.resume}"
            )
        if self.collective_timeout is not None:
            _check_at_least("collective_timeout", self.collective_timeout, 1)
        if self.total_batch_size is not None:
            _check_at_least("total_batch_size", self.total_batch_size, 1)

    def on(self, world_size: int) -> TrainingSettings:
        """These settings with the accumulation that gives the total batch, where one was asked for.

        Raises:
            ValueError: it is no multiple of what these processes read at once, or an accumulation was asked for, too.
        """
        if self.total_batch_size is None:
            return self
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} and "
                f"total_batch_size={self.total_batch_size} do not go together: the one follows from the other"
            )
        accumulation, rest = divmod(self.total_batch_size, self.batch_size * world_size)
        if rest:
            raise ValueError(
                f"total_batch_size is {self.total_batch_size}; accepted with a batch_size of {self.batch_size} and "
                f"{world_size} processes: multiples of {self.batch_size * world_size}"
            )
        return replace(self, gradient_accumulation_steps=accumulation)

    def as_json(self) -> dict[str, Any]:
        """The settings in JSON's types."""
        return json.loads(json.dumps(asdict(self), default=str))


def check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")


def _check_at_least(name: str, value: float, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be a finite number of at least {least}, got {value}")
