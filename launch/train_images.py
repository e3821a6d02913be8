"""Train a small image classifier and evaluate it: digits, MNIST or a folder of images, one learning rate or several.

python launch/train_images.py
python launch/train_images.py --data photos/ --colour --image-size 64 --augment
python launch/train_images.py --sweep-lr 3e-4,1e-3,3e-3
ACCELERATE_USE_CPU=true accelerate launch --config_file launch/configs/cpu_2.yaml launch/train_images.py
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import accelerate
import torch
import typer
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from image_data import ImageSet, Split, load_images, stratified_split
from image_plots import plot_confusion, plot_curves, plot_sweep
from image_training import (
    SCHEDULES,
    EpochMetrics,
    Evaluation,
    Trainer,
    TrainResult,
    TrainSettings,
    check_batch_size,
    check_optimizer,
    evaluate_part,
)
from optimizers import FACTORIES
from processes import leave
from reporting import json_line, write_json
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

DEFAULTS = TrainSettings()


@dataclass(frozen=True)
class Job:
    """What all runs of one call share."""

    accelerator: Accelerator
    console: Console
    images: ImageSet
    split: Split
    out: Path

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def parse_rates(text: str) -> list[float]:
    """``1e-4,3e-4`` to numbers; each must be a number and be given once."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--sweep-lr '{text}' is not accepted: give numbers with commas, as 3e-4,1e-3,3e-3") from error
    if len(rates) < 2 or len(set(rates)) != len(rates):
        raise ValueError(f"--sweep-lr '{text}' is not accepted: give two or more different learning rates")
    return rates


def best_run(results: Sequence[TrainResult]) -> TrainResult | None:
    """The run with the lowest validation loss among those that did not diverge."""
    sound = [(result.best.validation_loss, result) for result in results if result.best and not result.diverged]
    return min(sound, key=lambda pair: pair[0])[1] if sound else None


def train_with_progress(job: Job, settings: TrainSettings, folder: Path) -> TrainResult:
    """One run with a progress bar and ``metrics.jsonl``, both on the main process only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    status = TextColumn("{task.fields[status]}")
    with Progress(*columns, status, console=job.console, disable=not job.main) as progress:
        task = progress.add_task(f"lr {settings.lr:g}", total=settings.epochs, status="")

        def show(metrics: EpochMetrics) -> None:
            text = f"val loss {metrics.validation_loss:.4f}  accuracy {metrics.validation_accuracy:.2%}"
            progress.update(task, advance=1, status=text)

        record = _metrics_writer(folder) if job.main else None

        def on_epoch(metrics: EpochMetrics) -> None:
            show(metrics)
            if record is not None:
                record(metrics)

        return Trainer(job.accelerator, job.images, job.split, settings).run(on_epoch)


def _metrics_writer(folder: Path) -> Callable[[EpochMetrics], None]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    path.write_text("", encoding="utf-8")

    def record(metrics: EpochMetrics) -> None:
        # Opened anew for each epoch: what is there is complete also when the run is stopped.
        with path.open("a", encoding="utf-8") as file:
            file.write(json_line(asdict(metrics)))

    return record


def describe(job: Job) -> dict[str, Any]:
    """The part of the summary that names the data, the machine and the versions."""
    return {
        "data": job.images.name,
        "images": job.split.counts(),
        "classes": list(job.images.class_names),
        "image_shape": list(job.images.images.shape[1:]),
        "processes": job.accelerator.num_processes,
        "device": str(job.accelerator.device.type),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def finish(job: Job, result: TrainResult) -> dict[str, Any]:
    """Test the best weights once, write every artefact of the run and return its summary."""
    test = evaluate_part(job.accelerator, result, job.images, job.split.test)
    cells = test.confusion(len(job.images.class_names))
    recall = cells.diagonal() / cells.sum(dim=1)
    summary = {
        **describe(job),
        **result.summary(),
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_images": len(test.labels),
        "test_recall": dict(zip(job.images.class_names, recall.tolist(), strict=True)),
        "confusion": cells.tolist(),
    }
    if job.main:
        _write_artefacts(job, result, test, cells)
        write_json(job.out / "summary.json", summary)
    return summary


def _write_artefacts(job: Job, result: TrainResult, test: Evaluation, cells: torch.Tensor) -> None:
    assert result.best is not None
    settings = result.settings
    name = f"{Path(job.images.name).name} · {settings.optimizer} · {settings.schedule} · lr {settings.lr:g}"
    plot_curves(result.history, result.best, name, job.out / "curves.png")
    title = f"Test part of {Path(job.images.name).name}: {test.accuracy:.2%} of {len(test.labels)} correct"
    plot_confusion(cells.numpy(), job.images.class_names, title, job.out / "confusion.png")
    weights = {key: tensor.cpu() for key, tensor in result.model.state_dict().items()}
    content = {
        "weights": weights,
        "mean": result.normalizer.mean,
        "std": result.normalizer.std,
        "classes": list(job.images.class_names),
        "channels": job.images.channels,
        "image_size": job.images.size,
        "width": settings.width,
    }
    torch.save(content, job.out / "model.pt")


def summary_table(summary: dict[str, Any]) -> Table:
    settings = summary["settings"]
    table = Table(title="Image classification", title_justify="left", show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    images = summary["images"]
    rows = {
        "data": f"{escape(summary['data'])}: {images['train']} / {images['validation']} / {images['test']} images",
        "optimizer": settings["optimizer"],
        "schedule": f"{settings['schedule']}, lr {settings['lr']:g} to {summary['final_lr']:.2g}",
        "processes": f"{summary['processes']} ({summary['device']})",
        "best epoch": f"{summary['best_epoch']} of {summary['epochs_run']}",
        "validation loss": f"{summary['validation_loss']:.4f}",
        "validation accuracy": f"{summary['validation_accuracy']:.2%}",
        "test accuracy": f"[bold green]{summary['test_accuracy']:.2%}[/]",
        "parameters": f"{summary['parameters']:,}",
        "state bytes a parameter": f"{summary['state_bytes_per_parameter']:.3f}",
        "optimizer step": f"{summary['optimizer_step_ms']:.2f} ms (median)",
        "training time": f"{summary['seconds']:.1f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def sweep_table(results: Sequence[TrainResult], best: TrainResult | None) -> Table:
    """One row a learning rate, in the order given, the best marked."""
    table = Table(title="Learning rates, same seed and data order", title_justify="left")
    for heading in ("lr", "val loss", "val acc", "best epoch", "final lr", "step ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(min_width=len("diverged"))
    for result in results:
        chosen, metrics = result is best, result.best
        if metrics is None:
            outcome = ("-", "-", "-")
        else:
            outcome = (f"{metrics.validation_loss:.4f}", f"{metrics.validation_accuracy:.2%}", str(metrics.epoch))
        costs = (f"{result.history[-1].lr:.2g}", f"{result.optimizer_step_ms:.2f}")
        mark = "best" if chosen else "diverged" if result.diverged else ""
        table.add_row(f"{result.settings.lr:g}", *outcome, *costs, mark, style="bold green" if chosen else None)
    return table


def run_sweep(job: Job, settings: TrainSettings, rates: Sequence[float]) -> TrainResult | None:
    """Train once a rate and compare; the test part is not touched, so that choosing by it is impossible."""
    runs = [replace(settings, lr=rate) for rate in rates]
    results = [train_with_progress(job, run, job.out / f"lr_{run.lr:g}") for run in runs]
    best = best_run(results)
    if job.main:
        job.console.print(sweep_table(results, best))
        content = {"best_lr": best.settings.lr if best else None, "runs": [result.summary() for result in results]}
        write_json(job.out / "sweep.json", {**describe(job), **content})
        if best is not None:
            assert best.best is not None
            name = f"{Path(job.images.name).name} · {settings.optimizer} · {settings.schedule}"
            plot_sweep(results, best, name, job.out / "sweep.png")
            figures = f"[bold]{best.settings.lr:g}[/] ({best.best.validation_loss:.4f})"
            job.console.print(f"Best learning rate by validation loss: {figures}", highlight=False)
    return best


def run(job: Job, settings: TrainSettings, rates: Sequence[float]) -> int:
    """All of it after the arguments are read; returns the exit status."""
    if job.main:
        job.out.mkdir(parents=True, exist_ok=True)
    if rates:
        chosen = run_sweep(job, settings, rates)
    else:
        result = train_with_progress(job, settings, job.out)
        chosen = best_run([result])
    if chosen is None:
        if job.main:
            job.console.print("[bold red]diverged[/]: the loss is not finite; try a lower learning rate")
        return 1
    summary = finish(job, chosen)
    if job.main:
        job.console.print(summary_table(summary))
        job.console.print(f"Written to {escape(str(job.out))}", highlight=False)
    return 0


def main(
    data: Annotated[str, typer.Option(help="digits, mnist5k, or a folder with one sub-folder a class.")] = "digits",
    image_size: Annotated[int, typer.Option(help="Folders: side of the square every image is resized to.")] = 32,
    colour: Annotated[bool, typer.Option("--colour/--grey", help="Folders: read three channels or one.")] = False,
    validation_fraction: Annotated[float, typer.Option(help="Share of each class kept for validation.")] = 0.15,
    test_fraction: Annotated[float, typer.Option(help="Share of each class kept for the final test.")] = 0.15,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(FACTORIES)}.")] = DEFAULTS.optimizer,
    schedule: Annotated[str, typer.Option(help=f"Learning rate: {', '.join(SCHEDULES)}.")] = DEFAULTS.schedule,
    lr: Annotated[float, typer.Option(help="Learning rate to begin with.")] = DEFAULTS.lr,
    sweep_lr: Annotated[str, typer.Option(help="Compare several, as 3e-4,1e-3,3e-3; --lr is then not used.")] = "",
    weight_decay: Annotated[float, typer.Option(help="Reaches every parameter; adam8bit: L2.")] = DEFAULTS.weight_decay,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option(help="Images a step, all processes together.")] = DEFAULTS.batch_size,
    plateau_factor: Annotated[float, typer.Option(help="plateau: what the rate is multiplied with.")] = 0.5,
    plateau_patience: Annotated[int, typer.Option(help="plateau: epochs without improvement before that.")] = 2,
    augment: Annotated[bool, typer.Option(help="Small random rotations, shifts and scalings.")] = False,
    width: Annotated[int, typer.Option(help="Channels of the first convolution, a multiple of 8.")] = DEFAULTS.width,
    dropout: Annotated[float, typer.Option(help="Before the last layer.")] = DEFAULTS.dropout,
    seed: Annotated[int, typer.Option(help="Split, initial weights, data order, augmentation.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results; files of an earlier run are replaced.")] = Path(
        "runs/images"
    ),
) -> None:
    """Train a small convolutional network on images and evaluate it."""
    # split_batches: --batch-size is the size of the whole step, so that one process and several train alike.
    loader = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=seed)
    accelerator = Accelerator(dataloader_config=loader)
    console = Console()
    try:
        settings = TrainSettings(
            optimizer, schedule, lr, weight_decay, epochs, batch_size,
            plateau_factor, plateau_patience, augment, width, dropout, seed,
        )  # fmt: skip
        rates = parse_rates(sweep_lr) if sweep_lr else []
        for rate in rates:
            replace(settings, lr=rate)  # checks every rate before the first run
        check_optimizer(optimizer)
        images = load_images(data, image_size=image_size, colour=colour)
        split = stratified_split(images, validation=validation_fraction, test=test_fraction, seed=seed)
        check_batch_size(batch_size, len(split.train), accelerator.num_processes)
    except ValueError as error:
        # Every process meets the same error in its arguments or data; one of them says so. What training itself
        # raises is not caught here: that is a fault, and its traceback is wanted.
        if accelerator.is_main_process:
            Console(stderr=True).print("[bold red]error:[/]", Text(str(error)), soft_wrap=True)
        accelerator.end_training()
        raise typer.Exit(2) from None
    status = run(Job(accelerator, console, images, split, out), settings, rates)
    accelerator.wait_for_everyone()
    leave(accelerator)
    raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
