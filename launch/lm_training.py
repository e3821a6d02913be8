"""The language-model job: a small Llama on bytes, trained under accelerate on any number of processes."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import accelerate
import reporting
import torch
import transformers
from accelerate.utils import gather_object
from lm_checkpoint import resume, save_checkpoint
from lm_data import cut_windows
from lm_job import Job, build_job, check_launch, fit_batches, start_accelerator
from lm_settings import TrainingSettings
from processes import leave
from torch.nn import functional
from tqdm import tqdm


class DivergedError(ArithmeticError):
    """A loss is no finite number; raised on every rank, since all of them see the same loss."""


def run_training(settings: TrainingSettings) -> dict[str, Any]:
    """The whole run; returns the summary that summary.json holds."""
    return run_job(prepare_job(settings))


def prepare_job(settings: TrainingSettings) -> Job:
    """All that can be refused is refused here, before the first step: launch, data, optimizer, checkpoint."""
    accelerator = start_accelerator(settings)
    try:
        check_launch(settings, accelerator)
        job = build_job(fit_batches(settings, accelerator), accelerator)
        if settings.resume is not None or settings.resume_latest:
            resume(job)
    except BaseException:
        accelerator.end_training()
        raise
    return job


def run_job(job: Job) -> dict[str, Any]:
    """Train, log, evaluate, report. The process group ends with the run, however that ends."""
    settings, accelerator = job.settings, job.accelerator
    try:
        with reporting.MetricsLog(settings.output_dir, accelerator.is_main_process, job.progress.step) as log:
            train(job, log)
        summary = summarise(job)
        if accelerator.is_main_process:
            reporting.write_report(settings.output_dir, summary)
        accelerator.wait_for_everyone()
    finally:
        leave(accelerator)
    return summary


def train(job: Job, log: reporting.MetricsLog) -> None:
    """The loop: a step, then whatever is due after it."""
    settings, accelerator, progress = job.settings, job.accelerator, job.progress
    bar = tqdm(
        total=settings.steps,
        initial=progress.step,
        disable=not accelerator.is_main_process,
        desc=settings.optimizer,
        unit="step",
        mininterval=1.0,
    )
    with bar:
        while progress.step < settings.steps:
            lr = float(job.optimizer.param_groups[0]["lr"])
            loss, grad_norm = training_step(job)
            bar.update()
            if due(progress.step, settings.log_every, settings.steps):
                record = train_record(job, loss, grad_norm, lr)
                log.write(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            if due(progress.step, settings.eval_every, settings.steps):
                log.write({"kind": "validation", "step": progress.step, "val_loss": evaluate(job)})
            if settings.checkpoint_dir and due(progress.step, settings.checkpoint_every, settings.steps):
                save_checkpoint(job, settings.checkpoint_dir)


def due(step: int, every: int, last: int) -> bool:
    """Every `every` steps (0: never) and after the last one."""
    return step == last or (every > 0 and step % every == 0)


def training_step(job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches: this rank's mean loss and the gradient's norm before clipping."""
    started = time.perf_counter()
    settings, accelerator = job.settings, job.accelerator
    accumulation = settings.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    grad_norm = torch.zeros((), device=accelerator.device)
    job.model.train()
    for micro in range(accumulation):
        inputs, targets = job.sampler.batch(job.progress.step * accumulation + micro)
        with accelerator.accumulate(job.model):
            loss = language_model_loss(job.model, inputs.to(accelerator.device), targets.to(accelerator.device))
            accelerator.backward(loss)
            loss_sum += loss.detach()
            if accelerator.sync_gradients:
                limit = settings.clip if settings.clip > 0 else math.inf
                grad_norm = torch.as_tensor(accelerator.clip_grad_norm_(job.model.parameters(), limit))
                job.timings.optimizer_step_ms.append(timed_optimizer_step(job))
                job.scheduler.step()
                job.optimizer.zero_grad()
    assert accelerator.sync_gradients, "the last micro-batch of a step is the one that synchronises"
    job.progress.step += 1
    job.progress.tokens += accumulation * settings.batch_size * settings.seq_len * accelerator.num_processes
    job.timings.step_ms.append(1e3 * (time.perf_counter() - started))
    return loss_sum / accumulation, grad_norm


def timed_optimizer_step(job: Job) -> float:
    """Step the optimizer; milliseconds from an idle device to an idle device."""
    synchronise(job.accelerator.device)
    started = time.perf_counter()
    job.optimizer.step()
    synchronise(job.accelerator.device)
    return 1e3 * (time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator's queued work; a CPU has none."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def language_model_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy in nats a byte, in fp32 whatever the model computes in."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train_record(job: Job, loss: torch.Tensor, grad_norm: torch.Tensor, lr: float) -> dict[str, Any]:
    """The line of this step, with the loss over all ranks."""
    mean_loss = float(job.accelerator.reduce(loss, reduction="mean"))
    check_loss(job, "training", mean_loss)
    return {
        "kind": "train",
        "step": job.progress.step,
        "loss": mean_loss,
        "lr": lr,
        "grad_norm": float(grad_norm),
        "tokens": job.progress.tokens,
        "optimizer_step_ms": round(job.timings.optimizer_step_ms[-1], 3),
        "step_ms": round(job.timings.step_ms[-1], 3),
    }


def check_loss(job: Job, kind: str, loss: float) -> None:
    """End the run on every rank where the loss is no finite number."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"the {kind} loss is {loss} at step {job.progress.step}; try a learning rate below {job.settings.lr:g}"
        )


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean loss over fixed windows of the held-out text, dealt out to the ranks."""
    settings, accelerator = job.settings, job.accelerator
    # Ranks may have different numbers of batches, so the forward pass must not be a collective one.
    model = accelerator.unwrap_model(job.model)
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for starts in _evaluation_batches(job):
        inputs, targets = cut_windows(job.corpus.validation, starts, settings.seq_len)
        loss = language_model_loss(model, inputs.to(accelerator.device), targets.to(accelerator.device))
        total += torch.tensor([float(loss) * len(starts), len(starts)], dtype=torch.float64, device=total.device)
    loss_sum, windows = accelerator.reduce(total, reduction="sum").tolist()
    check_loss(job, "validation", loss_sum / windows)
    return loss_sum / windows


def _evaluation_batches(job: Job) -> Iterator[Sequence[int]]:
    settings, accelerator = job.settings, job.accelerator
    mine = job.validation_starts[accelerator.process_index :: accelerator.num_processes]
    for first in range(0, len(mine), settings.batch_size):
        yield mine[first : first + settings.batch_size]


def summarise(job: Job) -> dict[str, Any]:
    """The figures of the run; every rank takes part, since each holds its own optimizer state."""
    accelerator, timings = job.accelerator, job.timings
    optimizer = getattr(job.optimizer, "optimizer", job.optimizer)
    bytes_by_rank = gather_object([reporting.optimizer_state_bytes(optimizer)])
    # One and the same digest on all ranks, unless they have drifted apart.
    weights_by_rank = gather_object([weights_digest(job.model)])
    step_ms = timings.steady(timings.step_ms)
    tokens_a_step = job.progress.tokens / job.progress.step
    summary = {
        "optimizer": job.settings.optimizer,
        "optimizer_class": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
        "world_size": accelerator.num_processes,
        "parameters": job.parameters,
        "weights_sha256": weights_by_rank,
        "optimizer_state_bytes": bytes_by_rank,
        # What a process has to have room for, and what all of them hold: with shards the same bytes once.
        "state_bytes_per_parameter": max(bytes_by_rank) / job.parameters,
        "state_bytes_per_parameter_all_ranks": sum(bytes_by_rank) / job.parameters,
        "optimizer_step_ms_median": median(timings.steady(timings.optimizer_step_ms)),
        "step_ms_median": median(step_ms),
        "tokens_per_second": 1e3 * tokens_a_step * len(step_ms) / sum(step_ms),
        "precision": accelerator.mixed_precision,
        "steps": job.progress.step,
        "tokens": job.progress.tokens,
        "settings": job.settings.as_json(),
        "text": {
            "digest": job.corpus.digest(),
            "train_bytes": len(job.corpus.train),
            "train_files": len(job.corpus.train_files),
            "validation_bytes": len(job.corpus.validation),
            "validation_files": len(job.corpus.validation_files),
        },
        "machine": {
            "device": device_name(accelerator.device),
            "platform": platform.platform(),
            "threads_per_process": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "transformers": transformers.__version__,
        },
    }
    if hasattr(optimizer, "memory_report"):
        summary["memory_report"] = optimizer.memory_report()
    if hasattr(optimizer, "stats"):
        summary["stats"] = total_stats(gather_object([optimizer.stats()]), job.settings.shard)
    return summary


def total_stats(by_rank: Sequence[dict[str, int]], sharded: bool) -> dict[str, int]:
    """An optimizer's counts over all blocks: with shards each rank counts its own ones, without each counts all."""
    return {name: sum(stats[name] for stats in by_rank) if sharded else count for name, count in by_rank[0].items()}


def weights_digest(model: torch.nn.Module) -> str:
    """A hash over the bits of all parameters of this rank."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """The model of a GPU, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
