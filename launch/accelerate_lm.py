"""The smallest training script under accelerate: the same lines under DDP, DeepSpeed's ZeRO and FSDP2.

    accelerate launch --config_file launch/configs/FILE.yaml launch/accelerate_lm.py --help

What launches differ in is in `build_optimizer`. lm_training.py has the job with everything around it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)

DATA_HELP = "A text file or a folder of them; may be given several times. Default: the Python standard library."


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="A JSON file for losses, and for what was launched.")],
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Of matrices; norms have none.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Fixes weights, data order and rounding.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    warmup_steps: Annotated[int, typer.Option(help="Linear warmup before the cosine.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Windows a process and micro-batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm.")] = 1.0,
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    seq_len: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 192,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Where checkpoints go; none without.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints; 0: none.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint: a folder step-NNNNNN.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads a process. Default: as launched, or its share.")] = None,
    expect_world_size: Annotated[int | None, typer.Option(help="Fail unless so many processes run.")] = None,
) -> None:
    """Train a Llama with bytes as tokens; losses and facts of the launch go to a JSON file."""
    options = dict(locals())
    chosen = {name: value for name, value in options.items() if name not in ("output", "threads")}
    # Imported here so that --help does not wait for transformers.
    from lm_settings import TrainingSettings

    try:
        if resume is not None and not resume.is_dir():
            raise ValueError(f"--resume {resume}: no such folder")
        settings = TrainingSettings(output_dir=output.parent, **chosen | {"data": tuple(data or ())})
    except ValueError as error:
        typer.echo(f"accelerate_lm.py: {error}", err=True)
        raise typer.Exit(2) from error
    run(settings, output, threads)


def run(settings: Any, output: Path, threads: int | None) -> None:
    """From joining the other processes to leaving them."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed
    from lm_data import WindowSampler, load_corpus
    from lm_job import Progress, build_model
    from lm_training import language_model_loss
    from processes import leave
    from reporting import write_json

    from lowmem_adam.integrations.accelerate import check_launch, set_threads

    # On a CPU accelerate's processes under DeepSpeed join only when told how.
    alone = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.accelerator.is_available()
    over_gloo = [InitProcessGroupKwargs(backend="gloo")] if alone else []
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=over_gloo,
    )
    check_launch(accelerator, settings.expect_world_size)
    set_threads(threads)
    place = (accelerator.process_index, accelerator.num_processes)
    corpus = load_corpus(settings.data, settings.validation_every)
    sampler = WindowSampler(corpus.train, settings.seq_len, settings.batch_size, *place, settings.seed)
    set_seed(settings.seed)
    model = build_model(settings)
    model, optimizer, scheduler = accelerator.prepare(model, *build_optimizer(accelerator, model, settings))
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if settings.resume is not None:
        accelerator.load_state(str(settings.resume))
    losses = {}
    while progress.step < settings.steps:
        loss_sum = torch.zeros((), device=accelerator.device)
        for micro in range(settings.gradient_accumulation_steps):
            number = progress.step * settings.gradient_accumulation_steps + micro
            inputs, targets = (tokens.to(accelerator.device) for tokens in sampler.batch(number))
            with accelerator.accumulate(model):
                loss = language_model_loss(model, inputs, targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                if accelerator.sync_gradients:
                    scheduler.step()
                optimizer.zero_grad()
            loss_sum += loss.detach()
        progress.step += 1
        mean = accelerator.reduce(loss_sum / settings.gradient_accumulation_steps, reduction="mean")
        losses[progress.step] = float(mean)
        accelerator.print(f"step {progress.step}: loss {losses[progress.step]:.4f}")
        if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
            accelerator.save_state(str(settings.checkpoint_dir / f"step-{progress.step:06d}"))
            accelerator.wait_for_everyone()
    facts = {**launched(accelerator, model, optimizer), "losses": losses}
    if accelerator.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, facts)
    leave(accelerator)


def build_optimizer(accelerator: Any, model: Any, settings: Any) -> tuple[Any, Any]:
    """The optimizer and its schedule, or what stands for them where DeepSpeed's config names the optimizer."""
    from functools import partial

    from accelerate.utils import DistributedType, DummyOptim, DummyScheduler
    from schedules import warmup_cosine
    from torch.optim.lr_scheduler import LambdaLR

    from lowmem_adam import AdamW8bit

    groups: list[dict[str, Any]] = [
        {"params": [param for param in model.parameters() if param.ndim >= 2]},
        {"params": [param for param in model.parameters() if param.ndim < 2], "weight_decay": 0.0},
    ]
    factor = partial(warmup_cosine, steps=settings.steps, warmup_steps=settings.warmup_steps)
    told = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = settings.batch_size
        config["gradient_clipping"] = settings.clip  # accelerator.clip_grad_norm_ leaves it to DeepSpeed
        if "optimizer" in config:
            import lowmem_adam.integrations.deepspeed  # noqa: F401 (it makes the name known)

            config["optimizer"]["params"]["seed"] = settings.seed  # what accelerate does not fill in
            stand_in = DummyOptim(groups, **told)
            return stand_in, DummyScheduler(stand_in, lr_scheduler_callable=lambda named: LambdaLR(named, factor))
    # DeepSpeed and FSDP2 have sharded already what they hand over.
    sharded = kind in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    optimizer = AdamW8bit(groups, **told, seed=settings.seed, shard_group=None if sharded else "world")
    return optimizer, LambdaLR(optimizer, factor)


def launched(accelerator: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    """What the launch has come to: who steps, where, and with how much state."""
    import torch

    from lowmem_adam import kernels

    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, and DeepSpeed's
        optimizer = optimizer.optimizer
    group, parameters = optimizer.param_groups[0], sum(param.numel() for param in model.parameters())
    held = torch.tensor(optimizer.memory_report()["total_bytes"], device=accelerator.device)
    deepspeed = getattr(accelerator.state, "deepspeed_plugins", None)
    return {
        "optimizer": type(optimizer).__name__,
        "backend": kernels.choose(group["backend"], group["params"][0].device),
        "weight_decay": [group["weight_decay"] for group in optimizer.param_groups],
        "state_bytes_per_parameter_all_ranks": int(accelerator.reduce(held, reduction="sum")) / parameters,
        "distributed_type": accelerator.distributed_type.value,
        "zero_stage": None if deepspeed is None else accelerator.deepspeed_plugin.zero_stage,
        "parameters_stepped_on": group["params"][0].device.type,
        "world_size": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    app()
