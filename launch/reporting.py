"""What a run leaves behind: measured state bytes, a line of JSON per logged step, a table and a picture."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PICTURE_FILE = "training.png"
# The final training loss is a mean over this last part of the logged steps: one batch alone is too noisy.
FINAL_FRACTION = 0.1
# So many ranks have room in a cell of a table.
RANKS_LISTED = 4


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor the optimizer holds besides the parameters and their gradients.

    Walks all attributes and not `state` alone, so lookup tables and buffers kept elsewhere count too; tensor
    subclasses are opened, and memory that several tensors share is counted once.
    """
    storages = {_place(storage): storage.nbytes() for storage in _storages(_reachable_tensors(optimizer))}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for storage in _storages([*parameters, *gradients]):
        storages.pop(_place(storage), None)
    return sum(storages.values())


def _place(storage: torch.UntypedStorage) -> tuple[str, int]:
    return str(storage.device), storage.data_ptr()


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[torch.UntypedStorage]:
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            yield from _storages(getattr(tensor, name) for name in names)
        elif tensor.numel():
            yield tensor.untyped_storage()


def _reachable_tensors(root: object) -> Iterator[torch.Tensor]:
    """Tensors in nested containers and attributes, without entering code, classes or modules."""
    closed = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, torch.nn.Module)
    seen: set[int] = set()
    waiting: list[object] = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, closed):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())


class MetricsLog:
    """metrics.jsonl, written by the main process only and line by line, so an interrupted run keeps its lines.

    A resumed run keeps the lines up to the step it goes on from; a fresh one starts a new file.
    """

    def __init__(self, output_dir: Path, is_main_process: bool, resumed_step: int = 0):
        self.path = output_dir / METRICS_FILE
        self.is_main_process = is_main_process
        self.resumed_step = resumed_step
        self._file: IO[str] | None = None

    def __enter__(self) -> MetricsLog:
        if self.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [record for record in self._earlier() if record["step"] <= self.resumed_step]
            self._file = self.path.open("w", encoding="utf-8")
            for record in kept:
                self.write(record)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; on other ranks nothing happens."""
        if self._file is not None:
            self._file.write(json_line(record))
            self._file.flush()

    def _earlier(self) -> list[dict[str, Any]]:
        return read_metrics(self.path) if self.resumed_step and self.path.is_file() else []


def json_line(record: dict[str, Any]) -> str:
    """One line of a metrics file."""
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file for machines and for people."""
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All records of a metrics file, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(records: Sequence[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one quantity; what the file has as null was no finite number."""
    chosen = [record for record in records if record["kind"] == kind]
    values = [math.nan if record[name] is None else record[name] for record in chosen]
    return [record["step"] for record in chosen], values


def final_losses(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The training loss over the last tenth of the logged steps, and the last validation loss."""
    _, train = series(records, "train", "loss")
    _, validation = series(records, "validation", "val_loss")
    last = train[-max(1, round(FINAL_FRACTION * len(train))) :]
    return {"final_train_loss": sum(last) / len(last), "final_val_loss": validation[-1]}


def write_report(output_dir: Path, summary: dict[str, Any]) -> None:
    """Complete the summary with the losses, write it, draw the picture and print the table."""
    from plots import draw_run

    records = read_metrics(output_dir / METRICS_FILE)
    summary.update(final_losses(records))
    write_json(output_dir / SUMMARY_FILE, summary)
    draw_run(output_dir / PICTURE_FILE, summary, records)
    Console().print(summary_table(summary))


def summary_table(summary: dict[str, Any]) -> Table:
    """The figures of one run for the terminal."""
    table = Table(title=f"{summary['optimizer']}, {summary['steps']} steps", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in summary_rows(summary):
        table.add_row(name, value)
    return table


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and formatted values; one place, so that the run's table and the comparison's agree."""
    return [
        ("world size", str(summary["world_size"])),
        ("parameters", f"{summary['parameters']:,}"),
        ("final training loss (nats a byte)", f"{summary['final_train_loss']:.4f}"),
        ("final validation loss (nats a byte)", f"{summary['final_val_loss']:.4f}"),
        ("optimizer state of each rank, MiB", sizes_by_rank(summary["optimizer_state_bytes"])),
        ("optimizer state of the largest rank, MiB", f"{max(summary['optimizer_state_bytes']) / 2**20:.2f}"),
        ("optimizer state of the largest rank, bytes a parameter", f"{summary['state_bytes_per_parameter']:.3f}"),
        (
            "optimizer state of all ranks, bytes a parameter",
            f"{sum(summary['optimizer_state_bytes']) / summary['parameters']:.3f}",
        ),
        ("optimizer step, median ms", f"{summary['optimizer_step_ms_median']:.2f}"),
        ("whole step, median ms", f"{summary['step_ms_median']:.1f}"),
        ("tokens a second", f"{summary['tokens_per_second']:,.0f}"),
    ]


def sizes_by_rank(sizes: Sequence[int]) -> str:
    """Bytes of every rank in MiB; of many ranks the smallest and the largest."""
    mib = [f"{size / 2**20:.2f}" for size in (sizes if len(sizes) <= RANKS_LISTED else (min(sizes), max(sizes)))]
    return ", ".join(mib) if len(sizes) <= RANKS_LISTED else f"{mib[0]} to {mib[1]}"
