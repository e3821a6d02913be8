"""The picture of the offload benchmark: what is on its way, and what the host does, in the course of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

LANES = {"to_host": "down", "host": "host's step", "to_device": "up"}


def plot(timeline: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """A row for each lane, a bar for each copy or call; times in seconds from the beginning of the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 3.2), layout="constrained")
    for place, lane in enumerate(LANES):
        bars = [(begin, end - begin) for begin, end in timeline[lane]]
        axes.broken_barh(bars, (place - 0.4, 0.8), color=f"C{place}", edgecolor="white", linewidth=0.5)
    axes.set_yticks(range(len(LANES)), list(LANES.values()))
    axes.invert_yaxis()
    axes.set(xlabel="seconds from the beginning of the step", title="An offloaded step on the simulated accelerator")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
