"""Train a small Llama on bytes under accelerate: `accelerate launch [--config_file FILE] launch/train_lm.py --help`.

This file is the command line only; lm_training.py holds the job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from optimizers import FACTORIES, OURS

app = typer.Typer(add_completion=False)

SHARD_HELP = f"Share the optimizer's state out over the processes; for {', '.join(OURS)}."
OFFLOAD_HELP = f"Keep the optimizer's state on the host and step there; for {', '.join(OURS)}."
GRADIENTS_HELP = "With --offload: take gradients to the host, too, as the backward pass makes them."
DATA_HELP = "A text file or a folder of them; may be given several times. Default: the Python standard library."

TOTAL_HELP = "Windows an optimizer step over all processes, which accumulate to it: then any number of them can resume."
LATEST_HELP = "Go on from the latest checkpoint in --checkpoint-dir; start afresh where there is none."
TIMEOUT_HELP = "Seconds after which a process gives up waiting for another. Default: torch's, half an hour over gloo."


@app.command()
def main(
    output_dir: Annotated[Path, typer.Option(help="Where metrics, summary and picture go.")] = Path("runs/lm"),
    optimizer: Annotated[str, typer.Option(help=f"One of: {', '.join(FACTORIES)}.")] = "adamw8bit",
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    betas: Annotated[tuple[float, float], typer.Option(help="Adam's two decay rates.")] = (0.9, 0.999),
    weight_decay: Annotated[float, typer.Option(help="Reaches every parameter; adam8bit: L2.")] = 1e-2,
    shard: Annotated[bool, typer.Option(help=SHARD_HELP)] = False,
    offload: Annotated[bool, typer.Option(help=OFFLOAD_HELP)] = False,
    offload_gradients: Annotated[bool, typer.Option(help=GRADIENTS_HELP)] = False,
    seed: Annotated[int, typer.Option(help="Fixes weights, data order and rounding.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 250,
    warmup_steps: Annotated[int, typer.Option(help="Linear warmup before the cosine.")] = 25,
    final_lr_fraction: Annotated[float, typer.Option(help="Where the cosine ends, as a part of --lr.")] = 0.1,
    batch_size: Annotated[int, typer.Option(help="Windows a process and micro-batch.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Micro-batches an optimizer step.")] = 1,
    total_batch_size: Annotated[int | None, typer.Option(help=TOTAL_HELP)] = None,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 does not clip.")] = 1.0,
    precision: Annotated[str | None, typer.Option(help="no, or bf16 (mixed). Default: the launcher's choice.")] = None,
    param_dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for pure bf16 parameters.")] = "float32",
    data: Annotated[list[Path] | None, typer.Option(help=DATA_HELP)] = None,
    validation_every: Annotated[int, typer.Option(help="Every k-th file is held out.")] = 20,
    seq_len: Annotated[int, typer.Option(help="Bytes a window.")] = 128,
    hidden_size: Annotated[int, typer.Option(help="Width of the model.")] = 192,
    intermediate_size: Annotated[int, typer.Option(help="Width of its feed-forward layers.")] = 512,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = 4,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    log_every: Annotated[int, typer.Option(help="Steps between two lines of metrics.jsonl.")] = 1,
    eval_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 50,
    eval_windows: Annotated[int, typer.Option(help="Windows of held-out text an evaluation.")] = 128,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Where checkpoints go; none without.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints; 0: the last step only.")] = 0,
    resume: Annotated[Path | None, typer.Option(help="A checkpoint, or a folder of them for its latest.")] = None,
    resume_latest: Annotated[bool, typer.Option(help=LATEST_HELP)] = False,
    expect_world_size: Annotated[int | None, typer.Option(help="Fail unless so many processes run.")] = None,
    collective_timeout: Annotated[float | None, typer.Option(help=TIMEOUT_HELP)] = None,
) -> None:
    """Train a Llama with bytes as tokens and write metrics.jsonl, summary.json and training.png."""
    options = dict(locals())
    options["data"] = tuple(data or ())
    # Imported here so that --help does not wait for transformers.
    from lm_checkpoint import NothingLeftError
    from lm_settings import TrainingSettings
    from lm_training import DivergedError, prepare_job, run_job

    try:
        job = prepare_job(TrainingSettings(**options))
    except NothingLeftError as error:
        # Whoever starts a run again and again, as torchrun does, does not ask for more than that it is finished.
        raise _exit(error, 0 if resume_latest else 2) from error
    except ValueError as error:
        raise _exit(error, 2) from error
    # What else goes wrong from here on is a fault, and its traceback is wanted.
    try:
        run_job(job)
    except DivergedError as error:
        raise _exit(error, 1) from error


def _exit(error: Exception, status: int) -> typer.Exit:
    """Say what is wrong in one line and end with this status."""
    typer.echo(f"train_lm.py: {error}", err=True)
    return typer.Exit(status)


if __name__ == "__main__":
    app()
