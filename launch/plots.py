"""Pictures of one run and of several side by side, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from reporting import series

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
GREY = "#555555"
DPI = 160


def draw_run(path: Path, summary: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """Loss above, learning rate and gradient norm below, the run's figures in the title."""
    figure = _figure(8.0, 6.0)
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, losses = series(records, "train", "loss")
    loss_axes.plot(steps, losses, color=COLOURS[0], alpha=0.25, linewidth=1)
    loss_axes.plot(steps, smoothed(losses), color=COLOURS[0], label="training, smoothed")
    _plot_validation(loss_axes, records, COLOURS[1], "-", "validation")
    _finish(loss_axes, ylabel="loss (nats a byte)")
    loss_axes.legend(frameon=False)
    lr_axes.plot(steps, series(records, "train", "lr")[1], color=COLOURS[2], label="learning rate")
    _finish(lr_axes, xlabel="optimizer step", ylabel="learning rate")
    lr_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    norm_axes = lr_axes.twinx()
    norm_axes.plot(steps, series(records, "train", "grad_norm")[1], color=GREY, linewidth=0.8, alpha=0.7)
    norm_axes.set_ylabel("gradient norm", color=GREY)
    norm_axes.spines["top"].set_visible(False)
    figure.suptitle(f"{summary['optimizer']}: byte-level Llama, {summary['parameters']:,} parameters", weight="bold")
    loss_axes.set_title(_figures_line(summary), fontsize=9, color=GREY)
    figure.savefig(path, dpi=DPI)


def draw_comparison(
    path: Path, labels: Sequence[str], runs: Sequence[tuple[dict[str, Any], list[dict[str, Any]]]]
) -> None:
    """Training curves, validation curves, and a bar of optimizer state for each run."""
    figure = _figure(13.0, 4.8)
    train_axes, validation_axes, state_axes = figure.subplots(1, 3, width_ratios=(1.25, 1.25, 1))
    for index, (label, (summary, records)) in enumerate(zip(labels, runs, strict=True)):
        colour, dash = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        steps, losses = series(records, "train", "loss")
        train_axes.plot(steps, losses, color=colour, alpha=0.15, linewidth=0.8)
        train_axes.plot(steps, smoothed(losses), color=colour, linestyle=dash, label=label)
        _plot_validation(validation_axes, records, colour, dash, f"{label}, last {summary['final_val_loss']:.3f}")
    _finish(train_axes, title="Training loss, smoothed", xlabel="optimizer step", ylabel="nats a byte")
    _finish(validation_axes, title="Loss on held-out files", xlabel="optimizer step", ylabel="nats a byte")
    for axes in (train_axes, validation_axes):
        axes.legend(frameon=False, fontsize=9)
    _draw_state_bars(state_axes, labels, [summary for summary, _ in runs])
    figure.suptitle(_comparison_title([summary for summary, _ in runs]), weight="bold")
    figure.savefig(path, dpi=DPI)


def smoothed(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A running mean over about a twentieth of the run.

    It narrows evenly towards the start, where the loss falls steeply, and keeps looking back at the end, where a
    single batch would otherwise decide how the curve ends.
    """
    array = np.asarray(values, dtype=np.float64)
    widest = max(1, len(array) // 40)
    halves = [min(widest, index) for index in range(len(array))]
    return np.asarray([array[index - half : index + half + 1].mean() for index, half in enumerate(halves)])


def _draw_state_bars(axes: Axes, labels: Sequence[str], summaries: Sequence[dict[str, Any]]) -> None:
    sizes = [max(summary["optimizer_state_bytes"]) / 2**20 for summary in summaries]
    places = np.arange(len(sizes))
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(sizes))]
    axes.bar(places, sizes, color=colours, width=0.6)
    for place, size, summary in zip(places, sizes, summaries, strict=True):
        text = f"{size:.2f} MiB\n{summary['state_bytes_per_parameter']:.3f} B a parameter"
        axes.annotate(text, (float(place), size), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_ylim(0, 1.2 * max(sizes))
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    rotation = 25 if len(labels) > 3 or len(labels) * max(map(len, labels)) > 42 else 0
    axes.set_xticks(places, labels, rotation=rotation, ha="right" if rotation else "center")
    _finish(axes, title="Optimizer state of the largest process", ylabel="MiB")
    axes.grid(visible=False, axis="x")


def _plot_validation(axes: Axes, records: Sequence[dict[str, Any]], colour: str, dash: Any, label: str) -> None:
    steps, losses = series(records, "validation", "val_loss")
    axes.plot(steps, losses, color=colour, linestyle=dash, marker="o", markersize=4, label=label)


def _figures_line(summary: dict[str, Any]) -> str:
    processes = "process" if summary["world_size"] == 1 else "processes"
    return (
        f"validation loss {summary['final_val_loss']:.3f}  |  state {summary['state_bytes_per_parameter']:.3f} bytes a "
        f"parameter and process  |  optimizer step {summary['optimizer_step_ms_median']:.1f} ms  |  "
        f"{summary['world_size']} {processes}"
    )


def _comparison_title(summaries: Sequence[dict[str, Any]]) -> str:
    parameters = sorted({summary["parameters"] for summary in summaries})
    sizes = ", ".join(f"{count / 1e6:.2f}" for count in parameters)
    worlds = ", ".join(str(size) for size in sorted({summary["world_size"] for summary in summaries}))
    plural = "process" if worlds == "1" else "processes"
    return f"Byte-level Llama of {sizes} million parameters, {worlds} {plural}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(axes: Axes, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """The same plain look for every axes: light grid, no box."""
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if xlabel:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
