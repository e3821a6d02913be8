"""The picture of a profile: every step in its parts, the medians, the share of a training step, the state's bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_adam.phases import PHASES

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = dict(zip(PHASES, ("#56B4E9", "#E69F00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
GREY = "#999999"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw it.

    Args:
        path: its suffix says what kind of picture, such as ``.png``.
        report: what ``Profile.as_dict`` returns, or a JSON file of ``Profile.export`` holds.

    Raises:
        ImportError: there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display, and changes nothing of a program that has one
    grid = figure.add_gridspec(2, 3, height_ratios=(1.3, 1.0))
    _draw_steps(figure.add_subplot(grid[0, :]), report)
    _draw_parts(figure.add_subplot(grid[1, 0]), report["summary"])
    _draw_share(figure.add_subplot(grid[1, 1]), report["summary"])
    _draw_bytes(figure.add_subplot(grid[1, 2]), report["summary"])
    figure.suptitle(_title(report), weight="bold", fontsize=12)
    figure.savefig(path, dpi=130)


def _title(report: Mapping[str, Any]) -> str:
    settings, summary = report["settings"], report["summary"]
    offload = "" if settings["offload"] is None else f", offload to {settings['offload']}"
    ranks = "" if report["ranks"] == 1 else f", rank {report['rank']} of {report['ranks']}"
    return (
        f"{report['optimizer']}, moments {settings['moments']}{offload}: {summary['parameters']:,} parameters, "
        f"{', '.join(report['dtypes'])} on {', '.join(report['devices'])}{ranks}"
    )


def _draw_steps(axes: Any, report: Mapping[str, Any]) -> None:
    """Bars one upon another; those far above the median, such as a first step's, are cut off and the title says so."""
    records = report["records"]
    steps = [record["step"] for record in records]
    below = [0.0] * len(records)
    for phase in PHASES:
        heights = [record[f"{phase}_ns"] / 1e6 for record in records]
        if any(heights):
            axes.bar(steps, heights, bottom=below, width=0.9, color=COLOURS[phase], label=phase)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    limit = min(1.2 * max(below), 5.0 * statistics.median(below))
    axes.set_ylim(0, limit)
    axes.set_xlim(steps[0] - 0.6, steps[-1] + 0.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", ncols=len(PHASES), loc="upper right", fontsize=9)
    cut = sum(height > limit for height in below)
    longest = f"{cut} of {len(records)} are longer than shown, step {steps[below.index(max(below))]} the longest"
    note = f" ({longest}, {_milliseconds(max(below) / 1e3)})" if cut else ""
    _finish(axes, f"Every optimizer step{note}", "step", "milliseconds")


def _draw_parts(axes: Any, summary: Mapping[str, Any]) -> None:
    parts = {name: figures for name, figures in summary["parts_s"].items() if figures["sum"]}
    values = [figures["median"] * 1e3 for figures in parts.values()]
    texts = [f"{_milliseconds(part['median'])}, {part['share']:.1%}" for part in parts.values()]
    _bars(axes, list(parts), values, texts, [COLOURS[name] for name in parts])
    _finish(axes, f"A step's parts: {_milliseconds(summary['total_s']['median'])} in the median", "milliseconds", "")


def _draw_share(axes: Any, summary: Mapping[str, Any]) -> None:
    if summary["rest_s"] is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no time between two steps was recorded", ha="center", va="center", color=GREY)
        return
    names = ["optimizer step", "rest of the\ntraining step"]
    seconds = [summary["total_s"]["median"], summary["rest_s"]["median"]]
    texts = [_milliseconds(value) for value in seconds]
    _bars(axes, names, [value * 1e3 for value in seconds], texts, [COLOURS["step"], GREY])
    _finish(axes, f"The step is {summary['share_of_training']:.1%} of the training step", "milliseconds", "")


def _draw_bytes(axes: Any, summary: Mapping[str, Any]) -> None:
    sizes = {**summary["bytes"], "pinned buffers": summary["pinned_bytes"], "gradients": summary["gradient_bytes"]}
    sizes = {name: size for name, size in sizes.items() if size}
    texts = [_size(size) for size in sizes.values()]
    _bars(axes, list(sizes), [size / 2**20 for size in sizes.values()], texts, ["#0072B2"] * len(sizes))
    _finish(axes, f"State: {summary['bytes_per_parameter']:.3f} bytes a parameter", "MiB", "")


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float], texts: Sequence[str], colours: Sequence[str]
) -> None:
    places = list(range(len(names)))
    axes.barh(places, values, color=colours, height=0.65)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.annotate(text, (value, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.8 * max(values, default=0.0) or 1.0)  # room for the texts


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _size(nbytes: int) -> str:
    return (
        f"{nbytes / 2**20:.3g} MiB"
        if nbytes >= 2**20
        else f"{nbytes / 2**10:.3g} KiB"
        if nbytes >= 2**10
        else f"{nbytes} B"
    )


def _finish(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, axis="x" if not ylabel else "y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
