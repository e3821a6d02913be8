"""The three pictures of the classification job, drawn without pyplot's global state so that no display is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from image_training import EpochMetrics, TrainResult
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

TRAIN, VALIDATION, MARK, GREY = "#7a8fa6", "#0b5fa5", "#c8442b", "#666666"
# Any: matplotlib types the keys as a union of its several hundred names.
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}
# Above this many classes the numbers in the cells would not be legible.
MOST_CLASSES_WITH_NUMBERS = 20


def plot_curves(history: Sequence[EpochMetrics], best: EpochMetrics, title: str, path: Path) -> None:
    """Loss, accuracy and learning rate over the epochs; the best epoch is marked in the first two."""
    epochs = [metrics.epoch for metrics in history]
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.0), layout="constrained")
        loss, accuracy, rate = figure.subplots(1, 3)
        marker = "o" if len(history) < 40 else ""
        for axes, kind in ((loss, "loss"), (accuracy, "accuracy")):
            scale = 100.0 if kind == "accuracy" else 1.0
            for part, colour in (("train", TRAIN), ("validation", VALIDATION)):
                values = [scale * getattr(metrics, f"{part}_{kind}") for metrics in history]
                axes.plot(epochs, values, color=colour, marker=marker, markersize=3, label=part)
            axes.plot(
                [best.epoch], [scale * getattr(best, f"validation_{kind}")],
                marker="o", markersize=9, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1.8,
                linestyle="none", label=f"best epoch ({best.epoch})",
            )  # fmt: skip
            axes.legend()
        loss.set(title="Cross-entropy", ylabel="loss")
        _log_scale(loss, [metrics.validation_loss for metrics in history])
        accuracy.set(title="Accuracy", ylabel="% correct")
        rate.step(epochs, [metrics.lr for metrics in history], where="mid", color=VALIDATION)
        rate.set(title="Learning rate", ylabel="lr")
        if _log_scale(rate, [metrics.lr for metrics in history]):
            rate.yaxis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
            rate.yaxis.set_minor_locator(NullLocator())
        else:
            rate.set_ylim(bottom=0.0)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes in (loss, accuracy, rate):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12)
        _save(figure, path)


def plot_confusion(cells: np.ndarray, class_names: Sequence[str], title: str, path: Path) -> None:
    """Counts in the cells, shaded by the share of the true class, so that small classes show as well as large ones."""
    count, names = len(class_names), [_plain(name) for name in class_names]
    share = cells / np.maximum(cells.sum(axis=1, keepdims=True), 1)
    side = min(4.0 + 0.42 * count, 16.0)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.subplots()
        # The square root brings out single mistakes next to a diagonal of hundreds.
        image = axes.imshow(np.sqrt(share), cmap="Blues", vmin=0.0, vmax=1.0)
        if count <= MOST_CLASSES_WITH_NUMBERS:
            _write_counts(axes, cells, share)
        turn = 45 if max(map(len, class_names)) > 3 else 0
        axes.set_xticks(range(count), names, rotation=turn, ha="right" if turn else "center")
        axes.set_yticks(range(count), names)
        axes.set_xticks(np.arange(-0.5, count), minor=True)
        axes.set_yticks(np.arange(-0.5, count), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(_plain(title), pad=10)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
        bar.set_ticks(
            list(np.sqrt([0.0, 0.01, 0.05, 0.25, 0.5, 1.0])), labels=["0", "1 %", "5 %", "25 %", "50 %", "100 %"]
        )
        bar.outline.set_visible(False)
        _save(figure, path)


def _write_counts(axes: Axes, cells: np.ndarray, share: np.ndarray) -> None:
    for row, column in zip(*np.nonzero(cells), strict=True):
        mistake = row != column
        light = math.sqrt(share[row, column]) > 0.6
        axes.text(
            column, row, str(cells[row, column]), ha="center", va="center", fontsize=9,
            color="white" if light else MARK if mistake else "black", fontweight="bold" if mistake else "normal",
        )  # fmt: skip


def plot_sweep(results: Sequence[TrainResult], best: TrainResult, title: str, path: Path) -> None:
    """Left: validation loss by epoch, one line a learning rate. Right: the lowest one over the learning rate."""
    from matplotlib import colormaps

    ordered = sorted(results, key=lambda result: result.settings.lr)
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(ordered)))
    with rc_context(STYLE):
        figure = Figure(figsize=(12.5, 4.4), layout="constrained")
        curves, minima = figure.subplots(1, 2, width_ratios=(1.4, 1.0))
        for result, colour in zip(ordered, colours, strict=True):
            _sweep_curve(curves, result, colour, chosen=result is best)
        curves.set(title="Validation loss by epoch", xlabel="epoch", ylabel="cross-entropy")
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        # Beside the lines, not on them: the curves of a sweep fill the whole panel.
        curves.legend(title="learning rate", loc="upper left", bbox_to_anchor=(1.0, 1.0))
        reached = [
            (result.settings.lr, result.best.validation_loss)
            for result in ordered
            if result.best is not None and not result.diverged
        ]
        minima.plot(*zip(*reached, strict=True), color=TRAIN, zorder=1)
        for result, colour in zip(ordered, colours, strict=True):
            if result.best is not None and not result.diverged:
                minima.scatter(result.settings.lr, result.best.validation_loss, color=colour, s=36, zorder=2)
        assert best.best is not None
        minima.plot(
            [best.settings.lr], [best.best.validation_loss], marker="o", markersize=13, markerfacecolor="none",
            markeredgecolor=MARK, markeredgewidth=1.8, linestyle="none", label=f"best: {best.settings.lr:g}",
        )  # fmt: skip
        minima.set(title="Lowest validation loss", xlabel="learning rate", ylabel="cross-entropy", xscale="log")
        # The rates tried are the ticks: on a short logarithmic axis matplotlib's own labels run into one another.
        tried = [rate for rate, _ in reached]
        minima.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=45 if len(tried) > 4 else 0)
        minima.xaxis.set_minor_locator(NullLocator())
        minima.legend()
        values = [metrics.validation_loss for result in ordered for metrics in result.history]
        _log_scale(curves, values)
        _log_scale(minima, [value for _, value in reached])
        figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=12)
        _save(figure, path)


def _sweep_curve(axes: Axes, result: TrainResult, colour: np.ndarray, *, chosen: bool) -> None:
    label = f"{result.settings.lr:g}" + (" (best)" if chosen else " (diverged)" if result.diverged else "")
    epochs = [metrics.epoch for metrics in result.history]
    losses = [metrics.validation_loss for metrics in result.history]
    axes.plot(epochs, losses, color=tuple(colour), linewidth=2.6 if chosen else 1.4, label=label)


def _log_scale(axes: Axes, values: Sequence[float]) -> bool:
    """Logarithmic only where the values span enough for it to help and none is zero; says whether."""
    finite = [value for value in values if math.isfinite(value)]
    logarithmic = bool(finite) and min(finite) > 0.0 and max(finite) / min(finite) > 5.0
    if logarithmic:
        axes.set_yscale("log")
    return logarithmic


def _plain(text: str) -> str:
    """A dollar sign in a folder's name is no formula."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_figure(path, dpi=150)
