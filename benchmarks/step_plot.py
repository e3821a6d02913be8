"""The plot of the step-time benchmark: time over size, ratios to torch's fused AdamW, use of the memory's bandwidth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.step_contestants import FUSED
from benchmarks.step_timing import ratio

BF16 = "torch.bfloat16"


def plot(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    main = data["times"]["main"]["times"]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row["name"] for row in main))}
    times_over_size(left, data, colours)
    ratios_to_fused(middle, main, colours)
    shares_of_bandwidth(right, main, data["bandwidth_shares"], colours)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def times_over_size(axes: Any, data: dict[str, Any], colours: dict[str, str]) -> None:
    """Lines for what was timed at every size, single points for the rest."""
    swept = [row for field in data["times"]["sweep"].values() for row in field["times"]]
    rows = [*swept, *(row for row in data["times"]["main"]["times"] if row["label"] not in {s["label"] for s in swept})]
    for label in dict.fromkeys(row["label"] for row in rows):
        points = [row for row in rows if row["label"] == label]
        style = {"linestyle": "--", "marker": "s", "markerfacecolor": "none"} if points[0]["dtype"] == BF16 else {}
        numels, medians = [row["numel"] for row in points], [row["ns"] for row in points]
        line = {"linestyle": "-", "marker": "o", "markersize": 4} | style
        axes.plot(numels, medians, label=label, color=colours[points[0]["name"]], **line)
        low, high = [row["p5"] for row in points], [row["p95"] for row in points]
        axes.fill_between(numels, low, high, color=colours[points[0]["name"]], alpha=0.15)
    axes.set(xscale="log", yscale="log", xlabel="parameters in one tensor", ylabel="ns a parameter (5%, median, 95%)")
    axes.set_title(f"Time of a step, {data['threads']} threads")
    axes.legend(fontsize=8)


def ratios_to_fused(axes: Any, main: list[dict[str, Any]], colours: dict[str, str]) -> None:
    shown = [row for row in main if row["name"] != FUSED]
    for place, row in enumerate(shown):
        found = ratio(main, row["label"], f"{FUSED} {'bf16' if row['dtype'] == BF16 else 'fp32'}")
        if found:
            value = found["of_medians"]
            axes.barh(place, value, color=colours[row["name"]], hatch="//" if row["dtype"] == BF16 else None)
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["label"] for row in shown])
    axes.margins(x=0.25)
    axes.set(xscale="log", xlabel="time / torch fused of the same type", title=f"{main[0]['numel']:,} parameters")


def shares_of_bandwidth(
    axes: Any, main: list[dict[str, Any]], shares: dict[str, float], colours: dict[str, str]
) -> None:
    shown = [row for row in main if row["label"] in shares]
    for place, row in enumerate(shown):
        share = shares[row["label"]]
        axes.barh(place, share, color=colours[row["name"]], hatch="//" if row["dtype"] == BF16 else None)
        axes.text(share, place, f" {share:.2f}", va="center", fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["label"] for row in shown])
    axes.margins(x=0.15)
    axes.set(xlabel="bytes that have to move / time / bandwidth", title="Share of the run's memory bandwidth")
