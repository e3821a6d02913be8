"""The README's pictures, from the results in benchmarks/results and nothing else.

    python -m benchmarks.pictures [--results FOLDER] [--output FOLDER]

    memory_by_setting.png   from memory.json: bytes of state a parameter
    step_time_peers.png     from step_time.json: time of a step against torch's fused AdamW
    loss_parity.png         from parity.json: differences of final losses in parts of the spread between seeds
    growth.png              from memory.json and step_time.json: bytes and seconds over the number of parameters

White background, so that they are read in a dark theme as well; twice 800 points wide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import harness
from benchmarks.bench_parity import BASELINE, CONTROL, judge
from benchmarks.bench_parity import OURS as OURS_TRAINED
from benchmarks.bench_step_time import time_growth
from benchmarks.step_contestants import FUSED, OURS
from benchmarks.step_timing import ratio

WIDTH, DPI = 8.0, 200
OWN, OWN_LIGHT, PEER, PEER_LIGHT, RED = "#1f6feb", "#9cc2ff", "#7d8590", "#c3c9d0", "#cf222e"
BF16 = "torch.bfloat16"
PAST_EDGE = 1.3
"""Spreads from zero at which a difference is drawn as an arrow."""
RIGHT = {1: "right", -1: "left"}

Data = Mapping[str, Any]


def canvas(height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(WIDTH, height), layout="constrained", facecolor="white")
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=10)
    return figure, axes


def write(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI, facecolor="white")
    pyplot.close(figure)


def bars(axes: Any, rows: Sequence[tuple[str, float, str]], places: Callable[[float], str]) -> None:
    """Horizontal bars (label, value, colour), the first row above, each with its value."""
    for place, (_, value, colour) in enumerate(rows):
        axes.barh(place, value, color=colour, height=0.7)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over a line that would cross it
        axes.annotate(
            places(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=10, bbox=box
        )
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def colour_of(label: str, dtype: str) -> str:
    own, light = label.startswith(OURS), dtype in (BF16, "bf16")
    return (OWN_LIGHT if light else OWN) if own else (PEER_LIGHT if light else PEER)


def main_states(memory: Data) -> list[tuple[str, float]]:
    """Label and bytes of state a parameter at the largest size measured, which is the main one or another beside it."""
    out = []
    for label, rows in memory["probes"].items():
        there = [row for row in rows if "left_out" not in row]
        if there:
            largest = max(there, key=lambda row: row["numel"])
            out.append((label, largest["state_bytes"] / largest["numel"]))
    return out


def memory_by_setting(memory: Data, path: Path) -> None:
    """Bytes of state a parameter: fewest above."""
    # torch's foreach step holds what its fused one does.
    found = [(label, held) for label, held in main_states(memory) if not label.startswith("torch foreach")]
    found.sort(key=lambda row: row[1])
    figure, axes = canvas(0.9 + 0.3 * len(found))
    bars(axes, [(label, held, colour_of(label, label.split()[-1])) for label, held in found], "{:.2f}".format)
    axes.set_xlabel("bytes of optimizer state a parameter", fontsize=11)
    write(figure, path)


def step_ratios(step_time: Data) -> list[tuple[str, float, str]]:
    """Label, time over that of torch's fused step of the same dtype at the main size, and colour."""
    main = step_time["times"]["main"]["times"]
    out = []
    for row in main:
        bf16 = row["dtype"] == BF16
        found = ratio(main, row["label"], f"{FUSED} {'bf16' if bf16 else 'fp32'}")
        if found is not None and row["name"] != FUSED:
            out.append((row["label"], found["of_medians"], colour_of(row["label"], row["dtype"])))
    return sorted(out, key=lambda row: row[1])


def step_time_peers(step_time: Data, path: Path) -> None:
    """Ratios to torch's fused step on a logarithmic axis: from the quickest to the slowest there are two decades."""
    rows = step_ratios(step_time)
    figure, axes = canvas(1.1 + 0.3 * len(rows))
    axes.axvline(1.0, color="black", linewidth=1, zorder=1.5)
    bars(axes, rows, lambda value: f"{value:.2f}" if value < 10 else f"{value:.0f}")
    axes.set(xscale="log")
    low, high = min([0.3, *(value for _, value, _ in rows)]) * 0.8, max(value for _, value, _ in rows) * 1.6
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    numel = step_time["times"]["main"]["times"][0]["numel"]
    axes.set_xlabel(
        f"time of a step / torch fused AdamW of the same dtype ({numel / 1e6:.0f}M parameters)", fontsize=11
    )
    write(figure, path)


def parity_rows(parity: Data) -> list[tuple[str, str, float, tuple[float, float] | None]]:
    """Task, optimizer, mean difference and its 95% interval, both in parts of the spread between AdamW's seeds."""
    out = []
    for task, found in parity["tasks"].items():
        finals = {name: [float(run["final"]) for run in runs] for name, runs in found["runs"].items()}
        for name in finals:
            if name != BASELINE:
                verdict = judge(finals[BASELINE], finals[name])
                spread, between = verdict["seed_spread"], verdict["interval"]
                interval = None if between is None else (between[0] / spread, between[1] / spread)
                out.append((task, name, verdict["mean_difference"] / spread, interval))
    return out


def loss_parity(parity: Data, path: Path) -> None:
    """Means with intervals over the band of one spread; what lies outside is an arrow with its value."""
    rows = parity_rows(parity)
    figure, axes = canvas(1.3 + 0.32 * len(rows))
    axes.axvspan(-1, 1, color="#eaeef2", zorder=0)
    axes.axvline(0, color="black", linewidth=1)
    for place, (_, name, mean, interval) in enumerate(rows):
        colour = OWN if name == OURS_TRAINED else RED if name == CONTROL else PEER
        if interval is None or not abs(mean) < PAST_EDGE:
            side = -1 if mean < 0 else 1
            arrow = {"arrowstyle": "->", "color": colour, "lw": 2}
            axes.annotate("", (side * 1.9, place), (side * 1.55, place), arrowprops=arrow)
            told = f"{mean:+.0e}" if abs(mean) < math.inf else "diverged"
            axes.text(side * 1.52, place, told, ha=RIGHT[side], va="center", fontsize=10, color=colour)
            continue
        axes.plot(interval, [place, place], color=colour, linewidth=2)
        axes.plot([mean], [place], "o", color=colour, markersize=6)
        axes.text(interval[1], place, f"  {mean:+.3f}", va="center", fontsize=10, color=colour)
    axes.set_yticks(range(len(rows)), [f"{task}: {name}" for task, name, _, _ in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-1.9 if any(mean <= -PAST_EDGE for _, _, mean, _ in rows) else -PAST_EDGE, 1.9)
    axes.set_xlabel(
        f"final loss minus float32 AdamW's: mean and 95% interval of {parity['seeds']} pairs\n"
        "(unit and band: its spread between seeds)",
        fontsize=11,
    )
    write(figure, path)


def growth_picture(memory: Data, step_time: Data, path: Path) -> None:
    """Log-log: points and fitted lines of the state's bytes and of a step's time."""
    figure, (left, right) = canvas(4.2, columns=2)
    times = time_growth(step_time["times"]["sweep"])
    for label in (f"{OURS} fp32", f"{FUSED} fp32", f"{FUSED} bf16"):
        fitted_line(left, label, memory["growth"].get(label), 1.0, "{:.3f} B")
    for label in (f"{OURS} fp32", f"{FUSED} fp32", f"{OURS} bf16", f"{FUSED} bf16"):
        fitted_line(right, label, times.get(label, {}).get("all"), 1e9, "{:.2f} ns")
    left.set_ylabel("bytes of state", fontsize=11)
    right.set_ylabel("seconds of a step", fontsize=11)
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("parameters", fontsize=11)
        axes.legend(fontsize=8, frameon=False)
    write(figure, path)


def fitted_line(axes: Any, label: str, fitted: Data | None, scale: float, told: str) -> None:
    """Points of what was measured, and the line constant + slope * n through them, named with its slope."""
    if fitted is None:
        return
    numels, bf16 = fitted["numels"], label.endswith("bf16")
    low, high = min(numels), max(numels)
    line = [low * (high / low) ** (i / 50) for i in range(51)]
    values = [fitted["constant"] + fitted["slope"] * n for n in line]
    colour = colour_of(label, "bf16" if bf16 else "fp32")
    axes.plot(line, values, color=colour, linewidth=1.5, label=f"{label}: {told.format(fitted['slope'] * scale)} each")
    axes.plot(numels, fitted["values"], "s" if bf16 else "o", color=colour, markersize=5)


def draw(results: Path, output: Path) -> list[Path]:
    """All pictures whose results are there; the paths of those drawn."""
    found = {
        name: json.loads(path.read_text())
        for name in ("memory", "step_time", "parity")
        if (path := results / f"{name}.json").exists()
    }
    wanted: list[tuple[str, Callable[..., None], tuple[str, ...]]] = [
        ("memory_by_setting", memory_by_setting, ("memory",)),
        ("step_time_peers", step_time_peers, ("step_time",)),
        ("loss_parity", loss_parity, ("parity",)),
        ("growth", growth_picture, ("memory", "step_time")),
    ]
    output.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture, needed in wanted:
        if missing := [need for need in needed if need not in found]:
            typer.echo(f"{name}.png is not drawn: {results} has no {', '.join(f'{need}.json' for need in missing)}")
            continue
        drawn.append(output / f"{name}.png")
        picture(*(found[need] for need in needed), drawn[-1])
    return drawn


def main(
    results: Annotated[Path, typer.Option(help="Folder of the JSON files.")] = harness.RESULTS,
    output: Annotated[Path | None, typer.Option(help="Folder for the PNG files; default: the same.")] = None,
) -> None:
    """Draw the README's pictures; ends with 1 where the results of one are missing."""
    drawn = draw(results, output or results)
    for path in drawn:
        typer.echo(str(path))
    if len(drawn) < 4:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
