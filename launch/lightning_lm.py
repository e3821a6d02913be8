"""Train a small Llama on bytes with PyTorch Lightning: `python launch/lightning_lm.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

DATA_HELP = "A text file or a folder of them; may be given several times. Default: the Python standard library."
TOTAL_HELP = "Windows a step, dealt out to the processes: any number of them reads the same ones."
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
PRECISION_HELP = "32-true, bf16-mixed or bf16-true: the precision of Lightning's Trainer."


@app.command()
def main(
    output_dir: Annotated[Path, typer.Option(help="Where metrics, summary and checkpoints go.")] = Path("runs/pl"),
    processes: Annotated[int, typer.Option(help="CPU processes, under DDP if more than one.")] = 1,
    shard: Annotated[bool, typer.Option(help="Share the optimizer's state out over the processes.")] = False,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Reaches matrices only.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Fixes weights, data order and rounding.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 60,
    warmup_steps: Annotated[int, typer.Option(help="Linear warmup before the cosine.")] = 6,
    total_batch_size: Annotated[int, typer.Option(help=TOTAL_HELP)] = 16,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 does not clip.")] = 1.0,
    precision: Annotated[str, typer.Option(help=PRECISION_HELP)] = "32-true",
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    validation_every: Annotated[int, typer.Option(help="Every k-th file is held out.")] = 20,
    seq_len: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    intermediate_size: Annotated[int, typer.Option(help="Width of its feed-forward layers.")] = 344,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    eval_windows: Annotated[int, typer.Option(help="Windows of held-out text an evaluation.")] = 64,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints and evaluations.")] = 20,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint (.ckpt) to go on from.")] = None,
) -> None:
    """Train a Llama with bytes as tokens under Lightning and write metrics.jsonl, summary.json and checkpoints."""
    options = dict(locals())
    own = {name: options.pop(name) for name in ("processes", "total_batch_size", "precision", "checkpoint_every")}
    options["data"] = tuple(data or ())
    # Imported here so that --help does not wait for Lightning.
    from lightning_lm_training import train
    from lm_settings import TrainingSettings, check_choice

    try:
        if processes < 1 or total_batch_size < 1 or total_batch_size % processes:
            raise ValueError(
                f"total_batch_size is {total_batch_size}; accepted with {processes} processes: multiples of them"
            )
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
        check_choice("precision", precision, PRECISIONS)
        if resume is not None and not resume.is_file():
            raise ValueError(f"--resume {resume}: no such file")
        settings = TrainingSettings(**options, batch_size=total_batch_size // processes)
    except ValueError as error:
        typer.echo(f"lightning_lm.py: {error}", err=True)
        raise typer.Exit(2) from error
    train(settings, processes, own["precision"], own["checkpoint_every"])


if __name__ == "__main__":
    app()
