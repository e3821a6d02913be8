"""Fine-tune a small Llama with TRL's SFTTrainer: `accelerate launch launch/sft_lm.py --help`.

The optimizer's state is shared out over the processes. docs/trainer.md has the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

DATA_HELP = "A Python file or a folder of them; may be given several times. Default: the Python standard library."
RESUME_HELP = "A checkpoint of this job to go on from, saved by any number of processes."


@app.command()
def main(
    output_dir: Annotated[Path, typer.Option(help="Where checkpoints and trainer_state.json go.")] = Path("runs/sft"),
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(help="Of matrices; biases and norms have none.")] = 1e-2,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant, after the warmup.")] = "cosine",
    warmup_steps: Annotated[int, typer.Option(help="Linear warmup.")] = 5,
    shard: Annotated[bool, typer.Option(help="Share the optimizer's state out over the processes.")] = True,
    seed: Annotated[int, typer.Option(help="Fixes weights, data order and rounding.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Examples a process and micro-batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 does not clip.")] = 1.0,
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    examples: Annotated[int, typer.Option(help="Functions to learn from, at most.")] = 1000,
    seq_len: Annotated[int, typer.Option(help="Tokens of an example, at most; longer ones are cut.")] = 256,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 2,
    log_every: Annotated[int, typer.Option(help="Steps between two lines of losses.")] = 5,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints; the last step has one.")] = 20,
    resume: Annotated[Path | None, typer.Option(help=RESUME_HELP)] = None,
    expect_world_size: Annotated[int | None, typer.Option(help="Fail unless so many processes run.")] = None,
) -> None:
    """Teach a Llama to write a function's body after its head and docstring, with moments in 8 bits."""
    options = dict(locals())
    options["data"] = tuple(data or ())
    del options["examples"]
    # Imported here so that --help does not wait for transformers.
    from sft_data import SPECIAL_TOKENS, byte_tokenizer, load_functions
    from trainer_parts import TrainerSettings, build_model, start, train
    from trl import SFTConfig, SFTTrainer

    try:
        settings = TrainerSettings(**options)
        start(settings)
        learnt, held_out = load_functions(settings.data, examples, longest_prompt=seq_len // 2)
    except ValueError as error:
        typer.echo(f"sft_lm.py: {error}", err=True)
        raise typer.Exit(2) from error
    # In float32, as the model is: SFTConfig would choose bf16 and compute the forward pass anew in the backward pass.
    args = SFTConfig(max_length=seq_len, bf16=False, gradient_checkpointing=False, **settings.arguments())
    trainer = SFTTrainer(
        model=build_model(settings, len(SPECIAL_TOKENS)),
        args=args,
        train_dataset=learnt,
        eval_dataset=held_out,
        processing_class=byte_tokenizer(),
        **settings.optimizer(args),
    )
    train(trainer, settings)


if __name__ == "__main__":
    app()
