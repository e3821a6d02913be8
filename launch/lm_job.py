"""The objects of a language-model run: processes, text, model, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from lm_data import Corpus, WindowSampler, load_corpus, validation_starts
from lm_model import byte_llama
from lm_settings import PARAMETER_DTYPES, PRECISIONS, TrainingSettings, check_choice
from optimizers import OptimizerSettings, build_optimizer
from schedules import warmup_cosine

from lowmem_adam.integrations import accelerate as launched


@dataclass
class Progress:
    """How far a run has come: all that the data and the log need to go on from a checkpoint."""

    step: int = 0
    tokens: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
        self.tokens = state["tokens"]


@dataclass
class Timings:
    """Wall-clock times of the steps of this process since it started."""

    step_ms: list[float] = field(default_factory=list)
    optimizer_step_ms: list[float] = field(default_factory=list)

    def steady(self, values: Sequence[float]) -> Sequence[float]:
        """Without the first step, which creates the state and may compile."""
        return values[1:] or values


@dataclass
class Job:
    """The objects of a run, prepared by accelerate."""

    settings: TrainingSettings
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    sampler: WindowSampler
    corpus: Corpus
    validation_starts: Sequence[int]
    progress: Progress
    timings: Timings

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def start_accelerator(settings: TrainingSettings) -> Accelerator:
    """Join the other processes, take a share of the machine's cores, and say how many there are."""
    patience = InitProcessGroupKwargs(
        timeout=None if settings.collective_timeout is None else timedelta(seconds=settings.collective_timeout)
    )
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        # Otherwise one scheduler step counts for as many as there are processes.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[patience],
    )
    launched.set_threads()
    accelerator.print(
        f"world size: {accelerator.num_processes} on {accelerator.device.type} "
        f"({torch.get_num_threads()} threads a process)"
    )
    return accelerator


def check_launch(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Refuse a world size that was not expected, and what this job is not made for."""
    world_size = accelerator.num_processes
    if settings.expect_world_size not in (None, world_size):
        raise ValueError(
            f"world size is {world_size}, but --expect-world-size says {settings.expect_world_size}: the launcher did "
            "not start the processes that were asked for. On a CPU use launch/configs/cpu_2.yaml with "
            "ACCELERATE_USE_CPU=true in the environment"
        )
    try:
        launched.check_launch(accelerator)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        kind = accelerator.distributed_type.value
        raise ValueError(f"this job runs on one process or under plain data parallelism, the launcher asked for {kind}")
    check_choice("the launcher's mixed_precision", accelerator.mixed_precision, PRECISIONS)


def fit_batches(settings: TrainingSettings, accelerator: Accelerator) -> TrainingSettings:
    """The settings with the accumulation that gives the total batch on as many processes as there are."""
    fitted = settings.on(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = fitted.gradient_accumulation_steps
    if settings.total_batch_size is not None:
        accelerator.print(
            f"total batch: {settings.total_batch_size} windows a step, by {accelerator.num_processes} processes in "
            f"{fitted.gradient_accumulation_steps} micro-batches of {settings.batch_size} each"
        )
    return fitted


def build_job(settings: TrainingSettings, accelerator: Accelerator) -> Job:
    """Data, model, optimizer and schedule, the same on every rank."""
    corpus = load_corpus(settings.data, settings.validation_every)
    starts = validation_starts(corpus.validation, settings.seq_len, settings.eval_windows)
    sampler = WindowSampler(
        corpus.train,
        sequence_length=settings.seq_len,
        batch_size=settings.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        seed=settings.seed,
    )
    set_seed(settings.seed)
    model = build_model(settings).to(accelerator.device)
    optimizer = build_optimizer(
        settings.optimizer,
        model.parameters(),
        OptimizerSettings(
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            shard=settings.shard,
            offload=settings.offload,
            offload_gradients=settings.offload_gradients,
        ),
    )
    schedule = partial(
        warmup_cosine,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        final_fraction=settings.final_lr_fraction,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    return Job(settings, accelerator, model, optimizer, scheduler, sampler, corpus, starts, progress, Timings())


def build_model(settings: TrainingSettings) -> torch.nn.Module:
    """The model that the settings ask for, with fresh weights in their dtype."""
    model = byte_llama(
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        layers=settings.layers,
        heads=settings.heads,
        seq_len=settings.seq_len,
    )
    return model.to(PARAMETER_DTYPES[settings.param_dtype])
