"""A language model under DeepSpeed's own engine, with the optimizer named in its config.

    torchrun --nproc_per_node N launch/deepspeed_lm.py --config launch/configs/deepspeed_engine.json

The total batch is the config's, so any number of processes that divides it reads the same windows, and a universal
checkpoint goes on with another number. Without a GPU set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False)

DATA_HELP = "A text file or a folder of them; may be given several times. Default: the Python standard library."
UNIVERSAL_HELP = "The checkpoint is a universal one, which any number of processes can load."


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="DeepSpeed's config, a JSON file.")],
    output: Annotated[Path, typer.Option(help="A JSON file for losses, and for what stepped.")] = Path("runs/ds.json"),
    seed: Annotated[int, typer.Option(help="Fixes weights and data order.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 250,
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    seq_len: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 192,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Where checkpoints go; none without.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints; 0: none.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint: a folder global_stepN.")] = None,
    universal: Annotated[bool, typer.Option("--universal", help=UNIVERSAL_HELP)] = False,
) -> None:
    """Train a Llama with bytes as tokens; losses and facts go to a JSON file."""
    options = {name: value for name, value in dict(locals()).items() if name not in ("config", "output", "universal")}
    # Imported here so that --help does not wait for transformers and DeepSpeed.
    from lm_settings import TrainingSettings

    from lowmem_adam.integrations.deepspeed import check_config

    try:
        if findings := check_config(config):
            raise ValueError("\n".join(f"{config}: {finding}" for finding in findings))
        if resume is not None and not resume.is_dir():
            raise ValueError(f"--resume {resume}: no such folder")
        settings = TrainingSettings(**options | {"data": tuple(data or ()), "output_dir": output.parent})
    except (OSError, ValueError) as error:
        typer.echo(f"deepspeed_lm.py: {error}", err=True)
        raise typer.Exit(2) from error
    ds_config = json.loads(config.read_text(encoding="utf-8"))
    if universal:
        ds_config["checkpoint"] = {"load_universal": True}
    run(settings, ds_config, output)


def run(settings: Any, ds_config: dict[str, Any], output: Path) -> None:
    """From joining the other processes to leaving them."""
    import deepspeed
    import torch
    from accelerate.utils import set_seed
    from lm_data import WindowSampler, load_corpus
    from lm_job import build_model
    from lm_training import language_model_loss
    from processes import settle
    from reporting import write_json
    from torch import distributed as dist

    deepspeed.init_distributed()
    set_seed(settings.seed)
    model = build_model(settings)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    corpus = load_corpus(settings.data, settings.validation_every)
    place = (dist.get_rank(), dist.get_world_size())
    batch_size = engine.train_micro_batch_size_per_gpu()
    sampler = WindowSampler(corpus.train, settings.seq_len, batch_size, *place, settings.seed)
    if settings.resume is not None:
        path, _ = engine.load_checkpoint(str(settings.resume.parent), tag=settings.resume.name)
        if path is None:
            raise FileNotFoundError(f"{settings.resume} is no checkpoint; accepted: a folder that DeepSpeed has saved")
    losses = {}
    while engine.global_steps < settings.steps:
        total = torch.zeros((), device=engine.device)
        # Counted from steps: DeepSpeed's own count of batches begins anew after a load.
        first = engine.global_steps * engine.gradient_accumulation_steps()
        for micro in range(engine.gradient_accumulation_steps()):
            inputs, targets = (tokens.to(engine.device) for tokens in sampler.batch(first + micro))
            loss = language_model_loss(engine, inputs, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        losses[engine.global_steps] = float(total) / place[1]
        if place[0] == 0:
            print(f"step {engine.global_steps}: loss {losses[engine.global_steps]:.4f}", flush=True)
        if settings.checkpoint_every and engine.global_steps % settings.checkpoint_every == 0:
            engine.save_checkpoint(str(settings.checkpoint_dir))
    if place[0] == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {**facts(engine), "losses": losses})
    dist.barrier()
    settle(place[1])
    dist.destroy_process_group()


def facts(engine: Any) -> dict[str, Any]:
    """Who has stepped, and with how much state."""
    from torch import distributed as dist

    stepped = engine.basic_optimizer
    return {
        "world_size": dist.get_world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "optimizer": type(stepped).__name__,
        "bytes_per_parameter": stepped.memory_report()["bytes_per_parameter"],
        "lr": engine.get_lr()[0],
    }


if __name__ == "__main__":
    app()
