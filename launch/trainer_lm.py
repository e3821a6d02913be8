"""Train a small Llama on bytes with transformers' Trainer: `accelerate launch launch/trainer_lm.py --help`.

The optimizer's state is shared out over the processes. docs/trainer.md has the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

DATA_HELP = "A text file or a folder of them; may be given several times. Default: the Python standard library."
RESUME_HELP = "A checkpoint of this job to go on from, saved by any number of processes."


@app.command()
def main(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints and trainer_state.json go.")] = Path(
        "runs/trainer"
    ),
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Of matrices; biases and norms have none.")] = 1e-2,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warmup.")] = "cosine",
    warmup_steps: Annotated[int, typer.Option(help="Linear warmup.")] = 10,
    shard: Annotated[bool, typer.Option(help="Share the optimizer's state out over the processes.")] = True,
    seed: Annotated[int, typer.Option(help="Fixes weights, data order and rounding.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 120,
    batch_size: Annotated[int, typer.Option(help="Windows a process and micro-batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 does not clip.")] = 1.0,
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    seq_len: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    eval_windows: Annotated[int, typer.Option(help="Windows of held-out text at the end.")] = 64,
    log_every: Annotated[int, typer.Option(help="Steps between two lines of losses.")] = 10,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints; the last step has one.")] = 60,
    resume: Annotated[Path | None, typer.Option(help=RESUME_HELP)] = None,
    expect_world_size: Annotated[int | None, typer.Option(help="Fail unless so many processes run.")] = None,
) -> None:
    """Train a Llama with bytes as tokens under transformers' Trainer, with moments in 8 bits."""
    options = dict(locals())
    options["data"] = tuple(data or ())
    del options["eval_windows"]
    # Imported here so that --help does not wait for transformers.
    import transformers
    from byte_windows import ByteWindows
    from lm_data import load_corpus, validation_starts
    from trainer_parts import TrainerSettings, build_model, start, train

    try:
        settings = TrainerSettings(**options)
        start(settings)
        corpus = load_corpus(settings.data)
        held_out = validation_starts(corpus.validation, seq_len, eval_windows)
        windows = ByteWindows.of(corpus.train, seq_len)
    except ValueError as error:
        typer.echo(f"trainer_lm.py: {error}", err=True)
        raise typer.Exit(2) from error
    args = transformers.TrainingArguments(**settings.arguments())
    trainer = transformers.Trainer(
        model=build_model(settings),
        args=args,
        train_dataset=windows,
        eval_dataset=ByteWindows(corpus.validation, held_out, seq_len),
        **settings.optimizer(args),
    )
    train(trainer, settings)


if __name__ == "__main__":
    app()
