"""The plot of the sharding benchmark: state of every rank, and step time against ZeroRedundancyOptimizer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.sharding_ranks import ZERO_VIEWS


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = data["cases"]
    height = max(4.5, 1.5 + 0.3 * sum(len(case["rows"]) - 1 for case in cases))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, height), layout="constrained")
    names = dict.fromkeys(row["name"] for case in cases for row in case["rows"])
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    states(left, max(cases, key=lambda case: (case["ranks"], case["dtype"])), colours)
    times(right, cases, colours)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def states(axes: Any, case: dict[str, Any], colours: dict[str, str]) -> None:
    """Bars of every rank's bytes a parameter, of the case with the most ranks."""
    rows, ranks = case["rows"], case["ranks"]
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        sizes = [size / case["numel"] for size in row["state_bytes"]]
        lefts = [rank + (place - (len(rows) - 1) / 2) * width for rank in range(ranks)]
        axes.bar(lefts, sizes, width=width, color=colours[row["name"]], label=row["name"])
    axes.set_xticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.margins(y=0.25)
    axes.set(ylabel="bytes of state for each parameter of the model", title=f"State of every rank: {case['label']}")
    axes.legend(fontsize=8)


def times(axes: Any, cases: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Ratios of medians, with the 5% to 95% range of the ratios round by round."""
    bars = [(case, row) for case in cases for row in case["rows"] if row["name"] != ZERO_VIEWS]
    for place, (_, row) in enumerate(bars):
        found = row["ratio"]
        axes.barh(place, found["of_medians"], color=colours[row["name"]])
        axes.plot([found["p5"], found["p95"]], [place, place], color="black", linewidth=1)
        axes.text(max(found["of_medians"], found["p95"]), place, f" {found['of_medians']:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(bars)), [f"{case['label']}\n{row['name']}" for case, row in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel=f"time of the slowest rank / {ZERO_VIEWS}", title="Time of a step")
